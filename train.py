"""Train rank-constrained LM heads on a frozen backbone: `python train.py --help`."""

from __future__ import annotations

import os

# OpenMP threads that wait should sleep, not spin, where something else wants the cores: with one other busy process on two
# cores a run is 2-3 times faster so (launch/LOG.md). Read once, when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import dataclasses
import logging
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Optional

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console

import bottleneck
from bottleneck import checkpoint, checks, cli, config, curve, initial
from bottleneck.backbone import Backbone, load_shape, load_tokenizer
from bottleneck.config import TrainConfig
from bottleneck.errors import UserError, check
from bottleneck.heads import HeadBank
from bottleneck.metrics import derived, finite
from bottleneck.module import HeadSweep, ValidateEvery
from bottleneck.optim import bank_keys
from bottleneck.progress import TokenProgress
from bottleneck.refine import refine
from bottleneck.tracking import build_loggers, close_loggers
from data.module import TextData, leading_bos
from data.prepare import Corpus, prepare

log = logging.getLogger("bottleneck")
# Warnings of libraries about what is meant to be so, or about themselves.
QUIET = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*'set_vital' is deprecated.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*lr_scheduler.step\\(\\).*before.*optimizer.step.*",
    ".*GPU available but not used.*",
)


@dataclasses.dataclass
class Result:
    """What a run built, for tests and for use from Python."""

    curve: dict[str, Any]
    module: HeadSweep
    trainer: pl.Trainer
    run_dir: Path


def quiet() -> None:
    """Leave on the terminal what concerns the user."""
    for name in ("pytorch_lightning", "lightning", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its retries itself
    if rank_zero_only.rank:  # other processes of a DDP run speak up when something is wrong
        logging.getLogger().setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def build_trainer(c: TrainConfig, steps: int, run_dir: Path, resume_step: Optional[int]) -> pl.Trainer:
    t = c.trainer
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(t.threads or max(1, cores // t.devices))
    strategy: Any = t.strategy
    if strategy == "ddp" or (strategy == "auto" and t.devices * t.num_nodes > 1):
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    callbacks: list[pl.Callback] = [TokenProgress()] if t.progress else []
    callbacks += [ValidateEvery(t.val_every)] if t.val_every else []
    callbacks += [checkpoint.SaveLast(run_dir, t.checkpoint_every)] if t.checkpoint_every else []
    accelerator = t.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    try:
        return pl.Trainer(
            accelerator=accelerator, devices=t.devices, num_nodes=t.num_nodes, strategy=strategy,
            max_steps=steps, max_epochs=-1, limit_val_batches=0, num_sanity_val_steps=0,
            logger=build_loggers(c.logger, run_dir, dataclasses.asdict(c), resume_step),
            callbacks=callbacks,
            plugins=[checkpoint.AtomicCheckpointIO()], default_root_dir=run_dir, use_distributed_sampler=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
    except (MisconfigurationException, RuntimeError) as error:
        raise UserError(f"trainer: {error}") from error


def start_heads(c: TrainConfig, backbone: Backbone, data: TextData, bank: HeadBank) -> None:
    """Give every head its start, from the first sequences of the training order."""
    log.info("starting heads: %s, %d calibration tokens", c.head.init, c.head.calibration_tokens)
    if len(c.seed) > 1 and c.head.init in ("fisher", "refined", "svd"):
        log.warning("seed=%s: head.init=%s has nothing random, heads of different seeds will be equal", c.seed, c.head.init)
    ids = data.calibration(c.head.calibration_tokens).to(backbone.lm_head.weight.device)
    hidden: Any = (backbone(part[:, :-1]) for part in ids.split(c.trainer.micro_batch_size))
    if c.head.init == "refined":
        hidden = list(hidden)  # read once a pass
    moments = initial.calibrate(hidden, backbone.head)
    start = initial.starts("fisher" if c.head.init == "refined" else c.head.init, backbone.head, moments)
    if c.head.init != "refined":
        for key in bank.keys:
            bank[key].set(*start(key))
        return
    # heads that differ in their rate alone start alike
    alike = {(key.rank, key.seed): key for key in bank.keys}
    log.info("refining %d starts: %d passes", len(alike), c.head.passes)
    began = time.monotonic()
    taught = refine([start(key) for key in alike.values()], hidden, backbone.head, moments, c.head.passes)
    log.info("refined in %.1f s", time.monotonic() - began)
    for key in bank.keys:
        bank[key].set(*taught[list(alike).index((key.rank, key.seed))])


def build_curve(c: TrainConfig, module: HeadSweep, corpus: Corpus) -> dict[str, Any]:
    """The content of curve.json (schema 1)."""
    backbone, bank, tokens = module.backbone, module.bank, module.validation_tokens
    diverged = bank.diverged.tolist()
    heads = []
    for i, key in enumerate(bank.keys):
        numbers = derived(module.final[key.name], tokens, corpus.validation_bytes)
        ok = not diverged[i] and numbers["loss"] is not None
        heads.append({
            "rank": key.rank, "lr": key.lr, "seed": key.seed, "init": c.head.init,
            "parameters": bank[key].parameters_count, **numbers,
            "initial_loss": finite(module.initial.get(key.name)), "status": "ok" if ok else "diverged", "best": False,
        })  # fmt: skip
    o = c.optim
    recipe = {
        "batch_size": c.batch_size, "block_size": c.data.block_size, "data_seed": c.data.seed,
        "weight_decay": o.weight_decay, "betas": list(o.betas), "eps": o.eps, "warmup": o.warmup, "lr_final": o.lr_final,
        "clip": o.clip, "calibration_tokens": c.head.calibration_tokens,
        "dtype": str(backbone.lm_head.weight.dtype).removeprefix("torch."),
    }  # fmt: skip
    if c.head.init == "refined":
        recipe["passes"] = c.head.passes
    return curve.finish({
        "schema": curve.SCHEMA, "backbone": backbone.name, "backbone_hash": backbone.hash,
        "hidden_size": backbone.hidden_size, "vocab_size": backbone.vocab_size,
        "tokens": module.steps * c.batch_size * c.data.block_size, "data": corpus.name, "data_hash": corpus.fingerprint,
        "validation_tokens": tokens, "recipe": recipe,
        "reference": derived(module.reference, tokens, corpus.validation_bytes),
        "heads": heads,
        "versions": {"bottleneck": bottleneck.__version__, "torch": torch.__version__, "python": platform.python_version()},
    })  # fmt: skip


def train(cfg: DictConfig, run_dir: Path) -> Result:
    """One run: check, prepare text, load the backbone, train the bank, write the curve.

    Raises: UserError for whatever the user can mend, before any weights are loaded wherever that is possible.
    """
    quiet()
    c = checks.check_config(cfg)
    stored = dataclasses.asdict(c)
    steps = checks.total_steps(c)
    resume = checkpoint.find_checkpoint(c.ckpt_path, run_dir)
    resume_step = None
    if resume is not None:
        saved = checkpoint.read_checkpoint(resume)
        checkpoint.check_same_run(saved["bottleneck"]["config"], stored, resume)
        resume_step = saved["global_step"]
        log.info("going on from %s, step %d of %d", resume, resume_step, steps)
        del saved
    elif c.ckpt_path == "last":
        log.info("ckpt_path=last: no checkpoint in %s yet, starting at step 0", run_dir)

    hidden_size, context, vocab_size = load_shape(c.backbone)
    ranks = checks.check_shapes(c, hidden_size, context)
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(c, steps, run_dir, resume_step)
    device_type = trainer.strategy.root_device.type
    checks.check_device(c, device_type)
    tokenizer = load_tokenizer(c.backbone)
    corpus = prepare(c.data, tokenizer)
    top = max(int(corpus.train.max()), int(corpus.validation.max()))
    check(top < vocab_size, f"backbone.tokenizer: makes id {top}, the backbone's vocabulary ends at {vocab_size - 1}")
    t = c.trainer
    data = TextData(corpus, c.data.block_size, c.batch_size, steps, t.micro_batch_size, c.data.seed, leading_bos(tokenizer))

    keys = bank_keys(c.optim, c.head.init, ranks, c.seed, hidden_size, vocab_size)
    bank = HeadBank(keys, vocab_size, hidden_size, c.head.loss_impl, t.micro_batch_size * c.data.block_size)

    backbone = Backbone.load(c.backbone, device_type)
    shape = (backbone.vocab_size, backbone.hidden_size)
    check(shape == (vocab_size, hidden_size), f"backbone {backbone.name}: its head is {list(shape)}, its config says {[vocab_size, hidden_size]}")
    log.info("%s: d = %d, V = %d; %d heads, %d steps of %d tokens", backbone.name, hidden_size, vocab_size, len(bank),
             steps, c.batch_size * c.data.block_size)  # fmt: skip
    if checks.compiles(c, device_type):
        compiled = backbone.compile_layers((t.micro_batch_size, c.data.block_size))
        log.info("backbone: %s", "layers are compiled" if compiled else f"family {backbone.family} does not name its layers, not compiled")
    module = HeadSweep(
        backbone, bank, c.optim, steps, t.micro_batch_size, lambda b: start_heads(c, backbone, data, b),
        data.validation_batches, stored, corpus.fingerprint, t.log_every,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise UserError(f"trainer.micro_batch_size={t.micro_batch_size}: out of GPU memory; give a smaller one, or fewer heads: {error}") from error
    except SystemExit:
        if trainer.interrupted:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
        raise
    finally:
        close_loggers(c.logger)

    result = Result(build_curve(c, module, corpus), module, trainer, run_dir)
    if trainer.is_global_zero:
        about = {"init": c.head.init, "backbone": backbone.name, "backbone_hash": backbone.hash}
        checkpoint.save_heads(bank, run_dir / "heads", about)
        curve.write([result.curve], run_dir)
        curve.show([result.curve], Console())
        log.info("wrote curve.json, curve.csv, curve.png and heads/ in %s", run_dir)
    return result


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    cli.job(lambda: train(cfg, Path(HydraConfig.get().runtime.output_dir)))


if __name__ == "__main__":
    config.register()
    sys.exit(cli.one_line_errors(main))

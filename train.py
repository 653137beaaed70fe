"""Train rank-constrained LM heads on a frozen backbone: `python train.py --help`."""

from __future__ import annotations

import os
import signal

# Slurm's warning ahead of a time limit may come while this file still imports, and would end the process: it waits (until `_train`
# listens, see bottleneck/stopping.py)
if "SLURM_JOB_ID" in os.environ:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})

# OpenMP threads that wait should sleep, not spin, where something else wants the cores: with one other busy process on two
# cores a run is 2-3 times faster so (launch/LOG.md). Read once, when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import contextlib
import dataclasses
import datetime
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, Optional

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console

from bottleneck.backbone import sharding
from bottleneck.backbone.model import Backbone, FullHead, label, load_shape, load_tokenizer
from bottleneck.cli import one_line_errors as cli
from bottleneck.config import checks
from bottleneck.config import schema as config
from bottleneck.config.head_options import head_options
from bottleneck.config.schema import TrainConfig
from bottleneck.core.environment import environment
from bottleneck.core.errors import LostPeers, Stopped, UserError, check
from bottleneck.core.extensions import HEAD_KINDS, OBJECTIVES, STARTS
from bottleneck.core.run_file import write_run_file
from bottleneck.data.module import TextData, leading_bos
from bottleneck.data.prepare import prepare
from bottleneck.evaluation.agreement import bands_of
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.starting import start_bank
from bottleneck.losses.objective import BoundObjective
from bottleneck.results import curve
from bottleneck.training import (
    checkpoint,
    cluster,
    lightning_signals,
    processes,
    recipe,
    resume,
    run_folder,
    tracking,
    zero2,
)
from bottleneck.training import signals as stopping
from bottleneck.training.curve_of_run import build_curve
from bottleneck.training.head_files import save_heads
from bottleneck.training.lost_peers import lost_peers
from bottleneck.training.module import HeadSweep, ValidateEvery
from bottleneck.training.optim import bank_keys, build_optimizer
from bottleneck.training.progress import TokenProgress, report_progress
from bottleneck.training.teacher import open_teacher

log = logging.getLogger("bottleneck")
# Warnings of libraries about what is meant to be so, or about themselves.
QUIET = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*'set_vital' is deprecated.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*lr_scheduler.step\\(\\).*before.*optimizer.step.*",
    ".*GPU available but not used.*",
    ".*`srun` command is available on your system but is not used.*",
)


FEW = 4096  # validation tokens, below which a run says so


@dataclasses.dataclass
class Result:
    """What a run built, for tests and for use from Python."""

    curve: dict[str, Any]
    module: Optional[HeadSweep]  # None where the run was finished already
    trainer: Optional[pl.Trainer]
    run_dir: Path


def quiet() -> None:
    """Leave on the terminal what concerns the user."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its retries itself
    if rank_zero_only.rank:  # other processes of a DDP run speak up when something is wrong
        logging.getLogger().setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)


def build_trainer(c: TrainConfig, steps: int, run_dir: Path, flag: stopping.Flag) -> pl.Trainer:
    t = c.trainer
    torch.set_num_threads(t.threads or cluster.threads(t.devices))
    strategy: Any = t.strategy
    if strategy == "ddp" or (strategy == "auto" and t.devices * t.num_nodes > 1):
        strategy = (zero2.Zero2Strategy if t.shard == "zero2" else DDPStrategy)(
            gradient_as_bucket_view=True, timeout=datetime.timedelta(minutes=t.timeout_minutes)
        )
    check(
        t.accelerator != "gpu" or torch.cuda.is_available(),
        "trainer.accelerator=gpu: there is no CUDA GPU here; allowed are auto, cpu",
    )
    callbacks: list[pl.Callback] = [TokenProgress()] if t.progress else []
    callbacks += [processes.SendBfloat16()] if t.reduce_dtype == "bfloat16" and t.devices * t.num_nodes > 1 else []
    callbacks += [ValidateEvery(t.val_every)] if t.val_every else []
    saves = [checkpoint.SaveLast(run_dir, t.checkpoint_every)] if t.checkpoint_every else []
    callbacks += [*saves, stopping.StopOnSignal(flag, saves[0].save if saves else None)]
    # without an environment of its own Lightning would look for one, and find Slurm's allocation
    plugins = [checkpoint.AtomicCheckpointIO(), cluster.cluster_environment() or LightningEnvironment()]
    accelerator = t.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    try:
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=t.devices,
            num_nodes=t.num_nodes,
            strategy=strategy,
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            callbacks=callbacks,
            plugins=plugins,
            default_root_dir=run_dir,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise UserError(f"trainer: {error}") from error
    lightning_signals.disable(trainer)
    return trainer


def start_heads(c: TrainConfig, backbone: Backbone, full: FullHead, data: TextData, bank: HeadBank) -> None:
    """Give every head its start, from the first sequences of the training order; closed forms approximate the head `full`."""
    log.info("starting heads: %s, %d calibration tokens", c.head.init, c.head.calibration_tokens)
    ids = data.calibration(c.head.calibration_tokens).to(backbone.lm_head.weight.device)
    start_bank(
        bank,
        c.head.init,
        full,
        (backbone(part[:, :-1]) for part in report_progress("calibrating", ids.split(c.trainer.micro_batch_size))),
        options=head_options(c.head, STARTS[c.head.init].options),
        whiten=c.head.whiten,
        lr_ratio=c.optim.lr_ratio,
        watch=report_progress,
    )


def train(cfg: DictConfig, run_dir: Path) -> Result:
    """One run: check, prepare text, load the backbone, train the bank, write the curve. A finished one is left as it is.

    Raises: UserError for whatever the user can mend, before any weights are loaded wherever that is possible; Stopped where
        a signal asked for it.
    """
    try:
        with run_folder.lock_folder(run_dir, cluster.global_rank()), contextlib.ExitStack() as at_end:
            return _train(cfg, run_dir, at_end)
    except Stopped as stop:
        if stop.signal in stopping.REQUEUE and "SLURM_JOB_ID" in os.environ:
            stopping.requeue()
        raise
    except BaseException as error:
        processes.leave_at_once(error)
        raise


def _train(cfg: DictConfig, run_dir: Path, at_end: contextlib.ExitStack) -> Result:
    quiet()
    c = checks.check_config(cfg)
    teacher = open_teacher(c.head.teacher)
    if teacher is not None:
        c = dataclasses.replace(c, head=dataclasses.replace(c.head, teacher=teacher.name))
    stored = dataclasses.asdict(c)
    cluster.check_world(c.trainer.devices, c.trainer.num_nodes)
    steps = checks.total_steps(c)
    start = resume.find(c, stored, run_dir, steps)
    if start.finished is not None:
        log.info("%s is finished: nothing to do", run_dir)
        return Result(start.finished, None, None, run_dir)

    hidden_size, context, vocab_size = load_shape(c.backbone)
    ranks = checks.check_shapes(c, hidden_size, context)
    if teacher is not None:
        teacher.check_shape(hidden_size, vocab_size)
    run_dir.mkdir(parents=True, exist_ok=True)
    flag = stopping.Flag()
    at_end.callback(flag.leave)
    if "SLURM_JOB_ID" in os.environ:
        flag.listen(stopping.REQUEUE)  # which would end the process while it gets ready
        signal.pthread_sigmask(signal.SIG_UNBLOCK, set(stopping.REQUEUE))
    trainer = build_trainer(c, steps, run_dir, flag)
    device_type = trainer.strategy.root_device.type
    checks.check_device(c, device_type)
    if device_type == "cuda":
        torch.cuda.set_device(
            trainer.strategy.root_device
        )  # for kernels that ask for the current one; Lightning does it in fit
    tokenizer = load_tokenizer(c.backbone)
    corpus = prepare(c.data, tokenizer)
    top = max(int(corpus.train.max()), int(corpus.validation.max()))
    check(top < vocab_size, f"backbone.tokenizer: makes id {top}, the backbone's vocabulary ends at {vocab_size - 1}")
    if len(corpus.validation) - 1 < FEW:
        log.info(
            "%s has %s validation tokens, which is few: perplexities are uncertain; give data.validation_files, more text, or a larger data.validation_fraction",
            corpus.name,
            f"{len(corpus.validation) - 1:,}",
        )
    t = c.trainer
    data = TextData(
        corpus,
        c.data.block_size,
        c.batch_size,
        steps,
        t.micro_batch_size,
        c.data.seed,
        leading_bos(tokenizer),
        c.data.epochs,
    )

    keys = bank_keys(
        c.optim,
        c.head.init,
        ranks,
        c.seed,
        hidden_size,
        vocab_size,
        kind=c.head.kind,
        options=head_options(c.head, HEAD_KINDS[c.head.kind].options),
    )
    bank = HeadBank(
        keys,
        vocab_size,
        hidden_size,
        c.head.loss_impl,
        t.micro_batch_size * c.data.block_size,
        c.head.whiten or c.optim.lr_ratio != 1,
        c.head.loss_memory,
    )
    if c.head.teacher == "trained":
        _ = bank.teacher_index  # raises unless there is exactly one

    start = resume.verify(start, stored, run_dir, steps, bank=bank)
    if start.path is not None:
        if cluster.global_rank() == 0:
            resume.set_damaged_aside(run_dir, start.path)
        log.info("resuming from %s, step %d of %d", start.path, start.step, steps)

    in_sweep = (run_dir.parent / "multirun.yaml").exists()  # which Hydra writes: this is one job of several
    facts = {
        key.name: recipe.head_facts(
            c, key, hidden_size=hidden_size, vocab_size=vocab_size, data=corpus.name, backbone=label(c.backbone)
        )
        for key in keys
    }
    trainer.loggers = tracking.build_loggers(
        c.logger, run_dir, (run_dir.parent if in_sweep else run_dir).name, facts, start.step
    )
    outcome: dict[str, Any] = {}
    at_end.callback(lambda: tracking.close(trainer.loggers, outcome.get("curve"), in_sweep))

    sharded = t.shard in ("fsdp", "zero3")
    if sharded:
        sharding.connect(trainer.strategy)
        backbone = sharding.load(c.backbone, t.shard, trainer.strategy.root_device, block_size=c.data.block_size)
    else:
        backbone = Backbone.load(c.backbone, trainer.strategy.root_device, block_size=c.data.block_size)
    shape = (backbone.vocab_size, backbone.hidden_size)
    check(
        shape == (vocab_size, hidden_size),
        f"backbone {backbone.name}: its head is {list(shape)}, its config says {[vocab_size, hidden_size]}",
    )
    log.info(
        "%s: d = %d, V = %d; %d head%s, %d steps of %d tokens",
        backbone.name,
        hidden_size,
        vocab_size,
        len(bank),
        "s" * (len(bank) > 1),
        steps,
        c.batch_size * c.data.block_size,
    )
    if checks.compiles(c, device_type):
        compiled = backbone.compile_layers(
            (min(t.micro_batch_size, c.batch_size // (t.devices * t.num_nodes)), c.data.block_size)
        )
        log.info(
            "backbone: %s",
            "layers are compiled" if compiled else f"family {backbone.family} does not name its layers, not compiled",
        )
    full = teacher.head(backbone) if teacher is not None else backbone.head
    if c.head.objective != "ce":
        says = full.float_logits if c.head.teacher != "trained" else None
        whose = f"{c.head.teacher} of {teacher.run.folder}" if teacher is not None else "the original head"
        objective = OBJECTIVES[c.head.objective]
        bank.objective = BoundObjective(objective, head_options(c.head, objective.options), says, whose)
    module = HeadSweep(
        backbone,
        bank,
        c.optim,
        steps,
        t.micro_batch_size,
        lambda b: start_heads(c, backbone, full, data, b),
        sharding.even(data.validation_batches) if sharded else data.validation_batches,
        stored,
        corpus.fingerprint,
        bands_of(corpus.train, vocab_size),
        corpus.validation_bytes,
        t.log_every,
        flag,
        zero2.Zero2AdamW if t.shard == "zero2" else build_optimizer,
        resume_step=start.step,
    )
    if trainer.is_global_zero:
        write_run_file(run_dir, stored, environment(trainer.strategy.root_device))
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start.path, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"trainer.micro_batch_size={t.micro_batch_size}: out of GPU memory; give a smaller one, fewer heads, or trainer=fsdp: {error}"
        ) from error
    except RuntimeError as error:
        if trainer.world_size > 1 and lost_peers(error):
            who = f"process {trainer.global_rank} of {trainer.world_size}"
            raise LostPeers(
                f"{who} lost the others, or had no answer for {t.timeout_minutes} minutes (trainer.timeout_minutes): {error}"
            ) from error
        raise
    except SystemExit:
        if trainer.interrupted:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
        raise

    done = Result(build_curve(c, module, corpus), module, trainer, run_dir)
    if trainer.is_global_zero:
        about = {"init": c.head.init, "backbone": backbone.name, "backbone_hash": backbone.hash}
        save_heads(bank, run_dir / "heads", about)
        curve.write([done.curve], run_dir)
        curve.show([done.curve], Console())
        log.info("wrote curve.json, curve.csv, curve.png, details.png and heads/ in %s", run_dir)
    outcome["curve"] = done.curve
    return done


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    run = HydraConfig.get()

    def work() -> None:
        given = any(
            o.startswith(("hydra.run.dir=", "hydra.sweep.dir=", "hydra.sweep.subdir=")) for o in run.overrides.hydra
        )
        check(
            cfg.ckpt_path != "last" or given,
            "ckpt_path=last: goes on in hydra.run.dir, which is a new folder unless it is given; give hydra.run.dir=FOLDER",
        )
        cli.keep_hydra_files(cfg)
        spread(cfg, Path(run.runtime.output_dir))

    cli.job(work)


def spread(cfg: DictConfig, run_dir: Path) -> None:
    """`train` in every process of the run."""
    checks.check_config(cfg)  # what is wrong is said once, before there are several
    processes.spread(train, cfg, run_dir)


if __name__ == "__main__":
    config.register()
    sys.exit(cli.one_line_errors(cli.hydra_command(main)))

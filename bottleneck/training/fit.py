"""Lightning's trainer for a run, and `fit` with its errors in the user's words."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from bottleneck.config import checks
from bottleneck.config.schema import TrainConfig, TrainerConfig
from bottleneck.core.errors import LostPeers, UserError
from bottleneck.training import checkpoint, cluster, lightning_signals, processes, zero2
from bottleneck.training.lost_peers import lost_peers
from bottleneck.training.module import HeadSweep, ValidateEvery
from bottleneck.training.out_of_memory import out_of_memory
from bottleneck.training.progress import TokenProgress
from bottleneck.training.signals import Flag, StopOnSignal


def device_type(c: TrainConfig) -> str:
    """`cuda` or `cpu`: where the run computes."""
    return "cuda" if _accelerator(c.trainer) == "gpu" else "cpu"


def check_device(c: TrainConfig) -> None:
    """Raises UserError if the run's device is missing on this machine or does not support the run's settings."""
    checks.check_device(c, device_type(c), gpus=torch.cuda.device_count())


def build_trainer(c: TrainConfig, run_dir: Path, *, flag: Flag, loggers: list[Any]) -> pl.Trainer:
    """The trainer of one run. Raises UserError where Lightning refuses devices or strategy."""
    t = c.trainer
    torch.set_num_threads(t.threads or cluster.threads(t.devices))
    try:
        trainer = pl.Trainer(
            accelerator=_accelerator(t),
            devices=t.devices,
            num_nodes=t.num_nodes,
            strategy=_strategy(t),
            max_steps=checks.total_steps(c),
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=loggers or False,
            callbacks=_callbacks(t, run_dir, flag),
            # without an explicit environment Lightning detects one, and would take Slurm's allocation for srun
            plugins=[checkpoint.AtomicCheckpointIO(), cluster.cluster_environment() or LightningEnvironment()],
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


def _accelerator(t: TrainerConfig) -> str:
    return ("gpu" if torch.cuda.is_available() else "cpu") if t.accelerator == "auto" else t.accelerator


def _strategy(t: TrainerConfig) -> Any:
    if t.strategy != "ddp" and t.devices * t.num_nodes == 1:
        return t.strategy
    kind = zero2.Zero2Strategy if t.shard == "zero2" else DDPStrategy
    return kind(gradient_as_bucket_view=True, timeout=datetime.timedelta(minutes=t.timeout_minutes))


def _callbacks(t: TrainerConfig, run_dir: Path, flag: Flag) -> list[pl.Callback]:
    """Callbacks in the order in which they run: a step is validated, then saved, and only then may the run stop."""
    callbacks: list[pl.Callback] = [TokenProgress()] if t.progress else []
    callbacks += [processes.SendBfloat16()] if t.reduce_dtype == "bfloat16" and t.devices * t.num_nodes > 1 else []
    callbacks += [ValidateEvery(t.val_every)] if t.val_every else []
    saves = [checkpoint.SaveLast(run_dir, t.checkpoint_every)] if t.checkpoint_every is not None else []
    return [*callbacks, *saves, StopOnSignal(flag, saves[0].save if saves else None)]


def fit(trainer: pl.Trainer, module: HeadSweep, *, c: TrainConfig, data: Any, resume: Optional[Path]) -> None:
    """Train to the last step. Raises UserError if memory is exhausted, LostPeers if other processes are gone."""
    t = c.trainer
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except (RuntimeError, MemoryError, OSError) as error:
        if out_of_memory(error):
            where = "GPU" if trainer.strategy.root_device.type == "cuda" else "CPU"
            hint = f"out of {where} memory; give a smaller one, fewer heads, or trainer=fsdp"
            raise UserError(f"trainer.micro_batch_size={t.micro_batch_size}: {hint}: {error}") from error
        if trainer.world_size > 1 and isinstance(error, RuntimeError) and lost_peers(error):
            who = f"process {trainer.global_rank} of {trainer.world_size}"
            waited = f"had no answer for {t.timeout_minutes} minutes (trainer.timeout_minutes)"
            raise LostPeers(f"{who} lost the others, or {waited}: {error}") from error
        raise
    except SystemExit:
        if trainer.interrupted:  # Lightning exits on Ctrl-C
            raise KeyboardInterrupt from None
        raise

"""The processes of a run: one, several on this machine, or as many as a launcher started.

Launchers are torchrun, srun and every other cluster environment that Lightning knows. They have already started all
processes, and each process calls this module.
"""

from __future__ import annotations

import atexit
import copy
import gc
import os
import sys
from pathlib import Path
from typing import Any, Callable

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from bottleneck.core.errors import UserError, check
from bottleneck.training.cluster import check_world, cluster_environment, forget_leftovers
from bottleneck.training.elastic import start_workers


def run_in_all(work: Callable[[DictConfig, Path], Any], cfg: DictConfig, run_dir: Path) -> Any:
    """Call `work(cfg, run_dir)` in every process of the run. Returns its result if it ran in this process, else None.

    Args: work: importable by its name.
    Raises: UserError if a process raised one or was killed; Stopped if the run received a signal to stop.
    """
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    forget_leftovers()
    check_world(devices, nodes)
    if devices * nodes == 1 or cluster_environment() is not None:
        try:
            return work(cfg, run_dir)
        finally:
            forget_gpu()
    check(
        nodes == 1,
        f"trainer.num_nodes={nodes}: srun or torchrun starts processes on several machines, see docs/clusters.md",
    )
    tasks = os.environ.get("SUBMITIT_LOCAL_NTASKS", "1")
    check(
        tasks == "1",
        f"hydra.launcher.tasks_per_node={tasks}: give 1; the {devices} processes are started by the run itself",
    )
    settings = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    cfg = copy.deepcopy(cfg)
    OmegaConf.resolve(cfg)
    start_workers(work, cfg, run_dir, settings, devices)
    return None


class SendBfloat16(pl.Callback):
    """Sends gradients between DDP's processes in 16 bits. Lightning's option for it has no effect on a CPU."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # torch's registration by name requires NCCL, although gloo also sums bfloat16
        wrapped: Any = trainer.strategy.model
        wrapped.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))


def leave_at_once(error: BaseException) -> None:
    """After a failure in this process, make it exit without NCCL's collective shutdown, which would block.

    At exit, Lightning lets NCCL wait for the other processes, while they wait for this one. The error would be reported
    only after their time-out.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1

        def end() -> None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        atexit.register(end)  # registered last, so called first


def forget_gpu() -> None:
    """Free the GPU memory of a run in this process. The next job of a multirun may use the GPU from other processes."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()

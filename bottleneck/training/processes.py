"""The processes of a run: one; several on this machine, started here by torch's elastic agent; or started outside.

Outside means torchrun, srun, or whatever else Lightning knows a cluster by: then each process is there already and runs its
part. Here, the process that read the command line stays an onlooker: it never joins a process group and sets no variable,
so the jobs of a multirun know nothing of each other, whatever number of processes each has.
"""

from __future__ import annotations

import atexit
import copy
import gc
import logging
import logging.config
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Optional

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities import rank_zero_only
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from bottleneck.config.schema import register
from bottleneck.core.environment import cores
from bottleneck.core.errors import LostPeers, Stopped, UserError, check, go_on

log = logging.getLogger(__name__)


def environment() -> Optional[ClusterEnvironment]:
    """The cluster environment this process was started in, or None where it was started by hand."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is an srun and it is not used
        slurm = SLURMEnvironment.detect()
    if slurm and ("SLURM_STEP_ID" in os.environ or int(os.environ["SLURM_NTASKS"]) > 1):
        return SLURMEnvironment(
            auto_requeue=False
        )  # bottleneck.stopping requeues: Lightning would save in the middle of a step
    for kind in (LSFEnvironment, MPIEnvironment):
        if kind.detect():
            return kind()
    return LightningEnvironment() if "LOCAL_RANK" in os.environ else None


class SendBfloat16(pl.Callback):
    """Gradients go between DDP's processes in 16 bits. Lightning's own way to say so is passed over on a CPU."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # torch would allow its hook by its name with NCCL only; gloo sums bfloat16 as well
        trainer.strategy.model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))


def global_rank() -> int:
    """This process's number among those of the run, from 0."""
    found = environment()
    return found.global_rank() if found is not None else 0


def check_world(devices: int, nodes: int) -> None:
    """Refuse a run whose processes, started outside, are not as many as configured: they would train the wrong batches."""
    found = environment()
    if found is not None and not isinstance(found, LightningEnvironment):
        world = found.world_size()
        check(
            world == devices * nodes,
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: {world} processes were started ({type(found).__name__}); give numbers whose product that is",
        )


def lost_peers(error: RuntimeError) -> bool:
    """Whether an error says that another process of the group is gone or silent (gloo and NCCL have words of their own)."""
    if isinstance(
        error,
        (torch.distributed.DistBackendError, torch.distributed.DistNetworkError, torch.distributed.DistStoreError),
    ):
        return True
    return any(
        words in str(error).lower()
        for words in ("closed by peer", "reset by peer", "timed out", "timeout", "gloo", "nccl")
    )


def leave_at_once(error: BaseException) -> None:
    """After a failure that may be this process's alone: end without the farewell that Lightning has NCCL say at exit. It waits
    for the others, which wait for this one; nobody would hear what went wrong before their time-out.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1

        def end() -> None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        atexit.register(end)  # the last to be registered is the first to be called


def forget_gpu() -> None:
    """Give back what a run in this process held on a GPU: the next job of a multirun may run in processes beside this one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()


def threads(devices: int) -> int:
    """CPU threads for this process: its share of the cores it may use, or what Slurm gave each task."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores(), int(given)) if given.isdigit() and "SLURM_STEP_ID" in os.environ else max(1, cores() // devices)


def spread(work: Callable[[DictConfig, Path], Any], cfg: DictConfig, run_dir: Path) -> None:
    """Call `work(cfg, run_dir)` in every process of the run: here, where there is one or all were started outside, else in new ones.

    Args: work: importable by its name.
    Raises: UserError for what a process raised as one, and where a process was killed; Stopped where the run was asked to stop.
    """
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if devices * nodes == 1 or environment() is not None:
        try:
            work(cfg, run_dir)
        finally:
            forget_gpu()
        return
    check(
        nodes == 1,
        f"trainer.num_nodes={nodes}: processes on several machines are started by srun or torchrun, see launch/README.md",
    )
    check(
        "SUBMITIT_LOCAL_NTASKS" not in os.environ or os.environ["SUBMITIT_LOCAL_NTASKS"] == "1",
        f"hydra.launcher.tasks_per_node={os.environ.get('SUBMITIT_LOCAL_NTASKS')}: give 1; the {devices} processes are started by the run itself",
    )
    settings = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    cfg = copy.deepcopy(cfg)
    OmegaConf.resolve(cfg)
    _elastic(work, cfg, run_dir, settings, devices)


def _elastic(work: Callable, cfg: DictConfig, run_dir: Path, settings: Any, devices: int) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Python's tracker of shared resources, a process of its own, tells of semaphores that a killed process could not give back
    quiet = "ignore:resource_tracker:UserWarning"
    if quiet not in os.environ.get("PYTHONWARNINGS", ""):
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    os.environ.setdefault(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60"
    )  # seconds for a checkpoint when the run is asked to stop
    for name in list(logging.root.manager.loggerDict):  # each of torch's has a level of its own
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # we say ourselves, in one line, what went wrong
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="bottleneck-") as logs:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=f"{os.getpid()}-{began:.0f}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.2,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        # the agent's own handlers end the processes; Slurm's warnings reach the processes themselves and are nothing to this one
        watched = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
        handlers = {s: signal.getsignal(s) for s in watched}
        for warning in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(warning, lambda *_: None)
        try:
            ends = elastic_launch(launch, _worker)(work, cfg, str(run_dir), settings)
        except SignalException as error:
            raise Stopped(error.sigval) from None
        except ChildFailedError as error:
            _explain(error, devices, cfg.trainer.timeout_minutes, run_dir)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    stopped = [tuple(e) for e in ends.values() if e is not None]
    if stopped:
        raise Stopped(*stopped[0])


def _explain(error: Any, devices: int, minutes: float, run_dir: Path) -> None:
    """One line from the process that failed first; those that fell with it are left out."""

    def told(failure: Any) -> tuple[str, str]:
        """Its exception, as Kind: message, and the trace."""
        message = failure.message
        return (
            (message["message"], message.get("extraInfo", {}).get("py_callstack", ""))
            if isinstance(message, dict)
            else (str(message), "")
        )

    def order(item: tuple[int, Any]) -> tuple:
        text = told(item[1])[0]
        # NCCL's watchdog ends a process by SIGABRT when the others give no answer
        fell_with_it = item[1].exitcode in (-signal.SIGTERM, -signal.SIGABRT) or text.startswith("LostPeers: ")
        return fell_with_it, item[1].exitcode >= 0, not text.startswith("UserError: "), item[1].timestamp

    rank, first = min(error.failures.items(), key=order)
    who = f"process {rank} of {devices} (pid {first.pid})"
    text, trace = told(first)
    for kind in (UserError, LostPeers):
        if text.startswith(f"{kind.__name__}: "):
            raise kind(text.removeprefix(f"{kind.__name__}: ")) from None
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        if first.exitcode == -signal.SIGABRT:
            raise LostPeers(
                f"{who} was ended by SIGABRT: it lost the others, or had no answer for {minutes:g} minutes (trainer.timeout_minutes); {go_on(run_dir)}"
            ) from None
        raise UserError(f"{who} was killed by {name}, the others were stopped; {go_on(run_dir)}") from None
    raise RuntimeError(f"{who} failed: {text}\n{trace}") from None


def _worker(work: Callable, cfg: DictConfig, run_dir: str, settings: Any) -> Optional[tuple[int, Optional[int]]]:
    """One process of several. Returns signal and step where it was stopped by one."""
    onlooker = os.getppid()
    rank_zero_only.rank = int(os.environ["RANK"])  # Lightning looked for it when it was imported, before there was one
    register()
    if rank_zero_only.rank == 0:
        logging.config.dictConfig(settings)
    else:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        work(cfg, Path(run_dir))
    except Stopped as stop:
        return stop.signal, stop.step
    finally:
        if (
            os.getppid() != onlooker
        ):  # it was killed: nobody will take this process's result, for which it would wait for ever
            os._exit(1)
    return None

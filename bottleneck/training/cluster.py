"""Which launcher started this process, and its place among the others: torchrun, srun, LSF, MPI, or none of them.

Lightning's own detection is not used for Slurm. It takes every process of an allocation for one of srun's, except in
jobs named bash or interactive, and it refuses SLURM_NTASKS without SLURM_NTASKS_PER_NODE. What counts here is the step
of srun.
"""

from __future__ import annotations

import logging
import os
from typing import Optional

from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities import rank_zero_only

from bottleneck.core.default_folder import slurm_step
from bottleneck.core.environment import cores
from bottleneck.core.errors import check

log = logging.getLogger(__name__)
# what a process needs that was started by hand among others; LOCAL_RANK alone is left over from something else
BY_HAND = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class SrunEnvironment(SLURMEnvironment):
    """The tasks of one srun step.

    Requeueing is left to `bottleneck.training.signals`: Lightning would save amid a step.
    """

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_used() -> None:
        """Nothing to validate: `cluster_environment` has seen the step."""

    @staticmethod
    def _validate_srun_variables() -> None:
        """SLURM_NTASKS without SLURM_NTASKS_PER_NODE is fine."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Nothing to validate: `check_world` has compared the numbers."""

    def world_size(self) -> int:
        return slurm_step_tasks()

    @property
    def main_address(self) -> str:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        return os.environ.setdefault("MASTER_ADDR", self.resolve_root_node_address(nodes))

    @property
    def main_port(self) -> int:
        """The same for all tasks of a step, another one for other steps of the job."""
        step = int(os.environ["SLURM_JOB_ID"]) * 16 + (slurm_step() or 0)
        return int(os.environ.setdefault("MASTER_PORT", str(12_000 + step % 20_000)))


def slurm_step_tasks() -> int:
    """Number of tasks in this process's srun step; 0 outside of a step."""
    if slurm_step() is None or "SLURM_PROCID" not in os.environ:
        return 0
    given = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
    return int(given) if given.isdigit() else 1


def cluster_environment() -> Optional[ClusterEnvironment]:
    """How this process was started among others, or None where it was started alone.

    A step of one task counts as started alone, such as a shell by `srun --pty`: the run may then start processes
    itself.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if slurm_step_tasks() > 1:
        return SrunEnvironment()
    for kind in (LSFEnvironment, MPIEnvironment):
        if kind.detect():
            return kind()
    return LightningEnvironment() if all(name in os.environ for name in BY_HAND) else None


def forget_leftovers() -> None:
    """In a process that was started alone, drop a LOCAL_RANK that its shell still has from another program.

    Lightning reads it when it is imported, and would take this process for one that writes nothing.
    """
    if cluster_environment() is None:
        left = os.environ.pop("LOCAL_RANK", None)
        if left is not None:
            log.info("LOCAL_RANK=%s: ignored, since %s are not all set", left, ", ".join(BY_HAND))
        set_lightning_rank(0)


def set_lightning_rank(rank: int) -> None:
    """Tell Lightning the number of this process; it reads the attribute wherever only process 0 acts."""
    vars(rank_zero_only)["rank"] = rank  # its types do not know the attribute


def global_rank() -> int:
    """This process's number among those of the run, from 0."""
    found = cluster_environment()
    return found.global_rank() if found is not None else 0


def check_world(devices: int, nodes: int) -> None:
    """Raises UserError where the processes that were started are not as many as configured, or were not started at all.

    They would train the wrong batches, or wait for each other until the time-out.
    """
    found = cluster_environment()
    wanted = f"trainer.devices={devices}, trainer.num_nodes={nodes}"
    if found is not None and not isinstance(found, LightningEnvironment):
        world, kind = found.world_size(), type(found).__name__
        check(
            world == devices * nodes,
            f"{wanted}: {world} processes were started ({kind}); the product of both must equal it",
        )
    if found is None and devices * nodes > 1 and "SLURM_JOB_ID" in os.environ and not slurm_step_tasks():
        tasks = os.environ.get("SLURM_NTASKS", "1")
        several = tasks not in ("", "1") or os.environ.get("SLURM_JOB_NUM_NODES", "1") not in ("", "1")
        hint = "start with srun (srun python train.py …), as launch/slurm.sbatch does"
        check(not several, f"{wanted}: this Slurm job has {tasks} tasks, and this process is none of them; {hint}")


def threads(devices: int) -> int:
    """CPU threads for this process: what Slurm gave each task, or its share of the cores it may use."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and slurm_step_tasks() > 1:
        return min(cores(), int(given))
    return max(1, cores() // devices)

"""Which launcher started this process (torchrun, srun, LSF, MPI or none), and the process's number in the group.

Lightning's detection of Slurm is not used. It treats every process of an allocation as started by srun, except in jobs
named bash or interactive, and it refuses SLURM_NTASKS without SLURM_NTASKS_PER_NODE. This module asks whether the
process belongs to an srun step.
"""

from __future__ import annotations

import os
import sys
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

# variables of processes that the user starts one by one; LOCAL_RANK alone is left over from another program
BY_HAND = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class SrunEnvironment(SLURMEnvironment):
    """The tasks of one srun step.

    Requeueing is done by `bottleneck.training.signals`, because Lightning would save in the middle of a step.
    """

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_used() -> None:
        """Do nothing: `cluster_environment` has already found the step."""

    @staticmethod
    def _validate_srun_variables() -> None:
        """Do nothing, since SLURM_NTASKS without SLURM_NTASKS_PER_NODE is allowed here."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Do nothing: `check_world` has already compared the numbers."""

    def world_size(self) -> int:
        return slurm_step_tasks()

    @property
    def main_address(self) -> str:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        return os.environ.setdefault("MASTER_ADDR", self.resolve_root_node_address(nodes))

    @property
    def main_port(self) -> int:
        """The rendezvous port: equal for all tasks of a step, different for other steps of the job."""
        step = int(os.environ["SLURM_JOB_ID"]) * 16 + (slurm_step() or 0)
        return int(os.environ.setdefault("MASTER_PORT", str(12_000 + step % 20_000)))


def slurm_step_tasks() -> int:
    """Number of tasks in this process's srun step; 0 outside of a step."""
    if slurm_step() is None or "SLURM_PROCID" not in os.environ:
        return 0
    given = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
    return int(given) if given.isdigit() else 1


def cluster_environment() -> Optional[ClusterEnvironment]:
    """The environment of the launcher that started this process, or None if it was started alone.

    A step with a single task, such as a shell from `srun --pty`, counts as started alone: the run may then start more
    processes itself.
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
    """In a process that was started alone, remove a LOCAL_RANK that its shell inherited from another program.

    Lightning reads it on import and would take this process for one that writes no files.
    """
    if cluster_environment() is None:
        left = os.environ.pop("LOCAL_RANK", None)
        if left is not None:
            # not to the log: its file is in the run's folder, and the run may still be refused
            print(f"LOCAL_RANK={left}: ignored, since {', '.join(BY_HAND)} are not all set", file=sys.stderr)
        set_lightning_rank(0)


def set_lightning_rank(rank: int) -> None:
    """Set this process's number in Lightning, which reads it wherever only process 0 acts."""
    vars(rank_zero_only)["rank"] = rank  # its types do not know the attribute


def global_rank() -> int:
    """This process's number among those of the run, from 0."""
    found = cluster_environment()
    return found.global_rank() if found is not None else 0


def check_world(devices: int, nodes: int) -> None:
    """Raises UserError if the number of running processes differs from the configured one.

    They would train on the wrong batches, or wait for each other until the time-out.
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
    """CPU threads for this process: Slurm's CPUs per task, or its share of the cores that it may use."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and slurm_step_tasks() > 1:
        return min(cores(), int(given))
    return max(1, cores() // devices)

"""The name of a run's default folder: unique to the run, equal in all its processes and in a requeued Slurm job."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import sys
import time
from pathlib import Path

import psutil

# from here Slurm numbers the batch script and the interactive shell, which are no steps of srun
FIRST_RESERVED_STEP = 0xFFFFFFF0


def slurm_step() -> int | None:
    """The number of the srun step that this process belongs to, or None outside of one."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return int(step) if step.isdigit() and int(step) < FIRST_RESERVED_STEP else None


def default_folder(base: str = "outputs") -> str:
    """Name of a run's default folder below `base`.

    Started by hand, it is the time and six random digits, so that two runs of one second differ. Processes that were
    started together share what their launcher gave them: torchrun's run id, or else the agent that started them;
    Slurm's job and step, and the command line. A requeued Slurm job finds the folder of its first try, also where its
    steps are numbered otherwise this time.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id not in (None, "none"):
        return f"torchrun-{run_id}"
    if run_id == "none":  # torchrun without --rdzv-id: its workers share their parent
        agent = psutil.Process(os.getppid())
        return time.strftime("%Y-%m-%d/%H-%M-%S", time.localtime(agent.create_time())) + f"-{agent.pid}"
    if os.environ.get("SLURM_JOB_ID"):
        return _slurm_folder(base)
    if any(name in os.environ for name in ("LOCAL_RANK", "LSB_JOBID", "OMPI_COMM_WORLD_RANK")):
        return _started()  # other launchers give their processes nothing in common but the time
    return f"{_started()}-{_digits()}"


@functools.cache
def _started() -> str:
    """Once per process: Hydra resolves a folder's name several times."""
    return time.strftime("%Y-%m-%d/%H-%M-%S")


@functools.cache
def _digits() -> str:
    return secrets.token_hex(3)


def _slurm_folder(base: str) -> str:
    job, step = os.environ["SLURM_JOB_ID"], slurm_step()
    # a job may hold several runs, whose command lines differ. A second try may add the keys that are left out here
    added = ("ckpt_path=", "hydra.run.dir=", "hydra.sweep.dir=")
    words = [w for w in sys.argv[1:] if not w.lstrip("+").startswith(added)]
    digest = hashlib.sha256("\0".join(words).encode(errors="surrogateescape")).hexdigest()[:6]
    name = f"slurm-{job}-{digest}" if step is None else f"slurm-{job}-{digest}-step{step}"
    again = int(os.environ.get("SLURM_RESTART_COUNT", 0) or 0) > 0
    if again and not (Path(base) / name).exists():
        # parallel steps are numbered in the order in which they start, which may differ after a requeue
        earlier = sorted(p.name for p in Path(base).glob(f"slurm-{job}-{digest}-step*"))
        if len(earlier) == 1:
            return earlier[0]
    return name

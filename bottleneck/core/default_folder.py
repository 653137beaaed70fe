"""The name of a run's default folder: unique to the run, equal in all of its processes, found again by a requeued job."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import sys
import time
from pathlib import Path

import psutil

# Slurm numbers the batch script, the extern step and the interactive step from the top; they are no steps of srun
FIRST_RESERVED_STEP = 0xFFFFFFF0


def slurm_step() -> int | None:
    """The number of the srun step that this process belongs to, or None outside of one."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return int(step) if step.isdigit() and int(step) < FIRST_RESERVED_STEP else None


def default_folder(base: str = "outputs") -> str:
    """Name of a run's default folder below `base`.

    Started by hand it is the time and six random digits, so that two runs of one second differ. Processes that were started
    together share what their launcher gave them: torchrun's run id, or else the agent that started them; Slurm's job, step and
    command line. A requeued Slurm job finds the folder of its first try, also where steps got other numbers this time.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id not in (None, "none"):
        return f"torchrun-{run_id}"
    if run_id == "none":  # torchrun without --rdzv-id: its workers share their parent
        agent = psutil.Process(os.getppid())
        return time.strftime("%Y-%m-%d/%H-%M-%S", time.localtime(agent.create_time())) + f"-{agent.pid}"
    if os.environ.get("SLURM_JOB_ID"):
        return _slurm_folder(base)
    if "LOCAL_RANK" in os.environ or "LSB_JOBID" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
        return time.strftime("%Y-%m-%d/%H-%M-%S")  # other launchers name nothing that processes share but the time
    return _by_time()


@functools.cache
def _by_time() -> str:
    """Once per process: Hydra resolves a folder's name several times."""
    return f"{time.strftime('%Y-%m-%d/%H-%M-%S')}-{secrets.token_hex(3)}"


def _slurm_folder(base: str) -> str:
    job, step = os.environ["SLURM_JOB_ID"], slurm_step()
    # a job may hold several runs: they differ in their command lines. What a second try of the same command may add is left out
    words = [
        w for w in sys.argv[1:] if not w.lstrip("+").startswith(("ckpt_path=", "hydra.run.dir=", "hydra.sweep.dir="))
    ]
    digest = hashlib.sha256("\0".join(words).encode(errors="surrogateescape")).hexdigest()[:6]
    name = f"slurm-{job}-{digest}" if step is None else f"slurm-{job}-{digest}-step{step}"
    again = int(os.environ.get("SLURM_RESTART_COUNT", 0) or 0) > 0
    if again and not (Path(base) / name).exists():
        # parallel steps are numbered by who comes first, which a requeued job may decide otherwise
        earlier = sorted(p.name for p in Path(base).glob(f"slurm-{job}-{digest}-step*"))
        if len(earlier) == 1:
            return earlier[0]
    return name

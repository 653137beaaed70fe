"""Settings that must be made before torch is imported."""

from __future__ import annotations

import os
import signal


def prepare_process() -> None:
    """Set the environment variables that torch reads on import, and block Slurm's warning before a time limit.

    Waiting OpenMP threads sleep instead of spinning, which makes a run 2 to 3 times faster beside one other busy
    process on two cores (docs/log.md). Slurm's signal would kill the process during imports; `training.session`
    handles it later.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "SLURM_JOB_ID" in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})

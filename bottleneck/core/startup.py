"""What a command does before torch is imported."""

from __future__ import annotations

import os
import signal


def prepare_process() -> None:
    """Set what torch reads when it is imported, and hold back Slurm's warning ahead of a time limit.

    OpenMP threads that wait sleep instead of spinning: beside one other busy process on two cores, a run is 2 to 3
    times faster (docs/log.md). Slurm's signal would end the process while it imports; `training.session` handles it.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "SLURM_JOB_ID" in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})

"""Resources of a run in its process: the folder's lock, signal handlers, requeueing on Slurm, open loggers."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any, Iterator, Optional

from bottleneck.core.errors import Stopped, UserError
from bottleneck.core.held_log import drop_held_logs
from bottleneck.training import cluster, library_warnings, processes, run_folder, signals, tracking


class Session(contextlib.ExitStack):
    """Resources of one run in this process.

    Attributes:
        flag: the signal that this process has received.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flag = signals.Flag()
        self.callback(self.flag.leave)
        self._result: Optional[dict[str, Any]] = None

    def listen_to_slurm(self) -> None:
        """Start to handle Slurm's warning before a time limit, which `core.startup` has blocked."""
        if "SLURM_JOB_ID" in os.environ:
            self.flag.listen(signals.REQUEUE)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, set(signals.REQUEUE))

    def close_at_end(self, loggers: list[Any], *, in_sweep: bool) -> None:
        """Close loggers when the run ends, and give them its curve if it has one."""
        self.callback(lambda: tracking.close(loggers, self._result, in_sweep))

    def finish(self, curve: dict[str, Any]) -> None:
        """Keep the run's result for the loggers that are closed at the end."""
        self._result = curve


@contextlib.contextmanager
def open_session(run_dir: Path) -> Iterator[Session]:
    """Lock the run's folder and clean up at the end. On Slurm, requeue a run that was stopped before a time limit."""
    library_warnings.hide()
    try:
        with run_folder.lock_folder(run_dir, cluster.global_rank()), Session() as session:
            yield session
    except Stopped as stop:
        if stop.signal in signals.REQUEUE and "SLURM_JOB_ID" in os.environ:
            signals.requeue()
        raise
    except BaseException as error:
        if isinstance(error, UserError):
            drop_held_logs()
        processes.leave_at_once(error)
        raise

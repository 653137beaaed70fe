"""Several processes on this machine, started and watched by torch's elastic agent.

The process that read the command line becomes the agent. It never joins a process group and never sets a group's
variables, so the jobs of a multirun are independent, whatever number of processes each has. This module works around
three faults of torch's agent, each shown by a test in tests/training/test_processes.py or test_workers.py:

- After a signal, a worker waits for the agent to collect its result. An agent that received the signal too never does,
  and kills the worker only after TORCH_ELASTIC_SHUTDOWN_TIMEOUT. Here the agent writes a file, on which workers exit.
- If the agent is killed, its workers keep training, or wait forever during start-up. Here workers watch their parent.
- Ctrl-C while workers import torch prints a traceback from each worker. Here they start with signals blocked.
"""

from __future__ import annotations

import contextlib
import logging
import logging.config
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn, Optional

from omegaconf import DictConfig

from bottleneck.config.schema import register
from bottleneck.core.errors import LostPeers, Stopped, UserError, how_to_resume
from bottleneck.training.cluster import set_lightning_rank

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # Slurm's, ahead of a time limit
SECONDS_TO_SAVE = "60"  # that a worker has for its step and its checkpoint before the agent kills it
WATCH_SECONDS = 0.2
STOPPING = "stopping"  # file in the workers' folder: the agent was asked to stop
WORKERS = ".workers-"  # prefix of that folder, in the run's folder

Work = Callable[[DictConfig, Path], Any]


def start_workers(work: Work, cfg: DictConfig, run_dir: Path, settings: Any, devices: int) -> None:
    """Call `work(cfg, run_dir)` in `devices` new processes and wait for them.

    Args:
        work: importable by its name.
        settings: Python's logging settings for the first process.
    Raises: UserError if a process raised one or was killed; Stopped if the run received a signal to stop.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quieten_torch()
    with _workers_folder(run_dir) as folder, _agent_signals(folder):
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=f"{os.getpid()}-{time.time():.0f}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=WATCH_SECONDS,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
            signals_to_handle="SIGQUIT",  # the others are handled by _agent_signals, from before the agent starts
        )
        try:
            ends = elastic_launch(launch, _worker)(work, cfg, str(run_dir), settings, os.getpid(), str(folder))
        except SignalException as error:
            raise Stopped(error.sigval) from None
        except ChildFailedError as error:
            if not (folder / STOPPING).exists():
                raise_first_failure(error, devices, minutes=cfg.trainer.timeout_minutes, run_dir=run_dir)
            raise Stopped(int((folder / STOPPING).read_text())) from None
    stopped = [tuple(e) for e in ends.values() if e is not None]
    if stopped:
        raise Stopped(*stopped[0])


def _quieten_torch() -> None:
    # Python's resource tracker, a separate process, warns about semaphores that a killed process did not release
    quiet = "ignore:resource_tracker:UserWarning"
    if quiet not in os.environ.get("PYTHONWARNINGS", ""):
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    for name in list(logging.root.manager.loggerDict):  # each of torch's loggers has its own level
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # `raise_first_failure` reports the error in one line


@contextlib.contextmanager
def _workers_folder(run_dir: Path) -> Iterator[Path]:
    """A folder for the agent's files inside the run's folder. Removes the folders of killed agents."""
    for stale in run_dir.glob(f"{WORKERS}*"):
        pid = stale.name.removeprefix(WORKERS).split("-")[0]
        if not pid.isdigit() or not Path(f"/proc/{pid}").exists():
            shutil.rmtree(stale, ignore_errors=True)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{WORKERS}{os.getpid()}-", dir=run_dir))
    except OSError as error:
        raise UserError(f"hydra.run.dir={run_dir}: cannot be written: {error.strerror or error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _agent_signals(folder: Path) -> Iterator[None]:
    """Let a signal end the agent, and start workers with signals blocked.

    Workers inherit the blocked signals of the main thread. A second thread keeps them unblocked and so receives them;
    Python runs the handlers in the main thread.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread only
        return
    main = os.getpid()

    def end(number: int, frame: Any) -> None:
        mark = folder / STOPPING
        if os.getpid() != main or mark.exists():
            return  # a forked worker, or a second signal: workers are ending already
        mark.write_text(str(int(number)))
        for child in multiprocessing.active_children():
            if not (folder / f"begun-{child.pid}").exists():  # still importing, with signals blocked
                child.kill()
        raise SignalException(f"signal {number}", sigval=signal.Signals(number))

    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    handlers = {s: signal.getsignal(s) for s in (*ENDING, *WARNINGS)}
    for number in ENDING[:-1]:
        if not (number == signal.SIGHUP and handlers[number] == signal.SIG_IGN):  # nohup ignores SIGHUP: keep that
            signal.signal(number, end)
    for number in WARNINGS:  # the workers receive them as well
        signal.signal(number, lambda *_: None)
    resource_tracker.ensure_running()  # started later, it would unblock SIGINT and SIGTERM for the workers
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, *WARNINGS})
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()


def raise_first_failure(error: Any, devices: int, *, minutes: float, run_dir: Path) -> NoReturn:
    """Raise a one-line error about the process that failed first, not about those that failed as a consequence."""

    def described(failure: Any) -> tuple[str, str]:
        """A failure's exception as "Kind: message", and its traceback."""
        message = failure.message
        if not isinstance(message, dict):
            return str(message), ""
        return message["message"], message.get("extraInfo", {}).get("py_callstack", "")

    def order(item: tuple[int, Any]) -> tuple:
        text = described(item[1])[0]
        # NCCL's watchdog aborts a process whose peers do not answer
        consequence = item[1].exitcode in (-signal.SIGTERM, -signal.SIGABRT) or text.startswith("LostPeers: ")
        return consequence, item[1].exitcode >= 0, not text.startswith("UserError: "), item[1].timestamp

    rank, first = min(error.failures.items(), key=order)
    who = f"process {rank} of {devices} (pid {first.pid})"
    text, trace = described(first)
    for kind in (UserError, LostPeers):
        if text.startswith(f"{kind.__name__}: "):
            raise kind(text.removeprefix(f"{kind.__name__}: ")) from None
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        if first.exitcode == -signal.SIGABRT:
            waited = f"had no answer for {minutes:g} minutes (trainer.timeout_minutes)"
            raise LostPeers(
                f"{who} was ended by SIGABRT: it lost the others, or {waited}; {how_to_resume(run_dir)}"
            ) from None
        raise UserError(f"{who} was killed by {name}, the others were stopped; {how_to_resume(run_dir)}") from None
    raise RuntimeError(f"{who} failed: {text}\n{trace}") from None


class _ParentWatch:
    """Ends this worker if its agent is gone, or if its work is done but a stopping agent will not collect it."""

    def __init__(self, agent: int, folder: Path):
        self.agent, self.folder = agent, folder
        self.over = False
        self._check_parent()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._check_parent()
            if self.over and (self.folder / STOPPING).exists():
                _exit_at_once(0)
            time.sleep(WATCH_SECONDS)

    def _check_parent(self) -> None:
        if os.getppid() != self.agent:
            for _ in range(20):  # the other workers remove it too, and may just have written into it
                shutil.rmtree(self.folder, ignore_errors=True)
                if not self.folder.exists():
                    break
                time.sleep(0.05)
            os._exit(1)


def _exit_at_once(code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _worker(
    work: Work, cfg: DictConfig, run_dir: str, settings: Any, agent: int, folder: str
) -> Optional[tuple[int, Optional[int]]]:
    """One process of several. Returns signal and step if a signal stopped it."""
    watch = _ParentWatch(agent, Path(folder))
    try:
        _listen(Path(folder))
        rank = int(os.environ["RANK"])
        set_lightning_rank(rank)  # Lightning looked for it when it was imported, before it was set
        register()
        if rank == 0:
            logging.config.dictConfig(settings)
        else:
            logging.basicConfig(level=logging.WARNING, format="%(message)s")
        work(cfg, Path(run_dir))
    except Stopped as stop:
        watch.over = True
        return stop.signal, stop.step
    except KeyboardInterrupt:
        watch.over = True
        return signal.SIGINT, None
    finally:  # what is left is the end of the process, in which an exception would only be printed
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return None


def _listen(folder: Path) -> None:
    """Unblock the signals that the agent blocked. They end the worker until training installs its handlers."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    for number in ENDING[:-1]:
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, stop)
    (folder / f"begun-{os.getpid()}").touch()
    # on Slurm the run itself unblocks the warnings, when it listens
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ENDING, *(() if "SLURM_JOB_ID" in os.environ else WARNINGS)})

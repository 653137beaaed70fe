"""On a signal, a run finishes its step, saves a checkpoint and exits; on Slurm its job is requeued.

SIGTERM comes from Slurm's preemption and `scontrol requeue` (Slurm requeues the job itself), from torchrun and from
users; SIGHUP from a closed terminal; SIGUSR1 and SIGUSR2 before a time limit (`--signal=USR1@90`, submitit), and then
this module requeues the job. All processes must stop after the same step. Flags are therefore summed over processes,
together with the losses, and each sum is read some steps later, when it is finished, so that no process waits for it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from typing import Any, Callable, Optional

import pytorch_lightning as pl
import torch
from torch import Tensor

from bottleneck.core.errors import Stopped
from bottleneck.training.cluster import global_rank

log = logging.getLogger(__name__)
LAG = 4  # on a GPU a flag's sum is read so many forward passes later: the CPU may run that far ahead
REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGTERM, signal.SIGHUP, *REQUEUE, signal.SIGINT)
KILL_WAIT = 120  # seconds to wait, after scontrol requeue, for Slurm to end this process


class Flag:
    """The signal that this process has received, and whether any process of the run has received one.

    Attributes: number: number of the first signal, 0 before it.
    """

    def __init__(self) -> None:
        self.number, self._since = 0, 0.0
        self._lag = LAG
        self._sums: deque[tuple[Tensor, Optional[torch.cuda.Event]]] = deque()
        self._before: dict[int, Any] = {}

    def listen(self, numbers: tuple[signal.Signals, ...]) -> None:
        """Record these signals instead of acting on them. A second Ctrl-C still interrupts at once.

        If SIGHUP is ignored (nohup), it stays ignored.
        """
        self._install(numbers, self._note)

    def raise_from_now(self, numbers: tuple[signal.Signals, ...]) -> None:
        """End the run at once on these signals: used after the last step, since the rest can be repeated."""

        def stop(number: int, frame: Any) -> None:
            raise Stopped(number)

        self._install(numbers, stop)

    def leave(self, but: tuple[signal.Signals, ...] = ()) -> None:
        """Restore the previous handlers, except those of the signals in `but`."""
        for number in self._before.keys() - set(but):
            signal.signal(number, self._before.pop(number))

    def _install(self, numbers: tuple[signal.Signals, ...], handler: Callable[[int, Any], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only; `StopOnSignal` reports it
        for number in numbers:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before.setdefault(number, signal.signal(number, handler))

    def _note(self, number: int, frame: Any) -> None:
        # one Ctrl-C in a terminal may arrive twice: from the terminal itself and from the agent
        if number == signal.SIGINT and self.number == signal.SIGINT and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._since = number, time.monotonic()

    def send(self, summed: Tensor, passes: int = 1) -> None:
        """Keep the sum over processes of a step's flags, a tensor of one element that may still be in computation.

        Args:
            passes: forward passes of a step, the same on every process and in every step. With `LAG` or more, `agreed`
                waits for the sum of the current step.
        """
        self._lag = LAG // passes
        if not summed.is_cuda:
            self._sums.append((summed.clone(), None))
            return
        host = torch.empty(summed.shape, dtype=summed.dtype, pin_memory=True)
        host.copy_(summed, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sums.append((host, event))

    def agreed(self, last: bool = False) -> bool:
        """Whether some process received a signal; the answer is equal on all processes. Without `send`: this process.

        Args: last: whether this is the last step, so that all sums must be waited for and read.
        """
        if not self._sums:
            return self.number > 0
        if not last and self._sums[-1][1] is not None and len(self._sums) <= self._lag:
            return False
        found = self._pop()
        while last and self._sums:
            found = self._pop() or found
        return found

    def _pop(self) -> bool:
        value, event = self._sums.popleft()
        if event is not None:
            event.synchronize()
        return value.item() > 0


class StopOnSignal(pl.Callback):
    """Raises `Stopped` after the step in which the processes agreed to stop, with a checkpoint on disk.

    Args:
        flag: the flag that the module sends with its losses.
        save: writes the checkpoint of this step; None if the run keeps no checkpoints.
    """

    def __init__(self, flag: Flag, save: Optional[Callable[[pl.Trainer], None]]):
        self.flag, self.save = flag, save

    def on_train_start(self, *_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            log.info("training outside the main thread: a signal ends it without saving a checkpoint first")

    def on_train_batch_start(self, *_: Any) -> None:
        self.flag.listen(SIGNALS)  # from the first step on; before it a signal may end the run at once

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if not self.flag.agreed(last=trainer.global_step >= trainer.max_steps):
            return
        if self.save is not None:
            self.save(trainer)
        number = self.flag.number
        if torch.distributed.is_initialized():  # the signal may have reached one process only
            numbers = [0] * trainer.world_size
            torch.distributed.all_gather_object(numbers, number)
            number = max(numbers)
        raise Stopped(number, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.flag.number:  # received after the last step's sum
            raise Stopped(self.flag.number, trainer.global_step)
        # also requeue the job if its time limit falls into the last validation
        kept = REQUEUE if "SLURM_JOB_ID" in os.environ else ()
        self.flag.raise_from_now(kept)
        self.flag.leave(but=kept)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.flag.leave()


def requeue() -> None:
    """Requeue this Slurm job and wait for Slurm to end this process. Every process calls it, after its checkpoint."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Slurm ends the process with SIGTERM
    if global_rank() == 0:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode:
            log.error("scontrol requeue %s: %s", job, done.stderr.strip())
            return
        log.info("job %s is back in the queue", job)
    time.sleep(KILL_WAIT)

"""Asked to stop by a signal, a run ends at the end of a step, with a checkpoint; on Slurm it goes back into the queue.

SIGTERM comes from Slurm's preemption and `scontrol requeue` (Slurm puts the job back by itself), from torchrun and from
people; SIGUSR1 and SIGUSR2 come ahead of a time limit (`--signal=USR1@90`, submitit): then the job must be put back by us.
Every process stops after the same step: flags travel with the losses that are summed over processes anyway, and are read
some steps later, when that sum is long done, so that nobody waits.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections import deque
from typing import Any, Callable, Optional

import pytorch_lightning as pl
import torch
from torch import Tensor

from bottleneck.core.errors import Stopped
from bottleneck.training.processes import global_rank

log = logging.getLogger(__name__)
LAG = 4  # forward passes between a flag's sum and its reading on a GPU, in whole steps: the CPU runs no further ahead than that
REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGTERM, *REQUEUE, signal.SIGINT)
KILL_WAIT = 120  # seconds to wait, after scontrol requeue, for Slurm to end this process


class Flag:
    """The number of the signal that came to this process, 0 before; and what the processes agreed on."""

    def __init__(self) -> None:
        self.number, self._since = 0, 0.0
        self._lag = LAG
        self._sums: deque[tuple[Tensor, Optional[torch.cuda.Event]]] = deque()
        self._before: dict[int, Any] = {}

    def listen(self, numbers: tuple[signal.Signals, ...]) -> None:
        """Note these signals in place of what they did; Ctrl-C a second time interrupts at once."""
        for number in numbers:
            self._before.setdefault(number, signal.signal(number, self._note))

    def leave(self, but: tuple[signal.Signals, ...] = ()) -> None:
        """Signals do again what they did."""
        for number in self._before.keys() - set(but):
            signal.signal(number, self._before.pop(number))

    def raise_from_now(self, numbers: tuple[signal.Signals, ...]) -> None:
        """The last step is done and saved, what follows can be done again: these signals end the run where it is."""

        def stop(number: int, frame: Any) -> None:
            raise Stopped(number)

        for number in numbers:
            self._before.setdefault(number, signal.signal(number, stop))

    def _note(self, number: int, frame: Any) -> None:
        # a terminal's Ctrl-C reaches every process, and the agent hands its own on: that is still the first time
        if number == signal.SIGINT and self.number == signal.SIGINT and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._since = number, time.monotonic()

    def send(self, summed: Tensor, passes: int = 1) -> None:
        """Keep the sum over processes of a step's flags (a tensor of one element, perhaps still on its way).

        Args:
            passes: forward passes of a step, the same on every process and in every step. Long steps have many, and are waited for.
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

    def agreed(self) -> bool:
        """Whether some process had a signal: alike on every process. Without `send`, whether this one had."""
        if not self._sums:
            return self.number > 0
        if self._sums[-1][1] is not None and len(self._sums) <= self._lag:
            return False
        value, event = self._sums.popleft()
        if event is not None:
            event.synchronize()
        return value.item() > 0


class StopOnSignal(pl.Callback):
    """Raises `Stopped` after the step in which the processes agreed to stop, with a checkpoint on disk.

    Args:
        flag: which the module sends with its losses.
        save: writes the checkpoint of this step, or None where the run keeps none.
    """

    def __init__(self, flag: Flag, save: Optional[Callable[[pl.Trainer], None]]):
        self.flag, self.save = flag, save

    def on_train_batch_start(self, *_: Any) -> None:
        self.flag.listen(SIGNALS)  # not before the first step: until then there is nothing to save

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step >= trainer.max_steps or not self.flag.agreed():
            return
        if self.save is not None:
            self.save(trainer)
        number = self.flag.number
        if torch.distributed.is_initialized():  # one process may have had it alone
            numbers = [0] * trainer.world_size
            torch.distributed.all_gather_object(numbers, number)
            number = max(numbers)
        raise Stopped(number, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        kept = (
            REQUEUE if "SLURM_JOB_ID" in os.environ else ()
        )  # a time limit in the last validation puts the job back as well
        self.flag.raise_from_now(kept)
        self.flag.leave(but=kept)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.flag.leave()


def requeue() -> None:
    """Put this Slurm job back into the queue and wait to be ended. Called by every process, after its checkpoint."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which Slurm ends it now
    if global_rank() == 0:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode:
            log.error("scontrol requeue %s: %s", job, done.stderr.strip())
            return
        log.info("job %s is back in the queue", job)
    time.sleep(KILL_WAIT)


def restarted() -> bool:
    """Whether this process is a later try of the same job: requeued by Slurm, or restarted by torchrun."""
    return any(int(os.environ.get(name, 0) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))

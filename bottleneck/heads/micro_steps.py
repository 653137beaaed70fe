"""The micro-steps of a bank: eager, or recorded as a CUDA graph so that the host issues them in microseconds.

A head step at a low rank runs for a few tenths of a millisecond on a fast GPU, and the host needs as long to issue its
kernels. A recorded step is issued by one call, whatever the number of heads. The same kernels run with the same
arguments in the same order, so the bits do not change.

Dims: N tokens, D hidden size, H heads.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from bottleneck.heads.bank import HeadBank

log = logging.getLogger("bottleneck")
MOVES = 3  # changes of addresses after which nothing is recorded any more
Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def record(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record the kernels that `work` launches, without running them. Returns what runs them, and the result of `work`.

    The tensors of the result keep their addresses: each run overwrites them. `work` has run before, so that kernels
    are compiled. Raises: RuntimeError where something in it cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    # other threads, such as NCCL's watchdog and the one that pins batches, may call CUDA meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


class _Recording(NamedTuple):
    replay: Callable[[], None]
    h_ND: Tensor
    y_N: Tensor
    losses_H: Tensor


class MicroSteps:
    """Casts the heads of a bank once per optimizer step, then adds the gradients of one micro-batch after another.

    Args:
        recorded: record the steps where that is possible: on a GPU, for heads whose `recordable` is true and that use
            the fused loss, without a teacher. A shape is run eagerly once, to compile its kernels, before it is
            recorded.
        recorder: see `record`.
    """

    def __init__(self, bank: HeadBank, recorded: bool = True, recorder: Recorder = record):
        self.bank, self.recorder = bank, recorder
        self.recorded = recorded and bank.objective is None and all(bank[key].recordable for key in bank.keys)
        self.cast: list[Any] = []
        self._cast: Optional[tuple[Callable[[], None], list[Any]]] = None
        self._seen: set[tuple] = set()
        self._recordings: dict[tuple, _Recording] = {}
        self._addresses: list[int] = []
        self._moves = 0

    def begin(self, dtype: torch.dtype) -> None:
        """Cast the heads for an optimizer step. Gradients exist: see `HeadBank.zero_gradients`."""
        if not self._records(dtype):
            self.cast = self.bank.cast(dtype)
            return
        addresses = [t.data_ptr() for p in self.bank.parameters() for t in (p, p.grad) if t is not None]
        if addresses != self._addresses:  # DDP moves gradients into its buckets after the first step
            self._addresses, self._cast, self._moves = addresses, None, self._moves + 1
            self._recordings.clear()
            if self._moves > MOVES:
                self._give_up("parameters or gradients move at every step")
                self.cast = self.bank.cast(dtype)
                return
        if self._cast is None:
            self.cast = self.bank.cast(dtype)
            self._cast = self._try(lambda: self.bank.cast(dtype))
        if self._cast is not None:
            replay, self.cast = self._cast
            replay()

    def __call__(self, h_ND: Tensor, y_N: Tensor, scale: float, teacher_ND: Optional[Tensor] = None) -> Tensor:
        """Add scale · gradient of every head's summed loss, as `HeadBank.accumulate` does.

        Args: teacher_ND: see `HeadBank.accumulate`; never recorded, since a bank with a teacher is not.
        Returns: summed losses of the heads [H], nats, float64; overwritten by the next call.
        """
        key = (h_ND.shape, h_ND.dtype, y_N.dtype, scale)
        if self._cast is None or key not in self._seen:
            self._seen.add(key)
            return self.bank.accumulate(h_ND, y_N, self.cast, scale, teacher_ND)
        recording = self._recordings.get(key) or self._record(key, h_ND, y_N, scale)
        if recording is None:
            return self.bank.accumulate(h_ND, y_N, self.cast, scale)
        recording.h_ND.copy_(h_ND)
        recording.y_N.copy_(y_N)
        recording.replay()
        return recording.losses_H

    def _records(self, dtype: torch.dtype) -> bool:
        if self.recorded and self.recorder is record:
            fused = all(self.bank.impl(key, dtype) == "fused" for key in self.bank.keys)
            self.recorded = fused and next(self.bank.parameters()).is_cuda and dtype.itemsize == 2
        return self.recorded

    def _record(self, key: tuple, h_ND: Tensor, y_N: Tensor, scale: float) -> Optional[_Recording]:
        h, y, cast = h_ND.clone(), y_N.clone(), self.cast
        found = self._try(lambda: self.bank.accumulate(h, y, cast, scale))
        if found is not None:
            self._recordings[key] = _Recording(found[0], h, y, found[1])
        return self._recordings.get(key)

    def _try(self, work: Callable[[], Any]) -> Optional[tuple[Callable[[], None], Any]]:
        try:
            return self.recorder(work)
        except RuntimeError as error:  # such as a library that launches on a stream of its own, or no memory left
            self._give_up(str(error).splitlines()[0])
            return None

    def _give_up(self, why: str) -> None:
        self.recorded, self._cast = False, None
        self._recordings.clear()
        log.info("head steps are issued one kernel at a time: %s", why)

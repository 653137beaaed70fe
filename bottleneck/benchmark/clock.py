"""Times and peak memory of a piece of work on either device."""

from __future__ import annotations

from typing import Any, Callable

import torch

from bottleneck.benchmark.table import timed

LONGEST = 2.0  # seconds for the repeats of one measurement on a GPU, of which there are at least 5


def seconds(work: Callable[[], Any], device: str, repeats: int) -> list[float]:
    """Return the seconds of `repeats` calls after warm-up.

    Measured by events on a GPU, whose level-2 cache is swept before each call, and by a clock on a CPU.
    """
    if device == "cpu":
        work()
        return [timed(work)[0] for _ in range(repeats)]
    work()
    torch.cuda.synchronize()
    once = timed(lambda: _finished(work))[0]
    repeats = min(repeats, max(5, int(LONGEST / once)))
    for _ in range(min(10, repeats)):
        work()
    sweep = torch.empty(64 << 20, dtype=torch.int32, device=device)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        sweep.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def _finished(work: Callable[[], Any]) -> None:
    work()
    torch.cuda.synchronize()


def peak_mib(work: Callable[[], Any], device: str) -> float | None:
    """Return the peak memory of one call beyond what was in use before, in MiB; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20

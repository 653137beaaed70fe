"""Times of the phases of a step: forward, heads, reduction, optimizer.

On a GPU they are measured with CUDA events, which do not slow it down.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class StepTimer:
    """Times the phases of one step. Each call ends the phase that began at the previous call or at `begin`."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = []
        self._on = self._cuda = False

    def begin(self, on: bool, device: torch.device) -> None:
        """Start a step; it is timed only if `on`."""
        self._on, self._cuda, self._marks = on, device.type == "cuda", []
        self("")

    def __call__(self, phase: str) -> None:
        """End a phase."""
        if not self._on:
            return
        if not self._cuda:
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def seconds(self) -> dict[str, float]:
        """Total seconds of each phase. Waits until the device has finished the step."""
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        out: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:]):
            took = before.elapsed_time(after) / 1e3 if self._cuda else after - before
            out[phase] = out.get(phase, 0.0) + took
        return out

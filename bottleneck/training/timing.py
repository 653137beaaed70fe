"""Where a step's time goes: forward, heads, reduction, optimizer; by events on a GPU, which cost nothing while it works."""

from __future__ import annotations

import time
from typing import Any

import torch


class Parts:
    """Marks in one step: each call ends a part that began at the call before, or at `begin`."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = []
        self._on = self._cuda = False

    def begin(self, on: bool, device: torch.device) -> None:
        """A new step, which is timed where `on`."""
        self._on, self._cuda, self._marks = on, device.type == "cuda", []
        self("")

    def __call__(self, name: str) -> None:
        if not self._on:
            return
        if not self._cuda:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, summed over its marks. The device must have finished the step."""
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        out: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:]):
            took = before.elapsed_time(after) / 1e3 if self._cuda else after - before
            out[name] = out.get(name, 0.0) + took
        return out

"""Progress of a study: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, Iterable, Iterator, Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # between two lines within one part


class StudyProgress:
    """Shows progress through the parts of a study.

    Use as a context manager; `begin(label)` starts a part, `at(share)` moves within it, `end(note)` closes it.

    Args:
        total: number of parts.
        shown: trainer.progress.
        unit: what a part is called.
    """

    def __init__(self, total: int, shown: bool, unit: str = "checkpoint"):
        self.total, self.shown, self.unit = total, shown, unit
        self.console = Console(stderr=True)
        self.done, self.computed, self.spent = 0, 0, 0.0
        self.label, self.began, self.said = "", 0.0, 0.0
        self.bar: Optional[Progress] = None

    def __enter__(self) -> StudyProgress:
        if self.shown and self.console.is_terminal:
            share = TextColumn("{task.completed:.1f}/{task.total:.0f}")
            columns = (TextColumn("{task.description}"), BarColumn(), share, TextColumn("left"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(self.unit, total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, label: str) -> None:
        """Start the next part."""
        self.label, self.began = label, time.monotonic()
        self.said = self.began
        if self.bar is not None:
            self.bar.update(self.task, description=label)

    def at(self, share: float) -> None:
        """`share` of the current part is done."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done + share)
        elif self.shown and now - self.said > LINE_SECONDS:
            self.said = now
            left = (now - self.began) * (1 / max(share, 1e-3) - 1)
            self._print(
                f"{self.unit} {self.done + 1}/{self.total} {self.label}: {100 * share:.0f} %, {left:.0f} s left"
            )

    def over(self, label: str, steps: Iterable[Any]) -> Iterator[Any]:
        """Iterate over the steps of the current part, or of a stage of it with a label of its own."""
        self.begin(label)
        every = list(steps)
        for i, step in enumerate(every):
            yield step
            self.at((i + 1) / len(every))

    def end(self, note: str, kept: bool = False) -> None:
        """Close the current part. `kept`: an earlier run computed it, so its time does not count in the estimate."""
        seconds = time.monotonic() - self.began
        self.done += 1
        self.computed += not kept
        self.spent += 0.0 if kept else seconds
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        if self.shown:
            left = (self.total - self.done) * self.spent / max(1, self.computed)
            more = f", about {left:.0f} s left" if self.done < self.total else ""
            tail = "computed by an earlier run" if kept else f"{seconds:.1f} s{more}"
            self._print(f"{self.unit} {self.done}/{self.total} {self.label}: {note} ({tail})")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

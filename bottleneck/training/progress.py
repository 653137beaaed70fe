"""Progress of a run: a bar on a terminal, else a line every few seconds, with step, tokens/s and time left."""

from __future__ import annotations

import logging
import time
from typing import Any, Iterator, Optional, Sequence, TypeVar

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
LINE_SECONDS = 10.0
Item = TypeVar("Item")


def report_progress(what: str, items: Sequence[Item]) -> Iterator[Item]:
    """Yield the items, and log every few seconds how many are done. Silent if the loop ends first."""
    began = reported = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - reported > LINE_SECONDS:
            reported = now
            log.info("%s: %d of %d, %.0f s left", what, done, len(items), (now - began) / done * (len(items) - done))
        yield item


class TokenProgress(pl.Callback):
    """Shows tokens/s and the time left, in the first process. Nothing waits for the device."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar: Optional[Progress] = None
        self.began = self.reported = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        # the module's hook (initial validation) runs after this one, so the clock starts with the first batch
        self.began = 0.0
        self.first_step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero or self.began:
            return
        self.began = self.reported = time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[speed]} tokens/s"),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=module.steps, completed=self.first_step, speed="…")
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        now, done = time.monotonic(), trainer.global_step
        speed = (done - self.first_step) * module.step_tokens / (now - self.began)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, speed=f"{speed:,.0f}")
        elif now - self.reported > LINE_SECONDS or done == module.steps:
            self.reported = now
            left = (module.steps - done) * module.step_tokens / speed
            self.console.print(
                f"step {done}/{module.steps}  {done * module.step_tokens / 1e6:.2f}M tokens  "
                f"{speed:,.0f} tokens/s  {left:.0f} s left",
                highlight=False,
            )

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

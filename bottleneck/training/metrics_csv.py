"""metrics.csv: one row per number, appended while the run trains."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any, Optional

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from bottleneck.core.errors import UserError
from bottleneck.core.files import write_atomic

log = logging.getLogger(__name__)
COLUMNS = ("step", "tokens", "metric", "head", "value")


class MetricsCSV(Logger):
    """Rows of step, tokens, metric, head, value, flushed at once, so that a kill loses nothing.

    A resumed run drops the rows after its checkpoint and repeats none. (Lightning's CSVLogger deletes the file
    instead.)
    """

    def __init__(self, path: Path, resume_step: Optional[int] = None):
        super().__init__()
        self.path, self.resume_step = path, resume_step
        # (step, metric, head) of the rows written before the run was resumed; None until the file is open
        self._kept: Optional[set[tuple[str, ...]]] = None

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run's config is in run.json."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: Optional[int] = None) -> None:
        """Append the numbers named METRIC/HEAD. Raises UserError on a full disk."""
        if self._kept is None:
            self._kept = self._open()
        tokens = metrics.get("tokens", "")
        try:
            with open(self.path, "a", newline="") as f:
                writer = csv.writer(f)
                for name, value in metrics.items():
                    metric, _, head = name.rpartition("/")
                    if metric and (str(step), metric, head) not in self._kept:
                        writer.writerow((step, tokens, metric, head, repr(float(value))))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error}") from error

    def _open(self) -> set[tuple[str, ...]]:
        rows: list[list[str]] = []
        if self.resume_step is not None and self.path.exists():
            try:
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error
            found = [_row(line) for line in lines]
            rows = [row for row in found if row is not None and int(row[0]) <= self.resume_step]
            if None in found[:-1]:  # a kill may have cut the last line
                log.warning("%s: %d lines cannot be read and are dropped", self.path, found[:-1].count(None))

        def write(part: Path) -> None:
            with open(part, "w", newline="") as f:
                csv.writer(f).writerows([COLUMNS, *rows])

        write_atomic(self.path, write)
        return {(r[0], r[2], r[3]) for r in rows}


def _row(line: str) -> Optional[list[str]]:
    """The fields of a line, or None if it is not a valid row."""
    try:
        (row,) = csv.reader([line])
        float(row[4])
        ours = len(row) == len(COLUMNS) and row[0].isascii() and row[0].isdigit() and len(row[0]) < 16 and bool(row[2])
    except (csv.Error, ValueError, IndexError):
        return None
    return row if ours else None

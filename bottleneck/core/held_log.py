"""A log file that is written only once its run has been accepted, so that a refused run does not touch its folder."""

from __future__ import annotations

import logging
from typing import Iterator


class HeldLog(logging.FileHandler):
    """Keeps its lines in memory until `write_held_logs`, or until the process ends."""

    def __init__(self, filename: str):
        super().__init__(filename, delay=True, encoding="utf-8", errors="backslashreplace")
        self.held: list[logging.LogRecord] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        if self.held is None:
            super().emit(record)
        else:
            self.held.append(record)

    def write(self) -> None:
        """Write the held lines, and from now on each line at once."""
        held, self.held = self.held or [], None
        for record in held:
            super().emit(record)

    def drop(self) -> None:
        """Forget the held lines."""
        if self.held is not None:
            self.held = []

    def close(self) -> None:
        self.write()
        super().close()


def _logs() -> Iterator[HeldLog]:
    return (handler for handler in logging.getLogger().handlers if isinstance(handler, HeldLog))


def write_held_logs() -> None:
    """The run is accepted: write its log."""
    for handler in _logs():
        handler.write()


def drop_held_logs() -> None:
    """The run is refused: its log is not written."""
    for handler in _logs():
        handler.drop()

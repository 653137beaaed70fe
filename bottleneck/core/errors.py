"""Errors that the user can fix, shown as one line with exit code 2, and the exception of a run stopped by a signal."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn, Optional


class UserError(Exception):
    """Bad input. The message says what is wrong, where (config key or file), and what is allowed."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def how_to_resume(folder: object = None, sweep: object = None) -> str:
    """A hint for the user: how to resume a stopped run.

    Args:
        folder: the run's folder.
        sweep: folder of the multirun that the run belongs to, if any.
    """
    if sweep is not None:  # hydra.run.dir would resume this job without the multirun's other jobs
        return f"resume with the same command, ckpt_path=last and hydra.sweep.dir={sweep}"
    if folder and _keeps_no_checkpoints(Path(str(folder))):
        return "no checkpoint was kept (trainer.checkpoint_every=null): the same command starts again"
    return "resume with ckpt_path=last and " + (f"hydra.run.dir={folder}" if folder else "the same hydra.run.dir")


def _keeps_no_checkpoints(folder: Path) -> bool:
    """Whether the run in a folder was told to keep none; False before its config is written."""
    try:
        return json.loads((folder / "run.json").read_text())["config"]["trainer"]["checkpoint_every"] is None
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors. Usage lines name the command as it was called.

    Args: prog: the name of a command called as a module; `bottleneck NAME` is recognised.
    """

    def __init__(self, prog: str, **kwargs: Any):
        called = sys.argv[0]
        super().__init__(prog=called if called.startswith("bottleneck ") else prog, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help)")


class LostPeers(UserError):
    """The other processes of a run do not answer. One of them reports the cause."""


class Stopped(BaseException):
    """A run stopped on a signal, with a checkpoint where it keeps one. Not an error."""

    def __init__(self, number: int, step: Optional[int] = None):
        super().__init__(number, step)
        self.signal, self.step = number, step

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal).name}{'' if self.step is None else f' after step {self.step}'}"

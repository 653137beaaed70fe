"""The folder of a run: names of its files, its lock, and whether it holds a run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Iterator

from filelock import FileLock, Timeout

from bottleneck.core.errors import UserError, check

LAST = Path("checkpoints") / "last.ckpt"
PREVIOUS = Path("checkpoints") / "previous.ckpt"
LOCK = ".lock"
LOCK_SECONDS = 60


@contextlib.contextmanager
def lock_folder(run_dir: Path, rank: int) -> Iterator[None]:
    """Keep other runs out of the folder. Process 0 holds the lock; it waits a few seconds for a run that is ending.

    Raises: UserError if another run keeps the lock, or if the folder cannot be written.
    """
    if rank:
        yield
        return
    lock = FileLock(run_dir / LOCK)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _check_writable(run_dir)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(f"hydra.run.dir={run_dir}: another run is using this folder") from None
    except (OSError, NotImplementedError) as error:  # a file system without locks: run without one
        check(run_dir.is_dir(), f"hydra.run.dir={run_dir}: cannot be written: {error}")
    try:
        yield
    finally:
        lock.release()


def _check_writable(run_dir: Path) -> None:
    """Raises UserError if no file can be created in the folder: no permission, a read-only disk, a full disk."""
    probe = run_dir / f".write-test-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"hydra.run.dir={run_dir}: cannot be written: {error.strerror or error}") from error


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the folder has a checkpoint, whole or damaged."""
    return (run_dir / LAST).exists() or (run_dir / PREVIOUS).exists()


def has_results(run_dir: Path) -> bool:
    """Whether the folder has results of a run, complete or not."""
    return (run_dir / "curve.json").exists() or any((run_dir / "heads").glob("*.safetensors"))

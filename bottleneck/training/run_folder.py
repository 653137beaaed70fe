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
    """Keep other runs out of the folder. Process 0 holds the lock, and waits for a run that is ending.

    Raises: UserError where another run stays in the folder, or where the folder cannot be written.
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
        raise UserError(f"hydra.run.dir={run_dir}: another run is at work there") from None
    except (OSError, NotImplementedError) as error:  # file systems without locks: the run goes on without one
        check(run_dir.is_dir(), f"hydra.run.dir={run_dir}: cannot be written: {error}")
    try:
        yield
    finally:
        lock.release()


def _check_writable(run_dir: Path) -> None:
    """Raises UserError where no file can be made in the folder: permissions, a read-only disk, a full one."""
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
    """Whether the folder has results of a run, perhaps not all of them."""
    return (run_dir / "curve.json").exists() or any((run_dir / "heads").glob("*.safetensors"))

"""Atomic writing: a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Optional

from bottleneck.core.errors import UserError


def leftovers(path: Path) -> list[Path]:
    """Unfinished copies of `path` left by killed processes: files .NAME.PID.part beside it whose process is gone."""
    own = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.part")
    found = ((p, own.fullmatch(p.name)) for p in path.parent.iterdir())
    return [p for p, m in found if m and (int(m[1]) == os.getpid() or not _alive(int(m[1])))]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


def write_atomic(path: Path, write: Callable[[Path], Any], keep: Optional[Path] = None) -> None:
    """Let `write` make a file beside `path`, then rename it, so that `path` is never half-written.

    Args:
        write: takes the path to write to.
        keep: path to which an existing file is moved first. A kill between the two renames leaves it there.
    Raises: UserError if the file cannot be written, for example on a full disk.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in leftovers(path):
            stale.unlink()
        write(part)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"{path}: cannot be written: {error}{_free(path)}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _free(path: Path) -> str:
    """Text with the free space on a disk, "" if there is plenty: torch's error does not mention a full disk."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        if free < 1 << 30:
            return f" ({free / 2**20:.0f} MiB are free there)"
    return ""

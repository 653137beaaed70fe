"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Optional

from bottleneck.core.errors import UserError


def leftovers(path: Path) -> list[Path]:
    """Unfinished copies of `path` that killed processes left: .NAME.PID.part beside it, of no living process."""
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
        keep: where an existing file is moved first. After a kill between the two renames it is found there.
    Raises: UserError where the file cannot be written, as on a full disk.
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
    """The free space on a file's disk, where it is little: torch's message for a full disk does not mention it."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        if free < 1 << 30:
            return f" ({free / 2**20:.0f} MiB are free there)"
    return ""

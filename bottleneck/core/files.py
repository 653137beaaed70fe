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
    """What processes that were killed left of their writing `path`: .NAME.PID.part beside it, of no living process."""
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
    """Let `write` make a file beside `path`, then rename it: `path` is never half-written. Raises UserError on a full disk.

    Args: keep: where the file that is there already goes; killed in between, a run finds it there.
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
    """How much room there is on a file's disk, where there is little: torch's own words for a full disk say nothing of it."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        if free < 1 << 30:
            return f" ({free / 2**20:.0f} MiB are free there)"
    return ""

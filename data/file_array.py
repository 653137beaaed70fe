"""Arrays in files, of which only the requested parts are read."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Optional

import numpy as np

from bottleneck.core.errors import UserError
from bottleneck.data.readers import readable

OPEN_FILES = 200  # files that are kept open; systems allow 256 to 1,024 by default


class FileArray:
    """An array in a file, of which only the requested parts are read.

    Not a memory map: with random access over a large file, page faults cost far more than reads of the same bytes.
    """

    def __init__(self, path: Path, dtype: Any, offset: int = 0, count: Optional[int] = None):
        self.dtype, self.offset, self.path = np.dtype(dtype), offset, str(path)
        size = os.stat(path).st_size - offset
        self.count = size // self.dtype.itemsize if count is None else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: Any) -> Any:
        """A slice as an array that cannot be written to, or one element."""
        if not isinstance(part, slice):
            at = int(part) + (self.count if part < 0 else 0)
            return self[at : at + 1][0]
        start, stop, _ = part.indices(self.count)
        size, at = max(0, stop - start) * self.dtype.itemsize, self.offset + start * self.dtype.itemsize
        raw = os.pread(_opened_file(self.path), size, at)
        if len(raw) < size:  # one read ends after 2 GiB
            pieces = [raw]
            while (done := sum(map(len, pieces))) < size:
                if not pieces[-1]:
                    raise UserError(f"{readable(self.path)}: became shorter while it was read")
                pieces.append(os.pread(_opened_file(self.path), size - done, at + done))
            raw = b"".join(pieces)
        return np.frombuffer(raw, self.dtype)

    def announce(self, start: int, stop: int) -> None:
        """Ask the system to read a part ahead."""
        at, size = self.offset + start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(_opened_file(self.path), at, size, os.POSIX_FADV_WILLNEED)


_open_files: OrderedDict[str, int] = OrderedDict()


def _opened_file(path: str) -> int:
    """The descriptor of a file. The files used last stay open, fewer than a process may have open at once."""
    if path not in _open_files:
        while len(_open_files) >= OPEN_FILES:
            os.close(_open_files.popitem(last=False)[1])
        _open_files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    _open_files.move_to_end(path)
    return _open_files[path]

"""Rows of a Hub stream kept on disk while a text is prepared, so that a stopped preparation goes on where it was.

The rows that were read are read again from the disk, and the stream continues at the next one (its `state_dict`). So
the result is the same, bit for bit, as that of an undisturbed preparation.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any, Iterator, Optional

from bottleneck.core.files import write_atomic

log = logging.getLogger(__name__)
SAVE_SECONDS = 5.0  # between two saves of the stream's state
ROWS = 32  # rows of a stream read at once: few, because a row may be a whole book


class StreamJournal:
    """The rows of one split.

    Args:
        path: file of the rows; its state is in a file beside it.
        identity: of the data set's files; rows of another one are not used.
    """

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity
        self.state_file = path.with_suffix(".json")

    def tables(self, stream: Any, column: Any) -> Iterator[list[Any]]:
        """Texts of the stream, some at once: first those that were read before.

        Args: column: gives the texts of a table of the stream, or raises.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = self._state()
        with open(self.path, "r+b" if state else "wb") as file:
            if state:
                file.truncate(state["bytes"])
                kept = 0
                while head := file.read(4):
                    texts = json.loads(zlib.decompress(file.read(struct.unpack("<I", head)[0])))
                    kept += len(texts)
                    yield texts
                stream.load_state_dict(state["state"])
                log.info("going on after %s rows that were read before", f"{kept:,}")
            last = time.monotonic()
            for table in stream.iter(batch_size=ROWS):
                texts = column(table)
                packed = zlib.compress(json.dumps(texts).encode("utf-8", "surrogatepass"), 1)
                file.write(struct.pack("<I", len(packed)) + packed)
                if time.monotonic() - last >= SAVE_SECONDS:
                    self._save(file, stream)
                    last = time.monotonic()
                yield texts

    def _save(self, file: Any, stream: Any) -> None:
        file.flush()
        os.fsync(file.fileno())
        state = {"bytes": file.tell(), "identity": self.identity, "state": stream.state_dict()}
        write_atomic(self.state_file, lambda part: part.write_text(json.dumps(state)))

    def _state(self) -> Optional[dict[str, Any]]:
        """What was saved; None if there is nothing, or nothing that can be used."""
        try:
            state = json.loads(self.state_file.read_text())
            usable = state["identity"] == self.identity and self.path.stat().st_size >= state["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return state if usable else None

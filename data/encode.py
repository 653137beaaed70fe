"""Documents to token ids on disk. One batch is tokenised in the background while another is read and a third written.

The ids do not depend on the batches, and a long document is cut only where that changes no id.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np

from bottleneck.core.environment import cores
from bottleneck.data.words import WordEncoder, cutter

CORE_CHARS = 1 << 18  # characters of one batch for each core …
MOST_CHARS = 1 << 21  # … and at most: the tokenizer needs about 120 bytes a character
LONG_CHARS = 1 << 19  # longer documents are tokenised in pieces of about this length, for the same reason
# candidates for a cut: after a line break before a letter, and between a word and the space before the next word
CUTS = re.compile(r"\n(?=[^\W\d_])|(?<=[^\W\d_])(?= [^\W\d_])")
AHEAD = 3  # batches that may wait to be written
WINDOW = 512  # characters on each side of a cut that are tokenised with the cut and without it
TRIES = 50  # places tried for one cut
FEW_CORES = 4  # up to this many cores, looking words up on one core is faster than tokenising on all
WORKERS = 2  # batches in the tokenizer at once: while one finishes on few cores, the next starts on the others

UINT32 = np.dtype("uint32")

Encode = Callable[[list[str]], list[np.ndarray]]


def encoder(tokenizer: Any, dtype: np.dtype = UINT32) -> Encode:
    """A function from texts to arrays of ids, without special tokens.

    A fast tokenizer uses all cores and releases the GIL. On few cores looking words up is faster, but uses one core.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        call = partial(tokenizer, add_special_tokens=False, return_attention_mask=False)
        return lambda texts: [np.array(ids, dtype) for ids in call(texts)["input_ids"]]

    def whole(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    cut = cutter(backend) if cores() <= FEW_CORES else None
    if cut is not None:
        return WordEncoder(backend, cut, whole, dtype)
    return lambda texts: [np.array(ids, dtype) for ids in whole(texts)]


def background(tokenizer: Any) -> ThreadPoolExecutor:
    """Threads for `Writer`. A tokenizer written in Python gets one thread, because it may not be thread-safe."""
    return ThreadPoolExecutor(WORKERS if getattr(tokenizer, "backend_tokenizer", None) is not None else 1)


def batch_chars() -> int:
    """Characters of one batch: enough to keep every core busy, within bounded memory."""
    return min(MOST_CHARS, CORE_CHARS * cores())


def pieces(text: str, encode: Encode, length: int = LONG_CHARS) -> Iterator[str]:
    """Pieces of a document whose ids, joined, are the ids of the document.

    Cuts lie between words. Most tokenizers treat words separately, but some add something to the start of a text or
    join words; so a cut is made only where the surrounding text has the same ids with the cut and without it. If there
    is no such place, the rest stays in one piece. With SentencePiece the space at a cut is dropped, because every piece
    gets one at its start.
    """
    start = 0
    while len(text) - start > 2 * length:
        places = CUTS.finditer(text, start + length, start + 2 * length)
        for place, _ in zip(places, range(TRIES)):
            left, right = text[max(start, place.end() - WINDOW) : place.end()], text[place.end() : place.end() + WINDOW]
            # SentencePiece puts a space at the start of every text, so the space at the cut is left out there
            whole, a, b, c = encode([left + right, left, right, right.removeprefix(" ")])
            same = [np.array_equal(whole, np.concatenate([a, other])) for other in (b, c)]
            if any(same):
                yield text[start : place.end()]
                start = place.end() + (not same[0])
                break
        else:
            break
    yield text[start:]


def joined(texts: list[str], encode: Encode, eos: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenise documents.

    Returns: the ids of all documents, each followed by end-of-text; the tokens of each document with its end-of-text
        [documents]; its UTF-8 bytes [documents].
    """
    parts: list[np.ndarray] = []
    lengths = np.zeros(len(texts), np.int64)
    group: list[tuple[int, str]] = []

    def finish() -> None:
        ids = encode([piece for _, piece in group])
        for (i, _), own in zip(group, ids):
            lengths[i] += len(own)
        parts.extend(ids)
        group.clear()

    chars, most = 0, batch_chars()
    for i, text in enumerate(texts):
        for piece in pieces(text, encode) if len(text) > 2 * LONG_CHARS else (text,):
            group.append((i, piece))
            chars += len(piece)
            if chars >= most:
                finish()
                chars = 0
    if group:
        finish()
    ends = np.cumsum(lengths)
    sizes = np.array([len(t) if t.isascii() else len(t.encode("utf-8", "surrogatepass")) for t in texts], np.int64)
    return np.insert(np.concatenate(parts), ends, eos), lengths + 1, sizes


class Writer:
    """Appends documents to one stream of tokens on disk, up to the document that passes `limit` tokens.

    Attributes:
        offered: documents that were given to `add`.
        documents, tokens, bytes: what was written so far; complete after `finish`.
    """

    def __init__(self, path: Path, dtype: np.dtype, eos: int, encode: Encode, limit: Optional[int], pool: Executor):
        self.file = open(path, "wb")
        self.eos, self.encode, self.limit, self.pool = eos, encode, limit, pool
        # A small limit means short batches, so that little more is read than is kept. Their length is the same on every
        # machine, because it decides which documents are read, and some of these are held out for validation.
        self.batch = batch_chars() if limit is None else min(MOST_CHARS, max(4096, limit))
        self.offered = self.tokens = self.documents = self.bytes = self.crc = self._chars = 0
        self._texts: list[str] = []
        self._ahead: deque[Future] = deque()
        self._write(np.array([eos], dtype=dtype))

    @property
    def full(self) -> bool:
        """Whether the limit is passed, so that further documents are not kept."""
        return self.limit is not None and self.tokens > self.limit

    def add(self, text: str) -> None:
        self.offered += 1
        if self.full:
            return
        self._texts.append(text)
        self._chars += len(text)
        if self._chars >= self.batch:
            self._send()
            while len(self._ahead) > AHEAD:
                self._receive()

    def _send(self) -> None:
        self._ahead.append(self.pool.submit(joined, self._texts, self.encode, self.eos))
        self._texts, self._chars = [], 0

    def _receive(self) -> None:
        self.append(*self._ahead.popleft().result())

    def append(self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> None:
        """Write documents that are tokenised already, as `joined` returns them."""
        if self.full or not len(lengths):
            return
        ends = np.cumsum(lengths)
        count = len(ends)
        if self.limit is not None:  # a document is kept if the limit is not passed before it
            count = int(np.searchsorted(ends - lengths, self.limit - self.tokens, side="right"))
        self._write(ids[: ends[count - 1]])
        self.documents += count
        self.bytes += int(sizes[:count].sum())

    def _write(self, ids: np.ndarray) -> None:
        raw = memoryview(np.ascontiguousarray(ids)).cast("B")  # type: ignore[arg-type]  # arrays are buffers
        self.file.write(raw)
        self.crc = zlib.crc32(raw, self.crc)
        self.tokens += len(ids)

    def finish(self) -> None:
        """Write the documents that are still waiting."""
        if self._texts:
            self._send()
        while self._ahead:
            self._receive()

    def close(self) -> dict[str, int]:
        """Write the rest and close the file. Returns the part's entry in the manifest."""
        self.finish()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "crc32": self.crc}

    def abandon(self) -> None:
        """Close the file and ignore errors: it is about to be deleted."""
        with contextlib.suppress(OSError):
            self.file.close()

"""Documents to token ids on disk: batches are tokenised in the background while the next ones are read and the last written.

The ids do not depend on how documents fall into batches, and a long document is cut only where that changes no id.
"""

from __future__ import annotations

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

CORE_CHARS = 1 << 18  # text given to the tokenizer at once, for each core …
MOST_CHARS = 1 << 21  # … and in all: it needs about 120 bytes a character
LONG_CHARS = 1 << 19  # longer documents are tokenised in pieces of about this length, for the same reason
# a line break before a letter, or what is between a word and the space before the next
CUTS = re.compile(r"\n(?=[^\W\d_])|(?<=[^\W\d_])(?= [^\W\d_])")
AHEAD = 3  # batches that may wait to be written
WINDOW = 512  # characters on each side of a cut that are tokenised with and without it
TRIES = 50  # places looked at for one cut
FEW_CORES = 4  # up to which one core that looks words up is faster than all cores that tokenise
WORKERS = 2  # batches in the tokenizer at once: while one ends on few cores, the next has begun on the others

Encode = Callable[[list[str]], list[np.ndarray]]


def encoder(tokenizer: Any, dtype: np.dtype = np.dtype("uint32")) -> Encode:
    """Texts to arrays of ids without special tokens.

    A fast tokenizer uses all cores and holds no lock meanwhile; looking words up is faster on few cores, but uses one.
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
    """Threads for `Writer`. A tokenizer written in Python gets one: nothing says that it may be called by several."""
    return ThreadPoolExecutor(WORKERS if getattr(tokenizer, "backend_tokenizer", None) is not None else 1)


def batch_chars() -> int:
    """Characters that keep every core busy within bounded memory."""
    return min(MOST_CHARS, CORE_CHARS * cores())


def pieces(text: str, encode: Encode, length: int = LONG_CHARS) -> Iterator[str]:
    """A document in pieces whose ids, one after the other, are the document's.

    They are cut between words (of SentencePiece, a space is lost there, which each piece has at its start anyway). Most tokenizers treat words apart, but some add something to the start of a text or join
    words; so a cut is made only where the text around it has the same ids with it and without. Where no such place is
    found the rest stays whole.
    """
    start = 0
    while len(text) - start > 2 * length:
        places = CUTS.finditer(text, start + length, start + 2 * length)
        for place, _ in zip(places, range(TRIES)):
            left, right = text[max(start, place.end() - WINDOW) : place.end()], text[place.end() : place.end() + WINDOW]
            # SentencePiece gives every text a space at its start: there the space in between is left out
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
    """Documents to one array of ids, end-of-text after each; tokens [documents] and UTF-8 bytes [documents] of each."""
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
    """Appends documents to one stream of tokens on disk, up to the document that passes `limit` tokens."""

    def __init__(self, path: Path, dtype: np.dtype, eos: int, encode: Encode, limit: Optional[int], pool: Executor):
        self.file = open(path, "wb")
        self.eos, self.encode, self.limit, self.pool = eos, encode, limit, pool
        # with a small limit short batches, so that not much more is read than is kept; and the same ones on any machine: documents
        # for validation that come by meanwhile are kept as well
        self.batch = batch_chars() if limit is None else min(MOST_CHARS, max(4096, limit))
        self.tokens = self.documents = self.bytes = self.crc = self._chars = 0
        self._texts: list[str] = []
        self._ahead: deque[Future] = deque()
        self._write(np.array([eos], dtype=dtype))

    @property
    def full(self) -> bool:
        return self.limit is not None and self.tokens > self.limit

    def add(self, text: str) -> None:
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
        ids, lengths, sizes = self._ahead.popleft().result()
        if self.full:
            return
        ends = np.cumsum(lengths)
        count = len(ends)
        if self.limit is not None:  # a document is kept if the limit is not passed before it
            count = int(np.searchsorted(ends - lengths, self.limit - self.tokens, side="right"))
        self._write(ids[: ends[count - 1]])
        self.documents += count
        self.bytes += int(sizes[:count].sum())

    def _write(self, ids: np.ndarray) -> None:
        raw = memoryview(ids).cast("B")
        self.file.write(raw)
        self.crc = zlib.crc32(raw, self.crc)
        self.tokens += len(ids)

    def close(self) -> dict[str, int]:
        """Write what is left. Returns the part's entry in the manifest."""
        if self._texts:
            self._send()
        while self._ahead:
            self._receive()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "crc32": self.crc}

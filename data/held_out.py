"""Which documents are held out for validation if the text has no validation part: a hash of each document decides."""

from __future__ import annotations

import hashlib
import re
import zlib
from itertools import islice
from typing import Collection, Iterable, Iterator

from bottleneck.core.errors import check

BEFORE_BREAK = re.compile(r"[ \t]+\n")
FIRST_DOCUMENTS = 200  # at least one of these documents is held out, however small the text is


def document_hash(text: str, seed: int) -> int:
    """64 bits of a document and a seed. Copies of a document have one hash, so they land on one side of the split.

    Copies may differ in a byte order mark, in line breaks, and in white space at the ends of the text or of its lines.
    """
    digest = hashlib.blake2b(
        _plain(text).encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little")
    )
    return int.from_bytes(digest.digest(), "big")


def _plain(text: str) -> str:
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if BEFORE_BREAK.search(text):
        text = BEFORE_BREAK.sub("\n", text)
    return text.strip()


class HashSplit:
    """Splits a stream of documents into training and validation by their hashes.

    Args:
        seed: of the hashes (data.seed).
        fraction: share of the documents held out.

    Attributes:
        waiting: documents that were read and not yet returned.
    """

    def __init__(self, seed: int, fraction: float):
        self.seed, self.limit = seed, int(fraction * 2**64)
        self.waiting = 0

    def is_held(self, value: int, forced: int) -> bool:
        """Whether the documents with a hash are held out; those with the hash `forced` are."""
        return value < self.limit or value == forced

    def __call__(self, documents: Iterable[str]) -> Iterator[tuple[bool, str]]:
        """(held out?, document) for every document. Raises UserError for fewer than two different documents."""
        stream = iter(documents)
        first: list[tuple[int, bytes]] = []  # compressed, because documents may be long
        for d in islice(stream, FIRST_DOCUMENTS):
            first.append((document_hash(d, self.seed), zlib.compress(d.encode("utf-8", "surrogatepass"), 1)))
        hashes = {value for value, _ in first}
        check_several(hashes)
        forced = min(hashes)  # so that a text of few documents has one for validation

        def held(value: int) -> bool:
            return self.is_held(value, forced)

        self.waiting = len(first)
        # held-out documents first, so that a small data.max_tokens does not end the reading before there is one
        for value, packed in sorted(first, key=lambda f: not held(f[0])):
            self.waiting -= 1
            yield held(value), zlib.decompress(packed).decode("utf-8", "surrogatepass")
        first.clear()
        for d in stream:
            yield held(document_hash(d, self.seed)), d


def check_several(hashes: Collection[int]) -> None:
    """Raises UserError unless there are two different documents."""
    check(len(hashes) > 0, "data: there is no document in the text, or only empty ones")
    check(
        len(hashes) > 1,
        "data: the text is a single document, so none can be held out for validation; give data.validation_files,"
        " or split plain text with data.text_unit=paragraph (at empty lines, which hold not even blanks) or"
        " data.text_unit=line",
    )

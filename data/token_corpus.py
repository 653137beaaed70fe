"""Token files as the corpus of a run: joined into one stream, or rows as they are, with separate validation text.

Nothing is copied and no index is read as a whole, so opening 10^11 tokens takes seconds. A joined stream has the layout
of prepared text: end-of-text, document, end-of-text, document …, end-of-text.

Dims: N sequences, T tokens predicted per sequence.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import logging
import zlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Optional

import numpy as np

from bottleneck.config.numbers import as_list
from bottleneck.config.schema import DataConfig
from bottleneck.core.errors import UserError, check
from bottleneck.data.cache import Corpus, ValidationPart
from bottleneck.data.local_files import patterns_of, shown, split_of_folder
from bottleneck.data.order import CHUNK, MIXED, SMALL, Order, shuffled
from bottleneck.data.readers import local_path, readable
from bottleneck.data.token_formats import Shard, by_number, files_in, open_shards

log = logging.getLogger(__name__)
EXACT = 1 << 28  # ids up to which every id is checked and hashed at the start; of a larger source, samples
SAMPLES = 4096  # places sampled of a larger source
SAMPLED = 64  # ids at each of them
SCANNED = 1 << 24  # ids scanned at once
REACH = 1 << 22  # ids searched for the end of a document
COSTLY = 16  # places sampled of a larger source that has to be decoded
JUDGED = 64  # shards whose documents are looked at for end-of-text, at most
TRIES = 1000  # least number of places at which documents to hold out are searched
PYTHIA_ROWS = 1024  # rows of one training step of Pythia: data.skip=stepN


class JoinedStream:
    """Shards as one stream of ids; end-of-text is put between documents that do not have it.

    Attributes:
        inserts: whether end-of-text is put after each document.
    """

    def __init__(self, shards: list[Shard], eos: int):
        self.shards, self.eos, self.closes = shards, eos, _Closes()
        self.inserts = _lack_end_of_text(shards, eos)
        lengths = [len(s.ids) + (self._documents(s) if self.inserts else 0) for s in shards]
        first, last = int(shards[0].ids[0:1][0]), int(shards[-1].ids[len(shards[-1].ids) - 1 : len(shards[-1].ids)][0])
        self.lead = int(self.inserts or first != eos)  # end-of-text before the first document
        self.tail = int(not self.inserts and last != eos)  # and after the last
        self.ends = self.lead + np.cumsum(lengths)

    @staticmethod
    def _documents(shard: Shard) -> int:
        return 1 if shard.documents is None else len(shard.documents) - 1

    def __len__(self) -> int:
        return int(self.ends[-1]) + self.tail

    def __getitem__(self, part: slice) -> np.ndarray:
        """Ids of a part of the stream, int64."""
        start, stop, _ = part.indices(len(self))
        out = np.empty(max(0, stop - start), np.int64)
        if start >= stop:
            return out
        if start < self.lead:
            out[0] = self.eos
        if stop > self.ends[-1]:
            out[-1] = self.eos
        at, end = max(start, self.lead), min(stop, int(self.ends[-1]))
        while at < end:
            i = int(np.searchsorted(self.ends, at, side="right"))
            begin = int(self.ends[i - 1]) if i else self.lead
            count = min(end, int(self.ends[i])) - at
            self._fill(out[at - start : at - start + count], self.shards[i], at - begin)
            at += count
        return out

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Ids [len(starts), length] of stretches of the stream, int64. They are read in the order of the files."""
        out = np.empty((len(starts), length), np.int64)
        shards = np.searchsorted(self.ends, starts, side="right")
        begins = np.concatenate([[self.lead], self.ends])[shards]
        ends = np.append(self.ends, 0)[shards]
        whole = (starts >= self.lead) & (starts + length <= ends) & (not self.inserts)
        places = [(k, int(i), int(at)) for k, i, at in zip(range(len(starts)), shards, starts - begins)]
        places.sort(key=lambda place: place[1:])
        for k, i, at in places:
            if whole[k]:
                self.shards[i].announce(at, at + length)
        for k, i, at in places:
            if whole[k]:
                out[k] = self.shards[i].ids[at : at + length]
            else:
                out[k] = self[int(starts[k]) : int(starts[k]) + length]
        return out

    def _fill(self, out: np.ndarray, shard: Shard, at: int) -> None:
        """Ids of one shard from its position `at` on, with the end-of-text tokens that are put in."""
        if not self.inserts:
            out[:] = shard.ids[at : at + len(out)]
            return
        starts: Any = shard.documents if shard.documents is not None else np.array([0, len(shard.ids)])
        # end-of-text of document i is at starts[i + 1] + i, because one was inserted after each document before it
        if len(starts) <= self.closes.most:
            closes = self.closes.of(shard, starts)
            first, last = np.searchsorted(closes, (at, at + len(out) - 1)).tolist()
            ends = closes[first : last + 1] - at
        else:
            documents = range(len(starts) - 1)
            first, last = (
                bisect.bisect_right(documents, place, key=lambda i: int(starts[i]) + i) - 1
                for place in (at, at + len(out) - 1)
            )
            ends = starts[first + 1 : last + 2] + np.arange(first, last + 1) - at
        is_id = np.ones(len(out), bool)
        is_id[ends[ends < len(out)]] = False
        out[~is_id] = self.eos
        out[is_id] = shard.ids[at - first : at - first + int(is_id.sum())]

    def max(self) -> int:
        """The largest id, of all or of samples."""
        return max(int(ids.max()) for _, ids in checked_parts(self.shards))


class _Closes:
    """Where documents end in the stream, of the shards that were used last: their end-of-text, counted from the shard's
    start.

    Attributes:
        most: documents of a shard, at most; of a larger one the places are looked up in its index.
    """

    most, kept = 1 << 22, 1 << 23  # documents of one shard, and of all that are kept

    def __init__(self) -> None:
        self.found: OrderedDict[int, np.ndarray] = OrderedDict()

    def of(self, shard: Shard, starts: Any) -> np.ndarray:
        key = id(shard)
        if key not in self.found:
            self.found[key] = np.asarray(starts[1:]) + np.arange(len(starts) - 1)
            while len(self.found) > 1 and sum(map(len, self.found.values())) > self.kept:
                self.found.popitem(last=False)
        self.found.move_to_end(key)
        return self.found[key]


def _lack_end_of_text(shards: list[Shard], eos: int) -> bool:
    """Whether the documents are stored without end-of-text between them, judged by up to 1,000 documents.

    In files without boundaries only end-of-text separates documents, so they are left as they are.
    """
    if any(shard.documents is None for shard in shards):
        return False
    seen = having = 0
    few = COSTLY if shards[0].costly else JUDGED
    judged = [shards[int(i)] for i in np.unique(np.linspace(0, len(shards) - 1, min(few, len(shards))).astype(int))]
    for shard in judged:
        documents: Any = shard.documents
        count = len(documents) - 1
        for i in {int(i) for i in np.linspace(0, count - 1, max(2, 1000 // len(judged)))}:
            start, stop = int(documents[i]), int(documents[i + 1])
            if stop > start:
                seen += 1
                having += eos in (int(shard.ids[start : start + 1][0]), int(shard.ids[stop - 1 : stop][0]))
    return 2 * having < seen


def checked_parts(shards: list[Shard]) -> Iterator[tuple[tuple[Shard, int], np.ndarray]]:
    """((shard, position in it), ids): all ids of a small source, samples of a large one."""
    sizes = np.array([len(s.ids) for s in shards])
    total = int(sizes.sum())
    if total <= EXACT:
        for shard, size in zip(shards, sizes.tolist()):
            for at in range(0, size, SCANNED):
                yield (shard, at), np.asarray(shard.ids[at : at + SCANNED])
        return
    ends = np.cumsum(sizes)
    for place in np.linspace(0, total - 1, COSTLY if any(s.costly for s in shards) else SAMPLES).astype(np.int64):
        i = int(np.searchsorted(ends, place, side="right"))
        at = max(0, min(int(place - ends[i] + sizes[i]), int(sizes[i]) - SAMPLED))
        yield (shards[i], at), np.asarray(shards[i].ids[at : at + SAMPLED])


def check_width(shards: list[Shard], limit: int) -> None:
    """Raises UserError for ids of 1 or 2 bytes that do not hold all ids of the tokenizer: larger ones were cut off."""
    for shard in shards:
        dtype = np.dtype(shard.ids.dtype)
        fits = dtype.itemsize > 2 or np.iinfo(dtype).max >= limit - 1
        check(
            fits,
            f"{shard.name}: holds ids of {8 * dtype.itemsize} bits, the tokenizer's go up to {limit - 1:,}: tokens of"
            " another tokenizer, or larger ids were cut off; write it again with ids of 32 bits",
        )


def check_ids(shards: list[Shard], limit: int) -> None:
    """Raises UserError naming shard, row and value of the first id that the tokenizer does not have."""
    for (shard, at), ids in checked_parts(shards):
        if len(ids) and (int(ids.max()) >= limit or int(ids.min()) < 0):
            wrong = int(np.flatnonzero((ids >= limit) | (ids < 0))[0])
            raise UserError(_bad_id(shard, at + wrong, int(ids[wrong]), limit))


def _bad_id(shard: Shard, at: int, value: int, limit: int) -> str:
    place = f"position {at}"
    rows: Any = shard.rows
    if rows is not None:
        row = bisect.bisect_right(range(len(rows) - 1), at, key=lambda i: int(rows[i])) - 1
        place = f"row {shard.first_row + row}"
    return f"{shard.name}: {place} holds id {value}; the tokenizer's ids end at {limit - 1}: of another tokenizer?"


# ---------------------------------------------------------------- rows
@dataclass
class Rows:
    """Rows of several shards: each is a sequence of T + 1 ids."""

    shards: list[Shard]
    length: int
    ends: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        counts = [len(s.ids) // self.length if s.rows is None else len(s.rows) - 1 for s in self.shards]
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> np.ndarray:
        """Ids [T + 1] of a row. Raises UserError if it has another length."""
        i = int(np.searchsorted(self.ends, row, side="right"))
        shard, own = self.shards[i], row - (int(self.ends[i - 1]) if i else 0)
        if shard.rows is None:
            return np.asarray(shard.ids[own * self.length : (own + 1) * self.length])
        start, stop = int(shard.rows[own]), int(shard.rows[own + 1])
        where = f"{shard.name}: row {shard.first_row + own} has {stop - start} ids"
        check(
            stop - start == self.length,
            f"{where}; data.packing=rows takes rows as they are, so data.block_size={self.length - 1} needs rows of"
            f" {self.length}; give data.block_size={stop - start - 1} where all rows are alike, or data.packing=join",
        )
        return np.asarray(shard.ids[start:stop])


# ---------------------------------------------------------------- the corpus
class TokenCorpus(Corpus):
    """Tokens in place, with the interface of `data.cache.Corpus`.

    Attributes:
        train: the training stream; sliced like an array. With data.packing=rows, all rows one after the other.
        validation: the validation stream, int64 [M].
        stride: ids from one validation block to the next: T, or T + 1 for rows.
    """

    def __init__(self, cfg: DataConfig, tokenizer: Any):
        self.seconds = None
        self.cfg, self.eos, self.block = cfg, int(tokenizer.eos_token_id), cfg.block_size
        self.limit = max(tokenizer.get_vocab().values()) + 1
        self.rows = cfg.packing == "rows"
        self.stride = self.block + self.rows
        train, validation = _files(cfg)
        self.shards = _opened("data.tokens", train, cfg)
        held = _opened("data.validation_files", validation, cfg) if validation else []
        check_width(self.shards + held, self.limit)
        check_ids(self.shards + held, self.limit)
        self.name = cfg.name or ",".join(readable(local_path(p).name) for p in as_list(cfg.tokens))
        self.stream = JoinedStream(self.shards, self.eos)
        self.train: Any = self.stream
        self.table = Rows(self.shards, self.block + 1)
        self.count = len(self.table) if self.rows else (len(self.stream) - 1) // self.block
        self.skip = skipped(cfg)
        least = f"data.block_size={self.block}: {self.name} has {len(self.stream):,} tokens, too few for one block"
        check(self.rows or self.count > 0, least)
        check(self.skip < self.count, f"data.skip={cfg.skip}: the source has {self.count} rows or blocks in all")
        self.held_out = np.zeros(0, np.int64)
        self._announced: deque[int] = deque(maxlen=2 * MIXED)
        if held:
            self.validation = self._given(held)
        elif self.rows:
            self.validation = self._hold_out_rows()
        else:
            self.validation = self._hold_out_documents()
        check(len(self.validation) > 1, f"data: no validation tokens in {self.name}; give data.validation_files")
        self._validation_bytes = self._bytes(tokenizer)
        self.folder = Path(train[0]).parent
        dtype = "uint16" if max(len(tokenizer), self.eos + 1) <= 2**16 else "uint32"
        self._identity, self.sampled = self._fingerprint(np.dtype(dtype))
        self.manifest = {"eos": self.eos, "dtype": dtype, "name": self.name}
        self._report(tokenizer)

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens, their order and their split; of a large source by samples."""
        return self._identity

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the decoded validation documents."""
        return self._validation_bytes

    def validation_parts(self, block: int) -> list[ValidationPart]:
        """The validation text; rows do not overlap."""
        return [ValidationPart(self.name, self.validation, self.stride, self.validation_bytes)]

    def order(self, seed: int, block: Optional[int] = None) -> Order:
        """The order of the training blocks or rows."""
        assert block in (None, self.block), "token files are opened for one length of sequence"
        return Order(self.count, seed, self.skip, self.held_out, self.cfg.order)

    def read(self, indices: np.ndarray, block: Optional[int] = None) -> np.ndarray:
        """Ids [len(indices), T + 1] of some blocks or rows. Raises UserError for an id that the tokenizer lacks."""
        T = self.block
        if self.cfg.order == "chunks":
            self._announce(np.unique((indices - self.skip) // CHUNK).tolist())
        if self.rows:
            out = np.empty((len(indices), T + 1), np.int64)
            for line, i in zip(out, indices.tolist()):
                line[:] = self.table[i]
        else:
            out = self.stream.gather(indices * T, T + 1)
        if self.sampled and (out.max(initial=0) >= self.limit or out.min(initial=0) < 0):
            line, column = np.argwhere((out >= self.limit) | (out < 0))[0]
            what = f"{'row' if self.rows else 'block'} {indices[line]} of {self.name}"
            raise UserError(f"{what} holds id {out[line, column]}; the tokenizer's ids end at {self.limit - 1}")
        return out

    def _announce(self, chunks: list[int]) -> None:
        """Ask the system to read stretches ahead, each once."""
        for chunk in chunks:
            if chunk in self._announced:
                continue
            self._announced.append(chunk)
            first = self.skip + chunk * CHUNK
            for shard, start, stop in self._places(first, min(first + CHUNK, self.count)):
                shard.announce(start, stop)

    def _places(self, first: int, last: int) -> Iterator[tuple[Shard, int, int]]:
        """Parts of the shards that hold the sequences from `first` up to `last`; end-of-text put in is not counted."""
        ends = self.table.ends if self.rows else self.stream.ends // self.block
        for i in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
            begin = int(ends[i - 1]) if i else 0
            if begin >= last:
                break
            shard, count = self.shards[i], max(1, int(ends[i]) - begin)
            share = [len(shard.ids) * (max(begin, min(k, int(ends[i]))) - begin) // count for k in (first, last)]
            yield shard, share[0], share[1]

    def _given(self, shards: list[Shard]) -> np.ndarray:
        """Whole documents or rows of validation files, up to data.validation_tokens."""
        limit = self.cfg.validation_tokens
        if self.rows:
            table = Rows(shards, self.block + 1)
            return np.concatenate([table[i] for i in range(min(len(table), -(-limit // self.block)))])
        stream, at = JoinedStream(shards, self.eos), limit
        while at < len(stream):  # a document is kept if the limit is not passed before it
            ends = np.flatnonzero(stream[at : at + SCANNED] == self.eos)
            if len(ends):
                return stream[: at + int(ends[0]) + 1]
            at += SCANNED
        return stream[: len(stream)]

    def _wanted(self) -> int:
        """Tokens to hold out if no validation files are given."""
        have = (self.count - self.skip) * self.block
        return max(1, min(self.cfg.validation_tokens, int(have * self.cfg.validation_fraction)))

    def _hold_out_rows(self) -> np.ndarray:
        """Hold some rows out: the last ones in the order of the source, else a random choice."""
        have = self.count - self.skip
        check(have > 1, f"data: {self.name} has {have} rows, too few to hold one out; give data.validation_files")
        wanted = min(max(1, self._wanted() // self.block), have - 1)
        if self.cfg.order == "source":
            chosen = np.arange(self.count - wanted, self.count)
        elif have <= SMALL:
            chosen = self.skip + np.random.default_rng([self.cfg.seed, 1]).permutation(have)[:wanted]
        else:
            chosen = self.skip + shuffled(np.arange(wanted), have, self.cfg.seed + 1)
        self.held_out = np.sort(chosen)
        return np.concatenate([self.table[i] for i in self.held_out.tolist()]).astype(np.int64)

    def _hold_out_documents(self) -> np.ndarray:
        """Hold documents out, and all blocks that overlap them: the last ones of the source, or a random choice."""
        T, stream, wanted, begin = self.block, self.stream, self._wanted(), self.skip * self.block
        spans: dict[int, int] = {}  # first id of a document: the end-of-text after it
        rng = np.random.default_rng([self.cfg.seed, 1])
        position, kept = len(stream) - 1, 0
        for _ in range(TRIES + wanted // 100):
            if kept >= wanted or position <= begin:
                break
            at = position - 1 if self.cfg.order == "source" else int(rng.integers(begin, len(stream) - 1))
            start, stop = self._document_at(at)
            position = start - 1
            if start < stop and start not in spans and start > begin:
                spans[start] = stop
                kept += stop - start + 1
        enough = kept > 0 and kept < 0.5 * (len(stream) - begin)
        check(enough, f"data: {self.name} has too few documents to hold one out; give data.validation_files")
        pieces, blocks = [np.array([self.eos])], []
        for start, stop in sorted(spans.items()):
            pieces += [stream[start:stop], np.array([self.eos])]
            blocks.append(np.arange(max(0, -(-start // T) - 1), (stop - 1) // T + 1))
        self.held_out = np.unique(np.concatenate(blocks))
        self.held_out = self.held_out[self.held_out < self.count]
        return np.concatenate(pieces).astype(np.int64)

    def _document_at(self, at: int) -> tuple[int, int]:
        """First id of the document around a position, and the position of the end-of-text after it."""
        stream, step = self.stream, 1 << 12
        start, stop = at, at
        while start > 0 and at - start < REACH:
            before = np.flatnonzero(stream[max(0, start - step) : start] == self.eos)
            if len(before):
                start = max(0, start - step) + int(before[-1]) + 1
                break
            start, step = max(0, start - step), 2 * step
        step = 1 << 12
        while stop < len(stream) and stop - at < REACH:
            after = np.flatnonzero(stream[stop : stop + step] == self.eos)
            if len(after):
                return start, stop + int(after[0])
            stop, step = stop + step, 2 * step
        return start, min(stop, len(stream) - 1)

    def _bytes(self, tokenizer: Any) -> int:
        ids = self.validation
        ends = np.flatnonzero(ids == self.eos)
        pieces = np.split(ids, ends)
        return sum(
            len(tokenizer.decode(p[p != self.eos].tolist()).encode("utf-8", "replace")) for p in pieces if len(p)
        )

    def _fingerprint(self, dtype: np.dtype) -> tuple[str, bool]:
        """Identity of the tokens, and whether it rests on samples. Joined tokens have the identity of prepared text."""
        held = np.ascontiguousarray(self.validation.astype(dtype))
        exact = len(self.stream) <= EXACT
        value = 0
        if exact:
            for at in range(0, len(self.stream), SCANNED):
                value = zlib.crc32(np.ascontiguousarray(self.stream[at : at + SCANNED].astype(dtype)).data, value)
        else:
            for _, ids in checked_parts(self.shards):
                value = zlib.crc32(np.ascontiguousarray(ids.astype(dtype)).data, value)
        parts = [f"train:{len(self.stream)}:{value:08x}", f"validation:{len(held)}:{zlib.crc32(held.data):08x}"]
        if not exact:
            parts.append("sampled")
        if self.rows or self.skip or self.cfg.order != "shuffled" or len(self.held_out):
            held_out = zlib.crc32(np.ascontiguousarray(self.held_out).data)
            parts.append(f"{self.cfg.packing}:{self.cfg.order}:{self.skip}:{held_out:08x}")
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16], not exact

    def _report(self, tokenizer: Any) -> None:
        kind = f"{self.count:,} rows" if self.rows else f"{len(self.stream):,} tokens"
        ends = "end-of-text is put between documents" if self.stream.inserts else "documents end as in the source"
        taken = f"data.packing={self.cfg.packing}" + ("" if self.rows else f", {ends}")
        log.info("%s: %s in place (%s), %s validation tokens", self.name, kind, taken, f"{len(self.validation):,}")
        sample = tokenizer.decode(self.validation[:40].tolist())
        log.info("token files do not name their tokenizer, so it cannot be checked; decoded, they begin: %r", sample)
        log.info("copies of validation documents among the training tokens are not looked for: no shard is read ahead")


def skipped(cfg: DataConfig) -> int:
    """Rows or blocks that `data.skip` leaves out: a number, or stepN for N steps of Pythia's training."""
    text = str(cfg.skip)
    if text.startswith("step") and text[4:].isdigit():
        return int(text[4:]) * PYTHIA_ROWS
    check(text.isdigit(), f"data.skip={cfg.skip}: must be a number of rows or blocks, or stepN")
    return int(text)


def _files(cfg: DataConfig) -> tuple[list[str], list[str]]:
    """Training and validation files: of `data.tokens` and `data.validation_files`, or split by names in a folder."""
    train: list[str] = []
    validation: list[str] = []
    for pattern in patterns_of("data.tokens", cfg.tokens):
        folder, files = local_path(pattern), _matching("data.tokens", pattern)
        names = [str(Path(f).relative_to(folder)) for f in files] if folder.is_dir() else []
        split = split_of_folder(names, folder) if names else None
        if split is None or split.by is None or (cfg.validation_files is not None and not split.train):
            train += files
            continue
        train += [str(folder / name) for name in split.train]
        if cfg.validation_files is None:
            validation += [str(folder / name) for name in split.validation]
        said = f"training: {shown(split.train)}" + (f"; validation: {shown(validation)}" if validation else "")
        log.info("data.tokens=%s is split by the %s: %s", readable(pattern), split.by, said)
    if cfg.validation_files is not None:
        for pattern in patterns_of("data.validation_files", cfg.validation_files):
            validation += _matching("data.validation_files", pattern)
    held = {Path(f).resolve() for f in validation}
    train = [f for f in train if Path(f).resolve() not in held]
    check(bool(train), f"data.tokens={cfg.tokens}: only validation files there, nothing to train on")
    return train, validation


def _matching(key: str, pattern: str) -> list[str]:
    """Token files of a folder, a file, a glob, or of a Megatron name without its ending."""
    path = local_path(pattern)
    where = f"{key}={readable(pattern)}"
    if path.is_dir():
        found = [str(path / name) for name in files_in(path)]
        check(bool(found), f"{where}: the folder holds no token files")
        return found
    if path.suffix == ".idx" and path.is_file():
        own = path.with_suffix(".bin")
        found = (
            [str(own)] if own.is_file() else sorted(glob.glob(f"{glob.escape(str(path.with_suffix('')))}-*-of-*.bin"))
        )
        check(bool(found), f"{where}: there is no .bin file to this index")
        return found
    if path.is_file():
        return [str(path)]
    if path.with_name(path.name + ".bin").is_file():
        return [str(path) + ".bin"]
    found = [p for p in glob.glob(str(path), recursive=True) if Path(p).is_file() and not p.endswith(".idx")]
    found.sort(key=by_number)
    check(bool(found), f"{where}: no such file; give a file, a folder, a glob, or a Megatron name without .bin")
    return found


def _opened(key: str, files: list[str], cfg: DataConfig) -> list[Shard]:
    shards = open_shards([Path(f) for f in files], cfg.format, cfg.ids_field)
    check(bool(shards), f"{key}: there are no tokens in {readable(files[0])}" + (" …" if len(files) > 1 else ""))
    return shards

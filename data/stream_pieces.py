"""A Hub stream as pieces of tokens on disk, made by every process that waits for the text.

A stream is cut into lanes, each with files of its own, and a lane into pieces of some documents. The text is piece 0 of
every lane, piece 1 of every lane, and so on, up to the limit on tokens. So it does not depend on how many processes
make it, or on when they are stopped: a process takes the first piece whose lane no other process has, a lock on the
lane ends with its process, and each piece holds the state of its lane behind it.

Processes on several machines share the work if they share `data.cache_dir`.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np
from filelock import FileLock, Timeout

from bottleneck.config.schema import DataConfig
from bottleneck.core.files import write_atomic
from bottleneck.data.cache import PARTS
from bottleneck.data.encode import Encode, Writer, joined
from bottleneck.data.held_out import FIRST_DOCUMENTS, HashSplit, check_several, document_hash
from bottleneck.data.hub_streams import HubSplit, Lane, Tables, hub_split
from bottleneck.data.readers import RowCounts
from bottleneck.data.sources import LANES, RowJoiner, Source

log = logging.getLogger(__name__)
MOST_CHARS = 1 << 25  # characters of a piece, at most and …
LEAST_CHARS = 1 << 14  # … at least
CHARS_A_TOKEN = 4
ROUNDS = 4  # pieces of each lane that a limit on tokens is made of, about
IN_FLIGHT = 2  # pieces that are tokenised while another is read
POLL_SECONDS = 0.1  # between two looks for a piece that can be made
PROGRESS_SECONDS = 5.0
ARRAYS = ("ids", "lengths", "sizes", "hashes")  # of a part of a piece: as `joined` returns them, and for each document

Job = tuple[int, int]  # piece, lane: their order is that of the text
Choose = Callable[[int], Optional[str]]  # the hash of a document to its part; None leaves it out


@dataclass
class Piece:
    """What is known about a stored piece.

    Attributes:
        tokens: those that count towards the limit.
        ended: whether it is the last of its lane.
        state: of the lane behind it.
    """

    tokens: int
    ended: bool
    counts: dict[str, int]
    documents: int
    blank: int
    copies: int
    state: dict[str, Any]


class Reading:
    """A lane that this process has. `piece` is the number of the one that is read next, None behind the last."""

    def __init__(self, lane: Lane, lock: Any, joiner: Optional[RowJoiner], piece: int, state: Optional[dict]):
        self.lock, self.joiner = lock, joiner
        self.piece: Optional[int] = piece
        self.stream = state["stream"] if state else None
        if joiner and state:
            joiner.document = list(state["begun"])
        self.tables: Tables = lane.tables(self.stream)

    @property
    def counts(self) -> RowCounts:
        """Rows of the lane that were read so far."""
        return RowCounts(**self.stream["counts"]) if self.stream else RowCounts()

    @property
    def state(self) -> dict[str, Any]:
        """From which the lane goes on."""
        return {"stream": self.stream, "begun": self.joiner.document if self.joiner else []}

    def read(self, chars: int, least: int) -> tuple[list[str], bool]:
        """Documents of at least `chars` characters, and `least` of them; and whether they are the last."""
        found: list[str] = []
        size = 0
        for texts, state in self.tables:
            self.stream = state
            found += self.joiner.add(texts) if self.joiner else texts
            size += sum(map(len, texts))
            if size >= chars and len(found) >= least and self.piece is not None:
                self.piece += 1
                return found, False
        self.piece = None
        if self.joiner and self.joiner.document:
            found.append(self.joiner.end())
        return found, True


class Pieces:
    """The pieces of one split.

    Args:
        folder: of the pieces, which exists.
        part: train or validation: whose tokens count towards the limit.
        split: the stream.
        choose: the part of a document by its hash, see `StreamedText`.
        seed: of the hashes.
        first: called with the hashes of the first documents before any is chosen; None if nothing depends on them.
        tokenise: texts to arrays, see `joined`.
    """

    def __init__(
        self, folder: Path, part: str, cfg: DataConfig, split: HubSplit, choose: Choose, seed: int,
        first: Optional[FirstDocuments], tokenise: Callable[[list[str]], tuple], pool: Executor,
    ):  # fmt: skip
        self.folder, self.part, self.cfg, self.lanes = folder, part, cfg, split.lanes
        self.choose, self.seed, self.first, self.tokenise, self.pool = choose, seed, first, tokenise, pool
        self.limit = cfg.max_tokens if part == "train" else cfg.validation_tokens
        self.chars = MOST_CHARS
        if self.limit is not None:
            share = self.limit * CHARS_A_TOKEN // (ROUNDS * max(1, len(self.lanes)))
            self.chars = min(MOST_CHARS, max(LEAST_CHARS, share))
        self.known: dict[Job, Piece] = {}
        self.mine: dict[int, Reading] = {}
        self.flying: dict[Job, Future[Piece]] = {}
        self.said = time.monotonic()

    def make(self, built: Callable[[], bool]) -> None:
        """Make pieces until all that are needed are there, or the whole text is `built` by another process."""
        self._look()
        if self.known and self._missing():
            log.info("going on after %s pieces of tokens that were made before", f"{len(self.known):,}")
        try:
            while not built():
                self._receive(wait=len(self.flying) > IN_FLIGHT)
                self._look()
                jobs = self._missing()
                if not jobs:
                    break
                if self.first is not None and not self.first.known:  # what is held out is not decided yet
                    jobs = [job for job in jobs if job == (0, 0)]
                found = next(((j, r) for j in jobs if j not in self.flying if (r := self._lane_of(j, built))), None)
                if found is not None:
                    self._start(*found)
                elif self.flying:
                    self._receive(wait=True)
                else:
                    time.sleep(POLL_SECONDS)
            while self.flying:
                self._receive(wait=True)
        finally:
            for future in self.flying.values():
                future.cancel()
                future.exception() if not future.cancelled() else None
            for reading in self.mine.values():
                reading.lock.release()
            self.mine.clear()
            self.flying.clear()

    def _file(self, job: Job) -> Path:
        return self.folder / f"{self.part}-{job[0]:06d}-{job[1]:03d}.npz"

    def _look(self) -> None:
        """Take note of pieces that any process has stored."""
        for path in self.folder.glob(f"{self.part}-*.npz"):
            piece, lane = map(int, path.stem.split("-")[1:])
            if (piece, lane) not in self.known:
                with np.load(path) as stored:
                    self.known[piece, lane] = Piece(**json.loads(str(stored["about"])))

    def _needed(self) -> Iterator[Job]:
        """The pieces in the order of the text, up to the limit as far as it is known."""
        ended: set[int] = set()
        total = 0
        for piece in itertools.count():
            for lane in range(len(self.lanes)):
                if lane in ended:
                    continue
                if self.limit is not None and total > self.limit:
                    return
                yield piece, lane
                known = self.known.get((piece, lane))
                total += known.tokens if known else 0
                if known is not None and known.ended:
                    ended.add(lane)
            if len(ended) == len(self.lanes):
                return

    def _missing(self) -> list[Job]:
        """The first pieces that are needed and not stored, of this round and the next."""
        missing: list[Job] = []
        for job in self._needed():
            if missing and job[0] > missing[0][0] + 1:
                break
            if job not in self.known:
                missing.append(job)
        return missing

    def _lane_of(self, job: Job, built: Callable[[], bool]) -> Optional[Reading]:
        """The lane of a piece, if it can be had and is read up to there."""
        piece, lane = job
        before = self.known.get((piece - 1, lane))
        behind = self.mine[lane].piece if lane in self.mine else None
        if before is not None and behind is not None and behind < piece:  # made by another process all the same:
            self.mine.pop(lane).lock.release()  # some file systems have no locks
        if lane not in self.mine and (piece == 0 or before is not None):
            lock = FileLock(self.folder / f"{self.part}-{lane:03d}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return None
            if self._file(job).exists() or built():  # stored since, or even used and removed: in this order
                lock.release()
                return None
            joiner = RowJoiner(self.cfg.document_start) if self.cfg.document_start else None
            self.mine[lane] = Reading(self.lanes[lane], lock, joiner, piece, before.state if before else None)
        own = self.mine.get(lane)
        return own if own is not None and own.piece == piece else None

    def _start(self, job: Job, reading: Reading) -> None:
        """Read a piece; its tokens are made in the background."""
        deciding = self.first is not None and job == (0, 0)
        before = reading.counts
        read, ended = reading.read(self.chars, FIRST_DOCUMENTS if deciding else 1)
        documents = [d for d in read if d.strip()]
        hashes = [document_hash(d, self.seed) for d in documents]
        if deciding and self.first is not None:
            self.first.decide(hashes[:FIRST_DOCUMENTS])
        about = Piece(0, ended, asdict(reading.counts - before), len(documents), len(read) - len(documents), 0,
                      json.loads(json.dumps(reading.state)))  # fmt: skip
        self.flying[job] = self.pool.submit(self._store, job, about, documents, hashes)

    def _store(self, job: Job, about: Piece, documents: list[str], hashes: list[int]) -> Piece:
        arrays: dict[str, np.ndarray] = {}
        chosen = [self.choose(value) for value in hashes]
        for part in PARTS:
            mine = [i for i, one in enumerate(chosen) if one == part]
            if mine:
                made = self.tokenise([documents[i] for i in mine])
                own = (*made, np.array([hashes[i] for i in mine], np.uint64))
                arrays |= {f"{part}_{name}": array for name, array in zip(ARRAYS, own)}
        about.tokens = len(arrays.get(f"{self.part}_ids", ()))
        about.copies = chosen.count(None)

        def write(path: Path) -> None:
            with open(path, "wb") as f:
                np.savez(f, about=np.array(json.dumps(asdict(about))), **arrays)  # type: ignore[arg-type]

        write_atomic(self._file(job), write)
        return about

    def _receive(self, wait: bool) -> None:
        """Take note of pieces that are stored; a lane that has ended is given back."""
        for job, future in list(self.flying.items()):
            if wait or future.done():
                wait = False
                self.known[job] = future.result()
                del self.flying[job]
                if self.known[job].ended:
                    self.mine.pop(job[1]).lock.release()
        if time.monotonic() - self.said > PROGRESS_SECONDS:
            self.said = time.monotonic()
            log.info("  %.1fM tokens in %d pieces", sum(p.tokens for p in self.known.values()) / 1e6, len(self.known))

    def stored(self) -> Iterator[tuple[Piece, dict[str, tuple]]]:
        """(what is known, the arrays of each part that has documents) of the pieces in the order of the text."""
        for job in self._needed():
            with np.load(self._file(job)) as stored:
                has = [part for part in PARTS if f"{part}_ids" in stored]
                yield self.known[job], {part: tuple(stored[f"{part}_{name}"] for name in ARRAYS) for part in has}


class FirstDocuments:
    """The hash of the first documents that is held out, however small the text is; stored for all processes."""

    def __init__(self, file: Path):
        self.file = file

    @property
    def known(self) -> bool:
        return self.file.exists()

    @cached_property
    def forced(self) -> int:
        return int(json.loads(self.file.read_text()))

    def decide(self, hashes: list[int]) -> None:
        write_atomic(self.file, lambda part: part.write_text(json.dumps(min(hashes, default=-1))))


class StreamedText:
    """A Hub stream and its pieces.

    Args:
        folder: of the pieces; those of other files are removed.
        built: whether another process has built the whole text.
    """

    def __init__(self, folder: Path, source: Source, encode: Encode, eos: int, built: Callable[[], bool]):
        self.folder, self.source, self.cfg, self.built = folder, source, source.cfg, built
        self.tokenise = lambda texts: joined(texts, encode, eos)
        self.pieces: dict[str, Pieces] = {}

    def make(self, pool: Executor) -> None:
        """Make all pieces, tokenised in `pool`, together with the other processes that do."""
        try:
            self._make_all(pool)
        except FileNotFoundError:  # another process has built the text and removed the pieces
            if not self.built():
                raise

    def _make_all(self, pool: Executor) -> None:
        cfg, folder = self.cfg, self.folder
        folder.mkdir(parents=True, exist_ok=True)
        train = hub_split(cfg, cfg.split, LANES)
        self._forget_others(train.identity)
        if cfg.validation_split is None:
            first = FirstDocuments(folder / "first.json")
            split = HashSplit(cfg.seed, cfg.validation_fraction)

            def held_out(value: int) -> str:
                return "validation" if split.is_held(value, first.forced) else "train"

            self._make("train", train, held_out, cfg.seed, first, pool)
            return
        self._make("validation", hub_split(cfg, cfg.validation_split, LANES), lambda value: "validation", 0, None, pool)
        held: set[int] = set()
        tokens = 1
        for _, parts in self.pieces["validation"].stored():
            _, lengths, _, hashes = parts.get("validation", (None, *3 * (np.zeros(0, np.int64),)))
            kept = tokens + np.cumsum(lengths) - lengths <= cfg.validation_tokens  # as `Writer` keeps them
            held.update(hashes[kept].tolist())
            tokens += int(lengths.sum())
        self._make("train", train, lambda value: None if value in held else "train", 0, None, pool)

    def _make(
        self, part: str, split: HubSplit, choose: Choose, seed: int, first: Optional[FirstDocuments], pool: Executor
    ) -> None:
        self.pieces[part] = Pieces(self.folder, part, self.cfg, split, choose, seed, first, self.tokenise, pool)
        self.pieces[part].make(self.built)

    def _forget_others(self, identity: str) -> None:
        """Remove pieces of a data set whose files were others."""
        about = self.folder / "identity.json"
        with FileLock(self.folder / "identity.lock"):
            if not about.exists() or json.loads(about.read_text()) != identity:
                for path in [*self.folder.glob("*.npz"), *self.folder.glob("first.json")]:
                    path.unlink()
                write_atomic(about, lambda part: part.write_text(json.dumps(identity)))

    def write(self, train: Writer, validation: Writer) -> int:
        """Write the documents of the pieces up to the limits. Returns how many are copies of validation documents."""
        writers = {"train": train, "validation": validation}
        copies = 0
        different: set[int] = set()
        for name, pieces in self.pieces.items():
            for piece, parts in pieces.stored():
                self.source.counts += RowCounts(**piece.counts)
                self.source.documents += piece.documents
                self.source.blank += piece.blank
                copies += piece.copies
                for part, (ids, lengths, sizes, hashes) in parts.items():
                    writers[part].offered += len(lengths)
                    writers[part].append(ids, lengths, sizes)
                    if len(different) < 2:
                        different.update(hashes[:1000].tolist())
                if writers[name].full:
                    break
        if self.cfg.validation_split is None:
            check_several(different)
        return copies

    def remove(self) -> None:
        """Remove the pieces, once the text is built."""
        shutil.rmtree(self.folder, ignore_errors=True)

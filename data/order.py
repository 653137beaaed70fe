"""The order in which the sequences of token files are read, computed where it is needed: nothing grows with the source.

shuffled   any order, by data.seed
chunks     stretches of 1,024 sequences in random order, the sequences of 16 of them mixed: for slow disks, and for
           parquet, which is decoded a row group at a time
source     as they are stored
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Optional, Protocol

import numpy as np

SMALL = 1 << 24  # sequences up to which a random order is an array in memory, as for prepared text
CHUNK = 1024  # sequences of a stretch
MIXED = 16  # stretches whose sequences are mixed


class Arrangement(Protocol):
    """A permutation of 0 … size−1."""

    def at(self, places: np.ndarray) -> np.ndarray:
        """The sequences at some places of the order."""

    def places(self, sequences: np.ndarray) -> np.ndarray:
        """The places of some sequences."""


class AsStored:
    """The identity."""

    def at(self, places: np.ndarray) -> np.ndarray:
        return places

    def places(self, sequences: np.ndarray) -> np.ndarray:
        return sequences


class InMemory:
    """A random permutation that is stored."""

    def __init__(self, size: int, seed: int):
        self.order = np.random.default_rng(seed).permutation(size)

    def at(self, places: np.ndarray) -> np.ndarray:
        return self.order[places]

    def places(self, sequences: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.isin(self.order, sequences))  # in the order of the places


class Computed:
    """A pseudo-random permutation that is not stored, see `shuffled`."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed

    def at(self, places: np.ndarray) -> np.ndarray:
        return shuffled(places, self.size, self.seed)

    def places(self, sequences: np.ndarray) -> np.ndarray:
        return shuffled(sequences, self.size, self.seed, inverse=True)


class Chunks:
    """Stretches of CHUNK sequences in random order; windows of MIXED stretches, each shuffled.

    A last stretch that is shorter stays last.
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        self.stretches = np.random.default_rng([seed, 2]).permutation(size // CHUNK)
        self.inverse = np.argsort(self.stretches)
        window = CHUNK * MIXED
        self.mixed = lru_cache(4)(
            lambda w: np.random.default_rng([seed, 3, w]).permutation(min(window, size - w * window))
        )

    def _mix(self, places: np.ndarray, *, back: bool) -> np.ndarray:
        out = np.empty(len(places), np.int64)
        windows = places // (CHUNK * MIXED)
        for w in np.unique(windows).tolist():
            mine, begin = windows == w, w * CHUNK * MIXED
            order = np.argsort(self.mixed(w)) if back else self.mixed(w)
            out[mine] = begin + order[places[mine] - begin]
        return out

    def _move(self, places: np.ndarray, stretches: np.ndarray) -> np.ndarray:
        out = np.array(places, np.int64)
        whole = out < len(stretches) * CHUNK
        out[whole] = stretches[out[whole] // CHUNK] * CHUNK + out[whole] % CHUNK
        return out

    def at(self, places: np.ndarray) -> np.ndarray:
        return self._move(self._mix(places, back=False), self.stretches)

    def places(self, sequences: np.ndarray) -> np.ndarray:
        return self._mix(self._move(sequences, self.inverse), back=True)


class Order:
    """The order in which sequences are read: `order[a:b]` or `order[k]`, k an array of places.

    Args:
        count: sequences there are.
        seed: of the shuffling.
        skip: sequences at the start that are left out.
        held_out: sequences that are kept for validation.
        kind: shuffled, chunks or source.
    """

    def __init__(self, count: int, seed: int, skip: int, held_out: np.ndarray, kind: str = "shuffled"):
        self.skip, self.size = skip, max(0, count - skip)
        self.arrangement: Arrangement = AsStored()
        if kind == "chunks":
            self.arrangement = Chunks(self.size, seed)
        elif kind == "shuffled":
            self.arrangement = InMemory(self.size, seed) if self.size <= SMALL else Computed(self.size, seed)
        held = held_out[held_out >= skip] - skip
        # place k of the order without them is place k + (number of theirs that are not behind it) of the whole order
        self.gaps = np.sort(self.arrangement.places(held)) - np.arange(len(held)) if len(held) else held

    def __len__(self) -> int:
        return self.size - len(self.gaps)

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        k = np.arange(*part.indices(len(self))) if isinstance(part, slice) else part
        return self.arrangement.at(k + np.searchsorted(self.gaps, k, side="right")) + self.skip


class Plan:
    """The sequences of all epochs, one after the other: `plan[a:b]`.

    The first epoch reads the first `needed` sequences of an order, each further one reads them in an order of its own.
    """

    def __init__(self, order: Any, needed: int, epochs: int, seed: int):
        self.order, self.needed, self.epochs, self.seed = order, needed, epochs, seed
        self.stored: Optional[np.ndarray] = None
        if needed <= SMALL:
            first = order[:needed]
            again = (np.random.default_rng([seed, epoch]).permutation(first) for epoch in range(1, epochs))
            self.stored = np.concatenate([first, *again])

    def __getitem__(self, part: slice) -> np.ndarray:
        if self.stored is not None:
            return self.stored[part]
        start, stop, _ = part.indices(self.needed * self.epochs)
        pieces = [np.zeros(0, np.int64)]
        while start < stop:
            epoch, at = divmod(start, self.needed)
            count = min(stop - start, self.needed - at)
            pieces.append(self._of_epoch(epoch, np.arange(at, at + count)))
            start += count
        return np.concatenate(pieces)

    def _of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if epoch == 0:
            return self.order[int(places[0]) : int(places[-1]) + 1]
        return self.order[shuffled(places, self.needed, int(np.random.default_rng([self.seed, epoch]).integers(2**62)))]


def shuffled(indices: np.ndarray, size: int, seed: int, inverse: bool = False) -> np.ndarray:
    """The images of some indices under a pseudo-random permutation of 0 … size−1, which is not stored; or its inverse.

    A Feistel network of six rounds over the next even number of bits; values beyond `size` are sent through it again.
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng([seed, size]).integers(0, 2**63, 6).astype(np.uint64)

    def mixed(right: np.ndarray, k: np.uint64) -> np.ndarray:
        value = (right + k) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
        value *= np.uint64(0xBF58476D1CE4E5B9)
        return (value ^ (value >> np.uint64(32))) & mask

    def once(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half), values & mask
        for k in keys[::-1] if inverse else keys:
            left, right = (right ^ mixed(left, k), left) if inverse else (right, left ^ mixed(right, k))
        return (left << np.uint64(half)) | right

    values = once(indices.astype(np.uint64))
    while (beyond := values >= size).any():
        values[beyond] = once(values[beyond])
    return values.astype(np.int64)

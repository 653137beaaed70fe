"""Several texts mixed by weight into one corpus, each with its own validation text.

Which source a sequence comes from is not drawn: sequence k of a source with weight w stands at the time (k + ½) / w,
and sequences are read in the order of their times. So at every place of the order a source's share is exact to about
one sequence. Within a source, sequences have the order that they have without a mix; a source that ends begins again,
in another order.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np

from bottleneck.config.schema import DataConfig
from bottleneck.core.errors import check
from bottleneck.data.cache import Corpus, ValidationPart
from bottleneck.data.order import shuffled

log = logging.getLogger(__name__)
PERIOD = 4096  # time of a window; sequences are sorted by their times within one
SHARED = ("block_size", "seed", "cache_dir", "validation_fraction", "validation_tokens", "bad_rows", "streaming")
SOURCE_BITS = 48  # a sequence's number is source · 2^48 + its number in the source


def sources_of(cfg: DataConfig) -> dict[str, DataConfig]:
    """The config of each source: its own keys, and those that are the same for all."""
    shared = {k: getattr(cfg, k) for k in SHARED}
    of_streams = {"max_tokens": cfg.max_tokens}  # a stream has to end somewhere
    own = {name: (of_streams if "dataset" in cfg.sources[name] else {}) | cfg.sources[name] for name in cfg.mix}
    return {name: DataConfig(**{"name": name} | shared | given) for name, given in own.items()}


class MixOrder:
    """The order in which the sequences of several sources are read: `order[a:b]`.

    Args:
        orders: of each source: `len`, and `order[k]` for an array k.
        weights: of each source; their sum is 1.
        epochs: how often a source may be read, at most.
    """

    def __init__(self, orders: Sequence[Any], weights: Sequence[float], epochs: int, seed: int):
        self.orders, self.weights, self.epochs, self.seed = orders, np.array(weights), epochs, seed
        self.window = lru_cache(4)(self._window)
        # the first time at which a source would be read once too often
        ends = [(epochs * len(o) + 0.5) / w for o, w in zip(orders, weights)]
        self.shortest = int(np.argmin(ends))
        self.length = self._length(ends[self.shortest])

    def _counts(self, window: int) -> np.ndarray:
        """Sequences of each source before a window."""
        return np.maximum(0, np.ceil(self.weights * (window * PERIOD) - 0.5)).astype(np.int64)

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources [N] of a window's sequences, and which of their source's sequences they are [N]."""
        first, last = self._counts(window), self._counts(window + 1)
        source = np.repeat(np.arange(len(first)), last - first)
        own = np.concatenate([np.arange(a, b) for a, b in zip(first, last)])
        order = np.lexsort((source, (own + 0.5) / self.weights[source]))
        return source[order], own[order]

    def _length(self, end: float) -> int:
        limits = np.array([self.epochs * len(o) for o in self.orders])
        for window in range(max(0, int(end / PERIOD) - 1), int(end / PERIOD) + 2):
            source, own = self.window(window)
            beyond = np.flatnonzero(own >= limits[source])
            if len(beyond):
                return int(self._counts(window).sum() + beyond[0])
        raise AssertionError("a source ends within a window of its end")

    def __len__(self) -> int:
        return self.length

    def places(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources of the sequences at places start … stop−1, and which of their source's sequences they are."""
        window = max(0, start // PERIOD - 1)
        while self._counts(window + 1).sum() <= start:
            window += 1
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        at = int(self._counts(window).sum())
        begin = at
        while at < stop or not pieces:
            pieces.append(self.window(window))
            at, window = at + len(pieces[-1][0]), window + 1
        source, own = (np.concatenate(p)[start - begin : stop - begin] for p in zip(*pieces))
        return source, own

    def __getitem__(self, part: slice) -> np.ndarray:
        source, own = self.places(*part.indices(self.length)[:2])
        out = np.empty(len(source), np.int64)
        for i, order in enumerate(self.orders):
            mine = np.flatnonzero(source == i)
            epoch, place = np.divmod(own[mine], len(order))
            for e in np.unique(epoch[epoch > 0]).tolist():
                again = int(np.random.default_rng([self.seed, i, e]).integers(2**62))
                place[epoch == e] = shuffled(place[epoch == e], len(order), again)
            out[mine] = (i << SOURCE_BITS) + order[place]
        return out

    def reads(self, needed: int) -> list[float]:
        """How often each source is read in the first `needed` sequences."""
        return [needed * w / len(o) for w, o in zip(self.weights.tolist(), self.orders)]


class _Sample:
    """The sources' training tokens one after the other, each in proportion to its weight."""

    def __init__(self, streams: Sequence[Any], weights: Sequence[float]):
        most = min(len(s) / w for s, w in zip(streams, weights))
        self.streams, self.kept = streams, [int(most * w) for w in weights]
        self.ends = np.cumsum(self.kept)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        pieces = [np.zeros(0, np.int64)]
        for stream, count, end in zip(self.streams, self.kept, self.ends.tolist()):
            a, b = (min(max(x - (end - count), 0), count) for x in (start, stop))
            pieces.append(np.asarray(stream[a:b]).astype(np.int64))
        return np.concatenate(pieces)

    def max(self) -> int:
        """The largest id of any source."""
        return max(int(s.max()) for s in self.streams)


class MixCorpus(Corpus):
    """Several corpora as one, with the interface of `data.cache.Corpus`.

    Args:
        parts: the sources by name.
        weights: of each source, any positive numbers.
    """

    own_epochs = True

    def __init__(self, cfg: DataConfig, parts: dict[str, Corpus]):
        total = sum(cfg.mix.values())
        self.parts, self.weights = parts, {name: cfg.mix[name] / total for name in parts}
        self.name = cfg.name or " + ".join(f"{share:.3g} {name}" for name, share in self.weights.items())
        self.seconds: Optional[float] = None
        self._said = ""
        self.folder: Path = next(iter(parts.values())).folder
        self.manifest = {"eos": next(iter(parts.values())).manifest["eos"], "name": self.name}
        self.train: Any = _Sample([p.train for p in parts.values()], list(self.weights.values()))
        self.validation = np.concatenate([np.asarray(p.validation).astype(np.int64) for p in parts.values()])

    @property
    def fingerprint(self) -> str:
        """Identity of the sources, their names and their weights."""
        said = " ".join(f"{n}:{w!r}:{self.parts[n].fingerprint}" for n, w in self.weights.items())
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the validation documents of all sources."""
        return sum(p.validation_bytes for p in self.parts.values())

    def validation_parts(self, block: int) -> list[ValidationPart]:
        """The validation text of each source."""
        found = {name: p.validation_parts(block)[0] for name, p in self.parts.items()}
        return [replace(part, name=name) for name, part in found.items()]

    def order(self, seed: int, block: int, epochs: int = 1) -> MixOrder:
        """The order of the training sequences; no source is read more than `epochs` times."""
        orders = [p.order(seed, block) for p in self.parts.values()]
        for name, order in zip(self.parts, orders):
            check(len(order) > 0, f"data.sources.{name}: has too few tokens for one block of {block}")
        return MixOrder(orders, list(self.weights.values()), epochs, seed)

    def check_budget(self, order: MixOrder, needed: int, block: int, epochs: int) -> None:
        """Raises UserError if a source would be read too often, and logs how often each is read."""
        reads = dict(zip(self.parts, order.reads(needed)))
        short, most = list(self.parts)[order.shortest], order.epochs
        check(
            needed <= len(order),
            f"tokens: {needed * block} are requested, of which data.mix takes {self.weights[short]:.3g} from {short};"
            f" that reads it {reads[short]:.2f} times, data.epochs={most} allows {most}; give fewer tokens, a smaller"
            " weight, more text, or a larger data.epochs",
        )
        said = "; ".join(f"{name} {self.weights[name]:.3g}, read {times:.2g} times" for name, times in reads.items())
        if said != self._said:  # orders are made several times
            self._said = said
            log.info("mix: %s", said)

    def read(self, indices: np.ndarray, block: int) -> np.ndarray:
        """Ids [len(indices), T + 1] of some sequences."""
        out = np.empty((len(indices), block + 1), np.int64)
        source, own = indices >> SOURCE_BITS, indices & ((1 << SOURCE_BITS) - 1)
        for i, part in enumerate(self.parts.values()):
            mine = source == i
            if mine.any():
                out[mine] = part.read(own[mine], block)
        return out

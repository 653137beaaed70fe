"""Exact 5-gram counts of a token stream in bounded memory, and the Gram matrix of the conditional distributions.

M [C, V] has one row for each observed 4-gram: the unsmoothed distribution of the token after it. Its singular values
are the square roots of the eigenvalues of MᵀM [V, V], a sum over contexts, so the C rows are never held at once:
contexts are hashed into buckets, and each bucket is counted by itself. A context followed by a single token adds 1 to
one entry of the diagonal.

Dims: C contexts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator

import numpy as np
import scipy.sparse as sparse

N = 5
BUCKET = 16_000_000  # 5-grams counted at once, about 100 bytes each
PIECE = 1 << 24  # tokens read at once
STRIP = 1 << 25  # entries of a Gram matrix summed at once, in float64
MOST_VOCAB = 1 << 16  # four token ids must fit 64 bits


@dataclass
class Counts:
    """Counts of one bucket in coordinate form: context `rows[i]` is followed by `tokens[i]` `counts[i]` times."""

    rows: np.ndarray  # int64 [entries], rising
    tokens: np.ndarray  # int64 [entries]
    counts: np.ndarray  # int64 [entries]

    @property
    def contexts(self) -> int:
        return int(self.rows[-1]) + 1 if len(self.rows) else 0


def windows(tokens: np.ndarray, eos: int, bucket: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The 5-grams of one bucket that contain no end of text.

    Returns: contexts (four ids in 64 bits each) and next tokens.
    """
    contexts, following = [], []
    for start in range(0, max(0, len(tokens) - N + 1), PIECE):
        part = np.asarray(tokens[start : start + PIECE + N - 1]).astype(np.uint64)
        n = len(part) - N + 1
        packed = np.zeros(n, np.uint64)
        inside = np.ones(n, bool)
        for k in range(N - 1):
            packed = (packed << np.uint64(16)) | part[k : k + n]
        ends = (part == eos).cumsum()
        inside = ends[N - 1 :] - np.concatenate([[0], ends[: n - 1]]) == 0
        if buckets > 1:  # a multiplicative hash, so that neighbours in the vocabulary go to different buckets
            inside &= ((packed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)) % np.uint64(buckets) == bucket
        contexts.append(packed[inside])
        following.append(part[N - 1 :][inside].astype(np.int64))
    if not contexts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    return np.concatenate(contexts), np.concatenate(following)


def counted(contexts: np.ndarray, following: np.ndarray) -> Counts:
    """Counts of pairs (context, next token); contexts are numbered in the order of their ids."""
    if not len(contexts):
        empty = np.zeros(0, np.int64)
        return Counts(empty, empty, empty)
    order = np.argsort(contexts)
    contexts, following = contexts[order], following[order]
    row = np.cumsum(np.concatenate([[0], contexts[1:] != contexts[:-1]])).astype(np.int64)
    keys = np.sort(row << 16 | following)
    first = np.concatenate([[True], keys[1:] != keys[:-1]])
    at = np.flatnonzero(first)
    keys = keys[at]
    return Counts(keys >> 16, keys & 0xFFFF, np.diff(np.append(at, len(first))))


def buckets_of(tokens: np.ndarray, eos: int, size: int = BUCKET) -> Iterator[tuple[Counts, float]]:
    """The counts of every bucket, and the share of the work done so far."""
    buckets = max(1, -(-len(tokens) // size))
    for b in range(buckets):
        yield counted(*windows(tokens, eos, b, buckets)), (b + 1) / buckets


@dataclass
class Gram:
    """MᵀM [V, V] of the rows as they are, or of rows times the square root of their context's count, and the totals."""

    matrix: np.ndarray
    contexts: int = 0
    ngrams: int = 0
    distinct: int = 0  # different 5-grams

    @property
    def energy(self) -> float:
        """‖M‖²."""
        return float(np.trace(self.matrix, dtype=float))


def gram(
    tokens: np.ndarray,
    vocab: int,
    eos: int,
    weighted: bool = False,
    dtype: type = np.float64,
    at: Callable[[float], None] = lambda share: None,
    size: int = BUCKET,
) -> Gram:
    """Count the 5-grams of a token stream and sum up their Gram matrix.

    Memory: V² entries of `dtype`, up to 30 bytes for each of STRIP entries, about 100 bytes for each of `size` 5-grams.

    Args:
        eos: id of the end of text.
        weighted: weight each context by how often it occurs.
        at: called with the share of the work done.
        size: 5-grams of a bucket, about.
    """
    out = Gram(np.zeros((vocab, vocab), dtype))
    diagonal = np.zeros(vocab)  # contexts with one token add millions of ones, which float32 would stop counting
    for c, share in buckets_of(tokens, eos, size):
        _add(out, diagonal, c, weighted)
        at(share)
    out.matrix[np.arange(vocab), np.arange(vocab)] += diagonal.astype(dtype)
    return out


def _add(out: Gram, diagonal: np.ndarray, c: Counts, weighted: bool) -> None:
    if not len(c.rows):
        return
    vocab = len(diagonal)
    totals = np.bincount(c.rows, weights=c.counts, minlength=c.contexts)
    kinds = np.bincount(c.rows, minlength=c.contexts)
    single = kinds[c.rows] == 1
    diagonal += np.bincount(c.tokens[single], weights=c.counts[single] if weighted else None, minlength=vocab)
    rows, tokens, counts = (x[~single] for x in (c.rows, c.tokens, c.counts))
    if len(rows):
        _, rows_new = np.unique(rows, return_inverse=True)
        values = counts / (np.sqrt(totals[rows]) if weighted else totals[rows])
        M = sparse.csr_matrix((values, (rows_new, tokens)), shape=(int(rows_new.max()) + 1, vocab))
        # a strip of columns at a time, since the whole product may be dense
        width = max(1, STRIP // vocab)
        for first in range(0, vocab, width):
            strip = (M[:, first : first + width].T @ M).tocoo()
            out.matrix[strip.row + first, strip.col] += strip.data.astype(out.matrix.dtype)
    out.contexts += c.contexts
    out.ngrams += int(c.counts.sum())
    out.distinct += len(c.rows)


def w_error(eigenvalues: np.ndarray) -> np.ndarray:
    """Relative error of the best rank-d approximation for d = 0 … V (Eckart–Young–Mirsky): √(Σ_{i>d} σ_i² / Σ σ_i²).

    Args:
        eigenvalues: of MᵀM, σ², in any order; those that rounding made negative count as 0.
    """
    energy = np.sort(np.clip(np.asarray(eigenvalues, float), 0, None))
    left = np.concatenate([[0.0], np.cumsum(energy)])[::-1]
    return np.sqrt(left / left[0]) if left[0] > 0 else np.zeros(len(left))

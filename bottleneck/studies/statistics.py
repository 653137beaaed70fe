"""Errors of means, and when the best of many is really better than the last."""

from __future__ import annotations

import math
import statistics
from typing import Sequence


def block_mean(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Mean over all tokens and its standard error from the blocks as units, which tokens of one block are not among themselves.

    Ratio estimator: L = Σ s_b / Σ n_b, error = √(k/(k−1) Σ (s_b − L n_b)²) / Σ n_b for k blocks with sums s_b over n_b tokens.

    Returns: mean, standard error (NaN for a single block), in the unit of `sums`.
    """
    total, k = sum(counts), len(sums)
    mean = sum(sums) / total
    if k < 2:
        return mean, math.nan
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts))
    return mean, math.sqrt(k / (k - 1) * squares) / total


def scatter(values: Sequence[float]) -> float:
    """Standard deviation of what is not smooth in the later half of a series: 0 where that has fewer than 4 values.

    A third difference of independent noise has √20 times its deviation, and one of a parabola is 0: a loss that turns is not
    taken for a noisy one. The median of their sizes is not moved by single jumps.
    """
    late = list(values)[len(values) // 2 :]
    if len(late) < 4:
        return 0.0
    for _ in range(3):
        late = [b - a for a, b in zip(late, late[1:])]
    return 1.4826 * statistics.median(map(abs, late)) / math.sqrt(20)


def best_of_many(z: float, rivals: int) -> float:
    """Chance that noise alone makes the best of `rivals` equally good checkpoints lead by `z` standard errors (Šidák, one-sided).

    Taking the best of many favours lucky ones; without this, the best of 30 noisy checkpoints beats the last nearly always.
    """
    one = 0.5 * math.erfc(z / math.sqrt(2))
    return -math.expm1(max(1, rivals) * math.log1p(-one)) if one < 1 else 1.0

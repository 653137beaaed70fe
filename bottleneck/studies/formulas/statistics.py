"""Errors of means, noise of a series, and when the best of many is really better than the last."""

from __future__ import annotations

import functools
import math
import statistics
from typing import Sequence

import numpy as np

SHORTEST = 7  # points of a series whose noise can be estimated
LATE = 8  # points that the estimate uses at least, if there are so many
DRAWS = 20_000  # simulated flat series
LONGEST = 400  # points from which the estimate needs no correction
LOWEST_LEVEL = 1e-3  # below it the simulated quantile is too uncertain: the correction of this level is used


def block_mean(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Mean over all tokens and its standard error. The units are blocks, since tokens of one block are not independent.

    Ratio estimator: L = Σ s_b / Σ n_b, error = √(k/(k−1) Σ (s_b − L n_b)²) / Σ n_b for k blocks with sums s_b over n_b
    tokens.

    Returns: mean, standard error (NaN for a single block), in the unit of `sums`.
    """
    total, k = sum(counts), len(sums)
    mean = sum(sums) / total
    if k < 2:
        return mean, math.nan
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts))
    return mean, math.sqrt(k / (k - 1) * squares) / total


def _first_late(points: int) -> int:
    """Index of the first point that `scatter` uses: of the later half, or of the last LATE points."""
    return min(points // 2, max(0, points - LATE))


def scatter(values: Sequence[float]) -> float:
    """Standard deviation of the noise in the later part of a series; 0 for fewer than SHORTEST values.

    The later part is the later half, or the last LATE values where those are more. A third difference of independent
    noise has √20 times its deviation, and that of a parabola is 0, so a loss that turns smoothly does not count as
    noisy. The median of their sizes ignores single jumps. In a short series it rests on few differences, which
    overlap: see `correction`.
    """
    if len(values) < SHORTEST:
        return 0.0
    late = list(values)[_first_late(len(values)) :]
    for _ in range(3):
        late = [b - a for a, b in zip(late, late[1:])]
    return 1.4826 * statistics.median(map(abs, late)) / math.sqrt(20)


@functools.cache
def correction(points: int, level: float, rivals: int) -> float:
    """Factor on `scatter` that makes `best_of_many` hold `level` on a flat series of independent Gaussian noise.

    With a noise estimated from few differences, (last − lowest) / (√2 scatter) has heavier tails than a normal
    variable: for 11 points its 95 % quantile is about twice as large. The factor is the ratio of the two quantiles,
    from DRAWS simulated series.

    Args:
        points: length of the series, at least SHORTEST.
        level: chance of a false alarm that `best_of_many` is compared with.
        rivals: number of last points before the final one that the lowest is looked for in.
    Returns: the factor, at least 1; 1 for LONGEST points and more.
    """
    if points >= LONGEST:
        return 1.0
    level = max(level, LOWEST_LEVEL)
    series = np.random.default_rng(points).standard_normal((DRAWS, points))
    differences = np.abs(np.diff(series[:, _first_late(points) :], n=3, axis=1))
    noise = 1.4826 * np.median(differences, axis=1) / math.sqrt(20)
    lead = series[:, -1] - series[:, points - 1 - rivals :].min(axis=1)
    found = float(np.quantile(lead / (math.sqrt(2) * noise), 1 - level))
    return max(1.0, found / _normal_quantile(level, rivals))


def _normal_quantile(level: float, rivals: int) -> float:
    """The z at which `best_of_many(z, rivals)` is `level`."""
    one = -math.expm1(math.log1p(-level) / max(1, rivals))
    return statistics.NormalDist().inv_cdf(1 - one)


def best_of_many(z: float, rivals: int) -> float:
    """Chance that noise alone makes the best of `rivals` equally good checkpoints lead by `z` standard errors (Šidák,
    one-sided).

    The best of many is partly the luckiest: uncorrected, the best of 30 noisy checkpoints nearly always beats the last.
    """
    one = 0.5 * math.erfc(z / math.sqrt(2))
    return -math.expm1(max(1, rivals) * math.log1p(-one)) if one < 1 else 1.0

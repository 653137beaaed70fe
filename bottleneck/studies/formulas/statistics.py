"""Errors of means, noise of a series, and when the best of many is really better than the last."""

from __future__ import annotations

import functools
import math
import statistics
from typing import Iterator, Sequence

import numpy as np

SHORTEST = 7  # points of a series whose noise can be estimated
LATE = 8  # points that the estimate uses at least, if there are so many
DRAWS = 20_000  # simulated flat series of each kind of noise, fewer for series of more than NUMBERS / DRAWS points
NUMBERS = 4_000_000
LONGEST = 2000  # points; the correction of longer series is that of so many
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
    noisy. The deviation is taken from the mean of their sizes, as if they were Gaussian. For other noise, and for the
    few differences of a short series, see `correction`.
    """
    if len(values) < SHORTEST:
        return 0.0
    return float(_scatters(np.asarray([values], float))[0])


def _scatters(series_SP: np.ndarray) -> np.ndarray:
    """`scatter` of S series of P points."""
    late = series_SP[:, _first_late(series_SP.shape[1]) :]
    return np.abs(np.diff(late, n=3, axis=1)).mean(1) * math.sqrt(math.pi / 2) / math.sqrt(20)


def flat_noises(rng: np.random.Generator, draws: int, points: int) -> Iterator[tuple[str, np.ndarray]]:
    """Kinds of noise that a flat series may have, each [draws, points], of any scale.

    Gaussian and flat; heavy tails (Student's t with 3 degrees of freedom, Laplace, one point in ten with five times the
    deviation); skewed to either side; and correlated from one checkpoint to the next (AR(1) with 0.3 and 0.5, and with
    heavy tails).
    """
    shape = (draws, points)
    gaussian, heavy, skewed = rng.standard_normal(shape), rng.standard_t(3, shape), rng.standard_exponential(shape)
    yield "gaussian", gaussian
    yield "uniform", rng.uniform(-1, 1, shape)
    yield "t3", heavy
    yield "laplace", rng.laplace(size=shape)
    yield "outliers", gaussian * np.where(rng.random(shape) < 0.1, 5.0, 1.0)
    yield "skewed up", skewed
    yield "skewed down", -skewed
    for name, own, likeness in (("ar 0.3", gaussian, 0.3), ("ar 0.5", gaussian, 0.5), ("t3, ar 0.3", heavy, 0.3)):
        series = own.copy()
        for i in range(1, points):
            series[:, i] = likeness * series[:, i - 1] + math.sqrt(1 - likeness**2) * own[:, i]
        yield name, series


@functools.cache
def correction(points: int, level: float, rivals: int) -> float:
    """Factor on `scatter` that makes `best_of_many` hold `level` on a flat series, whatever kind of noise it has.

    (last − lowest) / (√2 scatter) is normal only for Gaussian noise of known size. With few differences, heavy tails or
    correlated checkpoints its upper quantiles are far larger: with Gaussian noise as the only measure, flat series of
    Student's t with 3 degrees of freedom gave 8 to 26 % false alarms where 5 % were asked. The factor is the largest
    ratio of the two quantiles over `flat_noises`, from simulated series.

    Args:
        points: length of the series, at least SHORTEST.
        level: chance of a false alarm that `best_of_many` is compared with.
        rivals: number of last points before the final one that the lowest is looked for in.
    Returns: the factor, at least 1.
    """
    level, simulated = max(level, LOWEST_LEVEL), min(points, LONGEST)
    first = max(0, simulated - 1 - rivals)
    draws = min(DRAWS, NUMBERS // simulated)
    worst = 0.0
    for _, series in flat_noises(np.random.default_rng(points), draws, simulated):
        lead = series[:, -1] - series[:, first:].min(axis=1)
        worst = max(worst, float(np.quantile(lead / (math.sqrt(2) * _scatters(series)), 1 - level)))
    return max(1.0, worst / _normal_quantile(level, min(rivals, simulated - 1)))


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

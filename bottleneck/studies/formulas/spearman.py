"""Spearman's rank correlation and its bootstrap interval. Only the order of values counts."""

from __future__ import annotations

from typing import Optional

import numpy as np
from scipy.stats import rankdata


def spearman(x: np.ndarray, y: np.ndarray) -> Optional[float]:
    """Spearman's ρ, Pearson's correlation of the ranks; None for fewer than 3 pairs or a constant variable."""
    if len(x) < 3:
        return None
    a, b = rankdata(x), rankdata(y)  # ties share their mean
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / size, -1, 1)) if size > 0 else None


def bootstrap_interval(
    x: np.ndarray, y: np.ndarray, level: float, draws: int, seed: int = 0
) -> tuple[Optional[float], Optional[float]]:
    """Percentile bootstrap interval of ρ over pairs, at confidence `level`; (None, None) where ρ has no value.

    Checkpoints of one run are not independent, so along a single run the interval is too narrow; over models it is not.
    """
    if spearman(x, y) is None:
        return None, None
    rng, n = np.random.default_rng(seed), len(x)
    found = []
    for _ in range(draws):
        at = rng.integers(n, size=n)
        rho = spearman(x[at], y[at])
        if rho is not None:
            found.append(rho)
    if not found:
        return None, None
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

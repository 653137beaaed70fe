"""Confidence intervals of a curve's numbers over the validation text.

`evaluation.agreement.compare` leaves the loss of G consecutive stretches of the validation text for every head.
Neighbouring stretches are alike, since documents run over them, so the error of their mean is the long-run one. It is
estimated from ν = 0.4 G^(2/3) low frequencies, with Student's t at ν degrees of freedom (the equal-weighted cosine
test of Lazarus, Lewis, Stock & Watson 2018, "HAR inference: recommendations for practice"):

    u_g = G n_g (l_g − l̄) / Σ n        Λ_k = √(2/G) Σ_g cos(π k (g − ½) / G) u_g        error² = Σ_k Λ_k² / (ν G)

For independent Gaussian stretches this is exact. Where neighbours are correlated by 0.3 (AR(1)), 94.1 to 94.9 % of
intervals cover the truth, by 0.5 92.6 to 94.4 % (G = 10 to 100, simulated: tests/results/test_intervals.py). Because
heads see the same tokens, a difference between them is estimated from the differences of their stretches, and has a
far smaller error than their losses.

The intervals are about other validation text of the same kind. They do not cover other seeds.

Dims: G stretches, H heads, K frequencies.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Optional

import numpy as np
from scipy import special

from bottleneck.results.knee import crossing
from bottleneck.results.schema import series

FEWEST = 10  # stretches; with fewer an interval is unreliable
LEVEL = 0.95
STEPS = 64  # places between two trained ranks at which a knee's bounds are looked for

Interval = list[Optional[float]]


def frequencies(groups: int) -> int:
    """ν, frequencies that the error is estimated from: also its degrees of freedom."""
    return max(1, round(0.4 * groups ** (2 / 3)))


def projections(tokens: list[int], losses_HG: np.ndarray) -> np.ndarray:
    """[H, K] with Λ / √(ν G) of every head: the norm of a row, or of a combination of rows, is its standard error."""
    G, K = len(tokens), frequencies(len(tokens))
    shares_G = np.asarray(tokens, float) / sum(tokens)
    u_HG = G * shares_G * (losses_HG - (losses_HG @ shares_G)[:, None])
    cosines_KG = np.sqrt(2 / G) * np.cos(np.pi * np.outer(np.arange(1, K + 1), np.arange(G) + 0.5) / G)
    return u_HG @ cosines_KG.T / math.sqrt(K * G)


@functools.cache
def _quantile(degrees: int) -> float:
    return float(special.stdtrit(degrees, (1 + LEVEL) / 2))


def margins(rows_HK: np.ndarray) -> np.ndarray:
    """Half the widths [H] of the intervals of rows of `projections`, or of combinations of rows."""
    return _quantile(rows_HK.shape[-1]) * np.linalg.norm(rows_HK, axis=-1)


def _around(estimate: float, row_K: np.ndarray) -> Interval:
    half = float(margins(row_K))
    return [round(estimate - half, 6), round(estimate + half, 6)]


def paired_difference(c: dict[str, Any], a: dict[str, Any], b: dict[str, Any]) -> Optional[Interval]:
    """95 % interval of the loss of row a minus that of row b (heads of a curve, or its reference), on the same
    tokens."""
    tokens = c["reference"].get("group_tokens", [])
    if len(tokens) < FEWEST or not _whole(a, tokens) or not _whole(b, tokens):
        return None
    first, second = projections(tokens, np.array([a["group_losses"], b["group_losses"]]))
    return _around(a["loss"] - b["loss"], first - second)


def _whole(row: dict[str, Any], tokens: list[int]) -> bool:
    groups = row.get("group_losses", [])
    return row["loss"] is not None and len(groups) == len(tokens) and None not in groups


def _projected(c: dict[str, Any]) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The rows that have losses of all stretches, the original head's first, and their projections [H, K]."""
    reference = c["reference"]
    tokens = reference.get("group_tokens", [])
    rows = [r for r in (reference, *c["heads"]) if _whole(r, tokens)]
    if len(tokens) < FEWEST or not rows or rows[0] is not reference:
        return [], np.zeros((0, 1))
    return rows, projections(tokens, np.array([r["group_losses"] for r in rows]))


def add_intervals(c: dict[str, Any]) -> dict[str, Any]:
    """The curve with intervals of every loss and perplexity, if it has losses of stretches. Changes heads in place."""
    rows, projected_HK = _projected(c)
    if not rows:
        return c
    c = {**c, "reference": dict(c["reference"])}
    for row, own_K in zip(rows, projected_HK):
        of_loss = _around(row["loss"], own_K)
        target = c["reference"] if row is rows[0] else row
        target["loss_interval"] = of_loss
        target["perplexity_interval"] = [_exp(x) for x in of_loss]
        if row is not rows[0]:
            target["excess_interval"] = _around(row["loss"] - rows[0]["loss"], own_K - projected_HK[0])
    return c


def _exp(loss: Optional[float]) -> Optional[float]:
    return float(f"{math.exp(loss):.6g}") if loss is not None and loss < 700 else None


def knee_intervals(c: dict[str, Any], knees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `knee.knees` with the interval of `rank`.

    At every rank, the loss there (interpolated) minus the target has an interval. The knee's begins where that
    interval's lower end falls to zero and ends where its upper end does (Fieller 1954: the ranks that the text does
    not rule out).

    Left out if a rank's best head has no losses of stretches. The best heads are those of the whole text; the interval
    does not cover that other text might choose another rate.
    """
    rows, projected_HK = _projected(c)
    if not rows:
        return knees
    index = {id(r): i for i, r in enumerate(rows)}
    out = []
    for k in knees:
        best = sorted((h for h in c["heads"] if h["best"] and series(h) == k["init"]), key=lambda h: h["rank"])
        if k["rank"] is None or not all(id(h) in index for h in best):
            out.append(k)
            continue
        factor = 1 + k["percent"] / 100
        of_rank = {h["rank"]: (h["loss"] - factor * rows[0]["loss"], projected_HK[index[id(h)]]) for h in best}
        out.append(k | {"interval": _knee_bounds(of_rank, factor * projected_HK[0])})
    return out


def _knee_bounds(of_rank: dict[int, tuple[float, np.ndarray]], target_K: np.ndarray) -> Interval:
    """Where loss minus target crosses zero at the ends of its interval; None above the largest rank.

    Args: of_rank: {rank: (loss − target, projections [K] of the loss)}, by rank; target_K: projections of the target.
    """
    trained = np.log2(list(of_rank))
    gaps, rows = (np.array(x) for x in zip(*of_rank.values()))
    places = np.arange(STEPS * (len(trained) - 1) + 1) / STEPS
    index = np.arange(len(trained))
    share = np.clip(1 - np.abs(places[:, None] - index), 0, 1)  # of each trained rank at each place
    ranks, gaps, halves = 2 ** (share @ trained), share @ gaps, margins(share @ (rows - target_K))
    ends = (crossing(list(zip(ranks.tolist(), (gaps + sign * halves).tolist())), 0.0) for sign in (-1, 1))
    return [None if end is None else round(end, 3) for end in ends]

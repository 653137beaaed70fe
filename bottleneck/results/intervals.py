"""Confidence intervals of a curve's numbers over the validation text: a circular block bootstrap.

`evaluation.agreement.compare` leaves the loss of G consecutive stretches of the validation text for every head. A
resample joins sequences of L = 2 G^(1/3) neighbouring stretches, drawn with replacement, which keeps the correlation
of neighbours, and gives a loss for each head: Σ n_g l_g / Σ n_g. All heads get the same draws. Because heads see the
same tokens, differences between them vary far less than their losses do (Politis & Romano 1992; Künsch 1989).

With few sequences bootstrap quantiles are too narrow. They are therefore widened around the estimate by √(G / (G − L))
· t / z, with Student's t at G / L − 1 degrees of freedom.

The intervals are about other validation text of the same kind. They do not cover other seeds.

Dims: G stretches, H heads, S resamples.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import numpy as np
from scipy import stats

from bottleneck.results.knee import crossing
from bottleneck.results.schema import series

FEWEST = 10  # stretches; with fewer an interval is unreliable
RESAMPLES = 2000
LEVEL = 0.95

Interval = list[Optional[float]]


def run_length(groups: int) -> int:
    """L, neighbouring stretches that are drawn together."""
    return round(2 * groups ** (1 / 3))


def resampled(tokens: list[int], losses_HG: np.ndarray) -> np.ndarray:
    """Losses of the heads in S resamples of the stretches: [H, S], nats. The same draws for the same number of
    stretches."""
    G, L = len(tokens), run_length(len(tokens))
    starts_SK = np.random.default_rng(0).integers(0, G, (RESAMPLES, -(-G // L)))
    counts_SG = np.zeros((RESAMPLES, G))
    for step in range(L):
        for column in starts_SK.T:
            counts_SG[np.arange(RESAMPLES), (column + step) % G] += 1
    weights_SG = counts_SG * np.asarray(tokens, float)
    return losses_HG @ weights_SG.T / weights_SG.sum(1)


def _centred(row: dict[str, Any], tokens: list[int], samples_S: np.ndarray) -> np.ndarray:
    """Samples shifted so that the whole text gives the row's loss; the rounding of the stretches' sums differs."""
    return samples_S + (row["loss"] - float(np.average(row["group_losses"], weights=tokens)))


def interval(estimate: float, samples_S: np.ndarray, groups: int) -> Interval:
    """[low, high] around an estimate. Samples may be infinite; a bound that is infinite is None."""
    tail = (1 - LEVEL) / 2
    L = run_length(groups)
    t = stats.t.ppf(1 - tail, groups / L - 1)
    wider = math.sqrt(groups / (groups - L)) * t / stats.norm.ppf(1 - tail)
    found: Interval = []
    for q in (tail, 1 - tail):
        bound = float(np.quantile(samples_S, q, method="higher" if q > 0.5 else "lower"))
        found.append(round(estimate + wider * (bound - estimate), 6) if math.isfinite(bound) else None)
    return found


def paired_difference(c: dict[str, Any], a: dict[str, Any], b: dict[str, Any]) -> Optional[Interval]:
    """95 % interval of the loss of row a minus that of row b (heads of a curve, or its reference), on the same
    tokens."""
    tokens = c["reference"].get("group_tokens", [])
    if len(tokens) < FEWEST or not _whole(a, tokens) or not _whole(b, tokens):
        return None
    samples = resampled(tokens, np.array([a["group_losses"], b["group_losses"]]))
    first, second = (_centred(row, tokens, s) for row, s in zip((a, b), samples))
    return interval(a["loss"] - b["loss"], first - second, len(tokens))


def _whole(row: dict[str, Any], tokens: list[int]) -> bool:
    groups = row.get("group_losses", [])
    return row["loss"] is not None and len(groups) == len(tokens) and None not in groups


def _samples(c: dict[str, Any]) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The rows that have losses of all stretches, the original head's first, and their resampled losses [H, S]."""
    reference = c["reference"]
    tokens = reference.get("group_tokens", [])
    rows = [r for r in (reference, *c["heads"]) if _whole(r, tokens)]
    if len(tokens) < FEWEST or not rows or rows[0] is not reference:
        return [], np.zeros((0, RESAMPLES))
    samples = resampled(tokens, np.array([r["group_losses"] for r in rows]))
    return rows, np.stack([_centred(r, tokens, s) for r, s in zip(rows, samples)])


def add_intervals(c: dict[str, Any]) -> dict[str, Any]:
    """The curve with intervals of every loss and perplexity, if it has losses of stretches. Changes heads in place."""
    rows, samples_HS = _samples(c)
    if not rows:
        return c
    groups = len(c["reference"]["group_tokens"])
    c = {**c, "reference": dict(c["reference"])}
    for row, samples_S in zip(rows, samples_HS):
        of_loss = interval(row["loss"], samples_S, groups)
        target = c["reference"] if row is rows[0] else row
        target["loss_interval"] = of_loss
        target["perplexity_interval"] = [_exp(x) for x in of_loss]
        if row is not rows[0]:
            target["excess_interval"] = interval(row["loss"] - rows[0]["loss"], samples_S - samples_HS[0], groups)
    return c


def _exp(loss: Optional[float]) -> Optional[float]:
    return float(f"{math.exp(loss):.6g}") if loss is not None and loss < 700 else None


def knee_intervals(c: dict[str, Any], knees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `knee.knees` with the interval of `rank`: the crossing of every resample of the best heads.

    Left out if a rank's best head has no losses of stretches. The best heads are those of the whole text; the interval
    does not cover that a resample might choose another rate.
    """
    rows, samples_HS = _samples(c)
    if not rows:
        return knees
    index = {id(r): i for i, r in enumerate(rows)}
    groups = len(c["reference"]["group_tokens"])
    out = []
    for k in knees:
        best = sorted((h for h in c["heads"] if h["best"] and series(h) == k["init"]), key=lambda h: h["rank"])
        if k["rank"] is None or not all(id(h) in index for h in best):
            out.append(k)
            continue
        ranks = [h["rank"] for h in best]
        targets_S = (1 + k["percent"] / 100) * samples_HS[0]
        losses_SR = samples_HS[[index[id(h)] for h in best]].T
        found = [crossing(list(zip(ranks, row)), target) for row, target in zip(losses_SR.tolist(), targets_S.tolist())]
        logs_S = np.array([math.inf if r is None else math.log2(r) for r in found])
        bounds = interval(math.log2(k["rank"]), logs_S, groups)
        out.append(k | {"interval": [_rank(x, ranks) for x in bounds]})
    return out


def _rank(log2_rank: Optional[float], ranks: list[int]) -> Optional[float]:
    """A bound as a rank: at least the smallest trained rank; None above the largest."""
    if log2_rank is None or log2_rank > math.log2(ranks[-1]):
        return None
    return round(float(max(2**log2_rank, ranks[0])), 3)

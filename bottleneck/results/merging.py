"""Curves of several runs as one, the best head of each rank, and derived values: references, knees, intervals."""

from __future__ import annotations

import json
import math
from typing import Any, Iterable

from bottleneck.core.errors import check
from bottleneck.heads.key import MATRICES
from bottleneck.results.intervals import add_intervals, knee_intervals
from bottleneck.results.knee import knees
from bottleneck.results.metric_names import from_plugins
from bottleneck.results.schema import NUMBERS, head_identity, identity, printable, series


def mark_best(heads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by start, rank, rate and seed. `best` is true for the lowest validation loss of each start and rank."""
    heads = sorted(heads, key=lambda h: (series(h), h["rank"], h["lr"], h["seed"]))
    winners: dict[tuple, dict[str, Any]] = {}
    for h in heads:
        h["best"] = False
        place = (series(h), h["rank"])
        if h["status"] == "ok" and (place not in winners or h["loss"] < winners[place]["loss"]):
            winners[place] = h
    for h in winners.values():
        h["best"] = True
    return heads


def merge(curves: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Curves of several runs, as one curve for each identity. Raises UserError if one head has two results."""
    lines: dict[str, dict[str, Any]] = {}
    known: dict[str, dict[tuple, dict[str, Any]]] = {}
    for c in curves:
        key = json.dumps(identity(c), sort_keys=True)
        line = lines.setdefault(key, {**c, "heads": []})
        _add_groups(line, c)
        heads = known.setdefault(key, {})
        for h in c["heads"]:
            twin = heads.get(head_identity(h))
            if twin is None:
                heads[head_identity(h)] = dict(h)
                line["heads"].append(heads[head_identity(h)])
                continue
            check(
                twin["loss"] == h["loss"],
                f"curve.json: rank {h['rank']}, lr {h['lr']}, seed {h['seed']} has two results, {twin['loss']} and "
                f"{h['loss']}; merge one run of it",
            )
            twin |= {k: v for k, v in h.items() if k not in twin}  # such as times that were measured in one folder only
    return [finish(line) for line in lines.values()]


def _add_groups(line: dict[str, Any], c: dict[str, Any]) -> None:
    """Take group losses of the original head from a run that has them; runs of earlier versions do not."""
    mine, other = line["reference"], c["reference"]
    if "group_losses" not in mine and "group_losses" in other:
        line["reference"] = mine | {k: other[k] for k in ("group_tokens", "group_losses")}


def finish(c: dict[str, Any]) -> dict[str, Any]:
    """Mark the best heads, and add the values derived from them: the second reference, knees, confidence intervals.

    The second reference is the best trained head of full rank, r = d, if there is one. On text unlike the
    pretraining it beats the original head, so it is the fair comparison for low ranks.
    """
    c = printable(c)
    heads = mark_best(c["heads"])
    full = [h for h in heads if h["rank"] == c["hidden_size"] and h["best"] and h.get("kind", "low_rank") in MATRICES]
    best = min(full, key=lambda h: h["loss"], default=None)
    c = {**c, "heads": heads, "trained_reference": best and {k: best[k] for k in sorted(NUMBERS)}}
    described = from_plugins(heads)
    if described:
        c["metrics"] = described
    c = add_intervals(c)
    return c | {"knee": knee_intervals(c, knees(c))}


def band_losses(head: dict[str, Any]) -> dict[str, Any]:
    """The losses by frequency of the target token as single numbers: loss_1-10, loss_11-100, …"""
    return {f"loss_{b['band'].replace('–', '-')}": b["loss"] for b in head.get("bands") or ()}


def domain_perplexities(head: dict[str, Any]) -> dict[str, Any]:
    """The perplexities by text of a mix as single numbers: perplexity_prose, perplexity_code, …"""
    return {f"perplexity_{d['domain']}": d["perplexity"] for d in head.get("domains") or ()}


def perplexity_of(loss: float | None) -> float | None:
    """exp(loss); None if there is no loss or the perplexity is too large to draw."""
    return math.exp(loss) if loss is not None and loss < 600 else None

"""Heads of other kinds beside the low-rank head of the same cost: is it the rank, or what the head makes of it?

Differences are paired by token, so their intervals are far narrower than those of the losses, see `results.intervals`.
"""

from __future__ import annotations

from typing import Any

from bottleneck.results.cost import AXES
from bottleneck.results.intervals import paired_difference
from bottleneck.results.labels import kind_of

NEAR = 0.03  # relative difference of costs that count as equal


def pairs(c: dict[str, Any], x: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(best head of another kind, the best low-rank head of nearly its cost with the lowest loss), by cost and loss.

    Args: x: a key of `cost.AXES`.
    """
    costs = [(AXES[x].of(h), h) for h in c["heads"] if h["best"] and h["loss"] is not None]
    known = [(cost, h) for cost, h in costs if cost is not None]
    found = []
    for cost, h in ((cost, h) for cost, h in known if kind_of(h)):
        alike = [(of, low) for of, low in known if not kind_of(low) and low["init"] == h["init"]]
        near = [(of, low) for of, low in alike if abs(cost - of) <= NEAR * of]
        if near:
            of, low = min(near, key=lambda pair: pair[1]["loss"])
            found.append((of, h["loss"], h, low))
    return [(h, low) for _, _, h, low in sorted(found, key=lambda row: row[:2])]


def lines(c: dict[str, Any], x: str) -> list[str]:
    """What `python -m bottleneck.curve --x` prints for a curve; nothing if it has no such pair."""
    rows = []
    for h, low in pairs(c, x):
        interval = paired_difference(c, h, low)
        width = f" (95 %: {interval[0]:+.4f} to {interval[1]:+.4f})" if interval and None not in interval else ""
        rows.append(
            f"  {kind_of(h)}, rank {h['rank']}, against rank {low['rank']}: {h['loss'] - low['loss']:+.4f}{width}"
        )
    title = f"loss minus that of the low-rank head of equal cost ({AXES[x].label}, within {NEAR:.0%}), nats:"
    return [title, *rows] if rows else []

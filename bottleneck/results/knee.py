"""The knee of a curve: the smallest rank that is good enough.

A rank is within x % when its validation loss exceeds the original head's by at most x % of that. Between two trained
ranks, the loss is taken to be linear in log2 r.
"""

from __future__ import annotations

import math
from statistics import mean
from typing import Any, Optional, Sequence

from bottleneck.results.cost import AXES, pareto
from bottleneck.results.labels import line_names
from bottleneck.results.schema import series

PERCENT = (1, 5, 10)


def crossing(points: Sequence[tuple[float, float]], target: float) -> Optional[float]:
    """The smallest rank from which losses are at most `target`, interpolated; None if there is none.

    Args: points: (rank, loss) of the best head of each rank, by rank.
    """
    found: Optional[float] = None
    for (r0, l0), (r1, l1) in zip([(0, math.inf), *points], points):
        if l1 > target:
            found = None
        elif found is None:
            # nothing is known below the smallest rank, so it is returned itself
            share = 1.0 if r0 == 0 else (l0 - target) / (l0 - l1)
            found = float(r1) if r0 == 0 else 2 ** (math.log2(r0) + share * (math.log2(r1) - math.log2(r0)))
    return found


def knees(c: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows {init, percent, rank, low, high, mean, seeds, reached} for each start of a curve and each of PERCENT.

    `rank` is that of the best heads, None if no trained rank is good enough. With several seeds, `reached` of them
    have a good enough rank among the ranks that all seeds trained; `low`, `high`, `mean` are over these seeds.
    """
    out = []
    own = c["reference"]["loss"]
    for name in sorted({series(h) for h in c["heads"]}):
        heads = [h for h in c["heads"] if series(h) == name and h["status"] == "ok" and h["loss"] is not None]
        ranks = sorted({h["rank"] for h in heads})
        seeds = sorted({h["seed"] for h in heads})
        lines = {
            s: {
                r: min(h["loss"] for h in heads if h["rank"] == r and h["seed"] == s)
                for r in {h["rank"] for h in heads if h["seed"] == s}
            }
            for s in seeds
        }
        shared = [r for r in ranks if all(r in line for line in lines.values())]
        best = [(r, min(h["loss"] for h in heads if h["rank"] == r)) for r in ranks]
        for percent in PERCENT:
            target = (1 + percent / 100) * own if own is not None else -math.inf
            each = [crossing([(r, line[r]) for r in shared], target) for line in lines.values()]
            found = [x for x in each if x is not None]
            spread = found if len(each) > 1 else []
            row = {
                "init": name,
                "percent": percent,
                "rank": crossing(best, target),
                "low": min(spread, default=None),
                "high": max(spread, default=None),
                "mean": mean(spread) if spread else None,
                "seeds": len(each),
                "reached": len(found),
            }
            out.append(row)
    return out


def least_costs(c: dict[str, Any], x: str) -> list[tuple[int, Optional[float], str]]:
    """(percent, cost, line) of PERCENT: the least cost at which a line of the curve is good enough, and which line.

    Heads that a cheaper one of their line beats do not count: measured costs need not rise with the rank. Between two
    heads that count, the loss is taken to be linear in the logarithm of the cost. The cost is None if no line is good
    enough.

    Args: x: a key of `cost.AXES`.
    """
    own = c["reference"]["loss"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for h in c["heads"]:
        cost = AXES[x].of(h) if h["best"] and h["loss"] is not None else None
        if cost is not None:
            lines.setdefault(series(h), []).append((cost, h["loss"]))
    out = []
    for percent in PERCENT if own is not None else ():
        target = (1 + percent / 100) * own
        reached = [(crossing(pareto(points), target), name) for name, points in lines.items()]
        known = [(cost, name) for cost, name in reached if cost is not None]
        cost, name = min(known, default=(None, ""))
        out.append((percent, cost, name))
    return out


def cost_lines(c: dict[str, Any], x: str) -> list[str]:
    """What `python -m bottleneck.curve --x COST` prints of them; nothing without the original head's loss."""
    names = line_names([c])
    parts = [
        f"{percent} %: none of these heads"
        if cost is None
        else f"{percent} %: {_number(cost)}" + f" ({names[name]})" * (len(names) > 1)
        for percent, cost, name in least_costs(c, x)
    ]
    about = f"least cost ({AXES[x].label}) within x % of the original head's loss"
    return [f"{about}: {'; '.join(parts)}"] if parts else []


def _number(cost: float) -> str:
    return f"{cost / 1e6:,.4g}M" if cost >= 1e6 else f"{cost:,.4g}"


def knee_lines(c: dict[str, Any]) -> list[str]:
    """A line for each start and kind: the ranks within 1, 5, 10 % of the original head's loss.

    Of several lines, those of one rank have no knee: one line names those that are good enough.
    """
    names = line_names([c])
    about = "within x % of the original head's loss"
    found: dict[str, list[dict[str, Any]]] = {}
    for k in c["knee"]:
        found.setdefault(k["init"], []).append(k)
    alone = [s for s in found if len({h["rank"] for h in c["heads"] if series(h) == s}) == 1]
    alone = alone if len(found) > 1 else []
    out = [
        f"{about}{f', {names.get(s, s)}' * (len(found) > 1)}: "
        + "; ".join(f"{k['percent']} %: {_words(k)}" for k in ks)
        for s, ks in found.items()
        if s not in alone
    ]
    if alone:
        parts = []
        for percent in dict.fromkeys(k["percent"] for s in alone for k in found[s]):
            reached = [
                names.get(s, s) + (f" ({k['reached']} of {k['seeds']} seeds)" if k["reached"] < k["seeds"] else "")
                for s in alone
                for k in found[s]
                if k["percent"] == percent and k["rank"] is not None
            ]
            parts.append(f"{percent} %: {', '.join(reached) or 'none'}")
        out.append(f"{about}{', kinds of one rank' * bool(out)}: {'; '.join(parts)}")
    return out


def _words(k: dict[str, Any]) -> str:
    """One knee: its rank, its confidence interval and its spread over seeds."""
    if k["rank"] is None:
        return "none of these ranks"
    notes = []
    low, high = k.get("interval") or (None, None)
    if low is not None:
        notes.append(f"95 %: {low:.0f}–{high:.0f}" if high is not None else f"95 %: {low:.0f} or more")
    of = "" if k["reached"] == k["seeds"] else f"{k['reached']} of "
    if k["low"] is not None:
        notes.append(f"{k['low']:.0f}–{k['high']:.0f} over {of}{k['seeds']} seeds")
    elif of and k["seeds"] > 1:
        notes.append(f"{of}{k['seeds']} seeds")
    return f"rank {k['rank']:.0f}" + (f" ({', '.join(notes)})" if notes else "")

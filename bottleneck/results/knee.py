"""The knee of a curve: the smallest rank that is good enough.

A rank is within x % when the validation loss there exceeds the backbone's own head's by at most x % of it. Between two
ranks that were trained, loss is taken to be linear in log2 r.
"""

from __future__ import annotations

import math
from statistics import mean
from typing import Any, Optional

PERCENT = (1, 5, 10)


def crossing(points: list[tuple[int, float]], target: float) -> Optional[float]:
    """The smallest rank at which losses fall to `target` and stay there, interpolated; None where they do not.

    Args: points: (rank, loss) of the best head of each rank, by rank.
    """
    found: Optional[float] = None
    for (r0, l0), (r1, l1) in zip([(0, math.inf), *points], points):
        if l1 > target:
            found = None
        elif found is None:
            # below the smallest rank nothing is known: it is the answer itself
            share = 1.0 if r0 == 0 else (l0 - target) / (l0 - l1)
            found = float(r1) if r0 == 0 else 2 ** (math.log2(r0) + share * (math.log2(r1) - math.log2(r0)))
    return found


def knees(c: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a curve's heads, for each start and each of PERCENT: {init, percent, rank, low, high, mean, seeds, reached}.

    `rank` is that of the best heads; null: no trained rank is good enough. Where there are several seeds, `reached` of them have a
    good enough rank among the ranks that all seeds trained, and `low`, `high`, `mean` are over those.
    """
    out = []
    own = c["reference"]["loss"]
    for init in sorted({h["init"] for h in c["heads"]}):
        heads = [h for h in c["heads"] if h["init"] == init and h["status"] == "ok" and h["loss"] is not None]
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
                "init": init,
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


def told(c: dict[str, Any]) -> list[str]:
    """A line for each start: the ranks within 1, 5, 10 % of the own head's loss."""
    lines = []
    several = len({k["init"] for k in c["knee"]}) > 1
    for init in dict.fromkeys(k["init"] for k in c["knee"]):
        parts = []
        for k in (k for k in c["knee"] if k["init"] == init):
            of = "" if k["reached"] == k["seeds"] else f"{k['reached']} of "
            spread = (
                f" ({k['low']:.0f}–{k['high']:.0f} over {of}{k['seeds']} seeds)"
                if k["low"] is not None
                else f" ({of}{k['seeds']} seeds)"
                if of and k["seeds"] > 1
                else ""
            )
            parts.append(
                f"{k['percent']} %: "
                + ("none of these ranks" if k["rank"] is None else f"rank {k['rank']:.0f}{spread}")
            )
        lines.append(f"within x % of the own head's loss{f', {init}' if several else ''}: " + "; ".join(parts))
    return lines

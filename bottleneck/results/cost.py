"""What a head costs when it is used: the x axes of the picture besides rank (`python -m bottleneck.curve … --x
parameters`).

A low-rank head W = A B has r (V + d) parameters, a full one V d. To decode one token alone, every weight is read once,
in 16 bits, and takes part in one multiplication and one addition. So bytes = FLOPs = 2 · parameters for these kinds.
Rows of other kinds state their cost in the keys `bytes_per_token` and `flops_per_token`.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional

LINEAR = ("low_rank", "full", "truncated", "low_rank_truncated")  # kinds whose weights each take part in one product


class Axis(NamedTuple):
    """An x axis of the picture.

    Attributes:
        label: of the axis.
        of: (row of a head) -> position on the axis; None if it is not known.
        weight: of one weight of a linear head; None: the axis is not a cost.
    """

    label: str
    of: Callable[[dict[str, Any]], Optional[float]]
    weight: Optional[float]


def _linear(key: str) -> Callable[[dict[str, Any]], Optional[float]]:
    def cost(h: dict[str, Any]) -> Optional[float]:
        given = h.get(key)
        if given is not None or h.get("kind", "low_rank") not in LINEAR:
            return given
        return 2 * h["parameters"]

    return cost


AXES = {
    "rank": Axis("rank r of the head W = AB", lambda h: h["rank"], None),
    "parameters": Axis("parameters of the head", lambda h: h["parameters"], 1),
    "bytes": Axis("bytes read per decoded token (batch 1, 16 bits)", _linear("bytes_per_token"), 2),
    "flops": Axis("FLOPs per token", _linear("flops_per_token"), 2),
}


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, loss) points that no other point beats in both (the Pareto front), by cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front

"""What a head costs when it is used: the x axes of the picture besides rank (`python -m bottleneck.curve … --x
parameters`).

A low-rank head W = A B has r (V + d) parameters, a full one V d. To decode one token alone, every weight is read once,
in 16 bits, and takes part in one multiplication and one addition. So bytes = FLOPs = 2 · parameters for these kinds.
Rows of other kinds state their cost in the keys `bytes_per_token` and `flops_per_token`; FLOPs are those of matrix
products. Milliseconds are measured: `python -m bottleneck.benchmark cost RUN_DIR` writes them into the rows.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional

LINEAR = ("low_rank", "full", "truncated", "low_rank_truncated")  # kinds whose weights each take part in one product


class Axis(NamedTuple):
    """An x axis of the picture.

    Attributes:
        label: of the axis.
        of: (row of a head) -> position on the axis; None if it is not known.
        weight: of one weight of a linear head; None: the original head's cost is not known.
        cost: whether the axis is a cost, so that a Pareto front makes sense.
    """

    label: str
    of: Callable[[dict[str, Any]], Optional[float]]
    weight: Optional[float]
    cost: bool = True


def _linear(key: str) -> Callable[[dict[str, Any]], Optional[float]]:
    def cost(h: dict[str, Any]) -> Optional[float]:
        given = h.get(key)
        if given is not None or h.get("kind", "low_rank") not in LINEAR:
            return given
        return 2 * h["parameters"]

    return cost


AXES = {
    "rank": Axis("rank r of the head W = AB", lambda h: h["rank"], None, cost=False),
    "parameters": Axis("parameters of the head", lambda h: h["parameters"], 1),
    "bytes": Axis("bytes read per decoded token (batch 1, 16 bits)", _linear("bytes_per_token"), 2),
    "flops": Axis("FLOPs per token", _linear("flops_per_token"), 2),
    "step_ms": Axis("training step of the head, ms", lambda h: h.get("step_ms"), None),
    "decode_ms": Axis("head of one decoded token (batch 1), ms", lambda h: h.get("decode_ms"), None),
}
MEASURED = ("step_ms", "decode_ms")


def measured_on(h: dict[str, Any]) -> str:
    """The hardware and settings of a row's milliseconds, in words."""
    t = h.get("timing") or {}
    threads = [f"{t['threads']} thread{'s' * (t['threads'] > 1)}"] if "threads" in t else []
    return ", ".join([str(t.get("device")), *threads, f"{t.get('tokens')} tokens a step", str(t.get("dtype"))])


def pareto(points: list[tuple[float, float]], near: float = 0.0) -> list[tuple[float, float]]:
    """The (cost, loss) points that no other point beats in both (the Pareto front), by cost.

    Args: near: a point also loses to a better one whose cost is higher by this share at most.
    """
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    kept: list[tuple[float, float]] = []
    for cost, loss in reversed(front):  # from the dearest: a point may lose to one that is kept only
        if near == 0 or not kept or kept[-1][0] > cost * (1 + near):
            kept.append((cost, loss))
    return kept[::-1]

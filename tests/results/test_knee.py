"""The knee of curves whose crossing is known."""

from __future__ import annotations

import pytest

from bottleneck.results.knee import crossing, knee_lines, knees


def curve_of(losses: dict[tuple[int, int], float], own: float) -> dict:
    heads = [
        {"init": "fisher", "rank": r, "seed": s, "loss": x, "status": "ok", "best": True}
        for (r, s), x in losses.items()
    ]
    return {"reference": {"loss": own}, "heads": heads}


def test_the_knee_of_a_known_curve():
    """loss = 2 + 1 / r at powers of two: between two ranks the line in log2 r is met where it crosses the target."""
    points = [(r, 2 + 1 / r) for r in (2, 4, 8, 16, 32)]
    assert crossing(points, 2.25) == pytest.approx(4) and crossing(points, 2.1) == pytest.approx(
        2 ** (3 + (0.125 - 0.1) / 0.0625)
    )
    assert crossing(points, 3) == 2 and crossing(points, 1.9) is None
    assert crossing([(2, 2.0), (4, 2.3), (8, 2.0)], 2.1) == pytest.approx(2 ** (2 + 2 / 3))  # a dip does not count
    c = curve_of({(r, 0): 2 + 1 / r for r in (2, 4, 8, 16, 32)} | {(r, 1): 2 + 1.5 / r for r in (2, 4, 8, 16, 32)}, 2.0)
    one, five, ten = c["knee"] = knees(c)
    assert one["rank"] is None and one["low"] is None and five["percent"] == 5 and five["seeds"] == 2
    assert (
        ten["low"] == ten["rank"] < ten["high"]
        and crossing([(r, 2 + 1.5 / r) for r in (2, 4, 8, 16, 32)], 2.2) == ten["high"]
    )
    (line,) = knee_lines(c)
    assert "1 %: none of these ranks; 5 %: rank" in line and "over 2 seeds" in line


def test_the_knee_names_seeds_that_do_not_reach_it():
    lucky = {(r, 0): 2 + 1 / r for r in (2, 4, 8, 16, 32)}
    c = curve_of(lucky | {(r, 1): 3.0 for r in (2, 4, 8, 16, 32)}, 2.0)
    *_, ten = c["knee"] = knees(c)
    assert (ten["seeds"], ten["reached"]) == (2, 1) and ten["low"] == ten["high"] == ten["mean"] == ten["rank"]
    assert "over 1 of 2 seeds)" in knee_lines(c)[0] and "1 %: none of these ranks" in knee_lines(c)[0]
    # a rank that only one seed has is left out of the spread; the spread itself is kept
    wide = curve_of(lucky | {(r, 1): 2 + 1.5 / r for r in (2, 4, 8, 16, 32, 64)}, 2.0)
    *_, ten = knees(wide)
    assert ten["seeds"] == ten["reached"] == 2 and ten["low"] < ten["high"]

"""Means over repeated runs: what counts as a repeat, and the interval by hand."""

from __future__ import annotations

import math

import pytest

from bottleneck.benchmark import repeats
from bottleneck.core.errors import UserError


def run(order: int, *heads: tuple, **more) -> dict:
    """A run of (rank, seed, rate, loss) with an order of the text."""
    rows = [
        {"rank": r, "seed": s, "lr": lr, "loss": x, "init": "scaled", "status": "ok" if x else "diverged"}
        for r, s, lr, x in heads
    ]
    about = {"backbone": "b", "data": "d", "data_hash": "h", "tokens": 8, "recipe": {"data_seed": order}}
    return {**about, "heads": rows, **more}


def test_each_seed_and_order_counts_once_at_its_best_rate():
    found = repeats.repeats(
        [
            run(0, (8, 0, 1e-3, 3.0), (8, 0, 2e-3, 2.8), (8, 1, 2e-3, 2.9), (16, 0, 1e-3, None)),
            run(1, (8, 0, 2e-3, 2.7)),
        ]
    )
    assert {head: sorted(losses) for head, losses in found.items()} == {("scaled", "low_rank", 8): [2.7, 2.8, 2.9]}


def test_the_interval_by_hand():
    """t of 2 degrees of freedom at 97.5 % is 4.3027; the standard deviation of 1, 2, 3 is 1."""
    assert repeats.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(repeats.half_width([1.0]))


def test_runs_of_another_budget_are_no_repeats():
    with pytest.raises(UserError, match="tokens is 16 in one run and 8 in another"):
        repeats.repeats([run(0, (8, 0, 1e-3, 3.0)), run(1, (8, 0, 1e-3, 3.0), tokens=16)])

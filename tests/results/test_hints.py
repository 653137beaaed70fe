"""Hints below the table of a curve."""

from __future__ import annotations

from bottleneck.results.table import _harmed


def head(rank: int, start: float | None, loss: float, best: bool = True) -> dict:
    return {"rank": rank, "initial_loss": start, "loss": loss, "best": best, "kind": "low_rank", "init": "fisher"}


def test_a_head_that_training_made_worse_is_named():
    rows = [head(8, 6.2864, 7.2586), head(8, 6.2864, 9.0, best=False), head(64, 4.3, 4.1), head(256, 3.034, 3.048)]
    assert _harmed(rows) == [
        "training made worse: rank 8 (6.2864 to 7.2586): give lower rates or more tokens",
    ]
    assert _harmed(rows[2:]) == [] and _harmed([head(8, None, 5.0)]) == []

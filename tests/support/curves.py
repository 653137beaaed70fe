"""Curves made up in a moment."""

from __future__ import annotations

import math

from bottleneck.results import curve


def made(losses: dict[int, float], own: float = 2.0, **changes) -> dict:
    """A curve of heads {rank: loss} at d = 64 and V = 100, with the original head's loss, as curve.json holds it."""
    heads = [
        {
            "rank": r,
            "lr": 0.1,
            "seed": 0,
            "init": "fisher",
            "parameters": r * 164,
            "loss": x,
            "perplexity": math.exp(x),
            "bits_per_byte": x / 3,
            "initial_loss": x + 1,
            "status": "ok",
            "best": False,
        }
        for r, x in losses.items()
    ]
    base = {
        "schema": 1,
        "backbone": "toy",
        "backbone_hash": "b",
        "hidden_size": 64,
        "vocab_size": 100,
        "tokens": 1000,
        "data": "text",
        "data_hash": "d",
        "validation_tokens": 10,
        "recipe": {"batch_size": 8},
        "reference": {"loss": own, "perplexity": math.exp(own), "bits_per_byte": own / 3},
        "heads": heads,
    }
    return curve.finish({**base, **changes})

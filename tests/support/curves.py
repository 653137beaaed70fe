"""Made-up curves for tests, without training."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any, Callable

from bottleneck.results import curve
from bottleneck.results import page as report
from bottleneck.results import tokens_to_equal_loss as race


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


def whole() -> dict[str, Any]:
    """A curve with everything that a run of today writes."""
    c = made({8: 2.5, 16: 2.3, 64: 2.1}, validation_tokens=1200, versions={"torch": "2"})
    reference = c["reference"] | {
        "group_tokens": [100] * 12,
        "group_losses": [2.0 + 0.1 * (-1) ** i for i in range(12)],
    }
    reference["bands"] = [{"band": "1–10", "tokens": 900, "loss": 1.8}, {"band": "11–", "tokens": 300, "loss": 2.6}]
    for h in c["heads"]:
        h |= {"kl": 0.5, "top1_agreement": 0.5, "top5_agreement": 0.5, "acceptance": 0.5}
        h["group_losses"] = [h["loss"] + 0.1 * (-1) ** i for i in range(12)]
        h["bands"] = [
            {"band": "1–10", "tokens": 900, "loss": h["loss"] - 0.2},
            {"band": "11–", "tokens": 300, "loss": h["loss"] + 0.6},
        ]
    return json.loads(json.dumps(curve.finish({**c, "reference": reference})))


def save(folder: Path, content: Any) -> Path:
    """The folder of a run with metrics.csv, and curve.json holding `content`: text as it stands, else as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "curve.json").write_bytes(raw)
    with open(folder / "metrics.csv", "w", newline="") as f:
        rows = [("step", "tokens", "metric", "head", "value")]
        for h in whole()["heads"]:
            rows += [(0, 0, "val/loss", f"r{h['rank']}_lr1e-1_s0", h["loss"] + 1)]
            rows += [(9, 1000, "val/loss", f"r{h['rank']}_lr1e-1_s0", h["loss"])]
        csv.writer(f).writerows(rows)
    return folder


def commands(run: Path, good: Path, out: Path) -> dict[str, Callable[[], int]]:
    """The commands that read curve.json, each on a folder."""
    return {
        "curve": lambda: curve.main([str(run), "--out", str(out / "curve")]),
        "race": lambda: race.main([str(good), str(run), "--out", str(out / "race")]),
        "report": lambda: report.main([str(run), "--out", str(out / "report.html")]),
    }

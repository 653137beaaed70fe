"""Mean loss of each rank over repeated runs, with its 95 % interval, as a Markdown table.

    python -m bottleneck.benchmark.repeats RUN_DIR…

Repeats are heads of one start, kind and rank with other seeds or another order of the text (`data.seed`), each at its
best rate. The interval is Student's t over the repeats; it covers seeds or orders and not other text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import Parser, check
from bottleneck.results import curve

LEVEL = 0.95


def repeats(curves: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int], list[float]]:
    """(start, kind with its options, rank) -> the best loss of each seed and order of the text.

    Raises: UserError if the curves differ in backbone, text or budget.
    """
    best: dict[tuple[str, str, int], dict[tuple[int, int], float]] = {}
    first: dict[str, Any] = {}
    for c in curves:
        for name in ("backbone", "data", "data_hash", "tokens"):
            about = f"{name} is {c[name]} in one run and {first.get(name)} in another"
            if name == "data_hash":
                about = "the text is not the same in all runs: other training or validation tokens"
            check(first.setdefault(name, c[name]) == c[name], f"{about}; repeats have the same")
        for h in c["heads"]:
            if h["status"] == "ok":
                options = "".join(f", {k}={v}" for k, v in h.get("options", {}).items())
                head = h["init"], h.get("kind", "low_rank") + options, h["rank"]
                each = best.setdefault(head, {})
                one = h["seed"], c["recipe"].get("data_seed", 0)
                each[one] = min(each.get(one, math.inf), h["loss"])
    return {head: list(each.values()) for head, each in best.items()}


def half_width(losses: list[float]) -> float:
    """Of the interval of the mean; NaN for a single loss."""
    n = len(losses)
    return float(t.ppf((1 + LEVEL) / 2, n - 1) * np.std(losses, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def command(argv: list[str]) -> None:
    about = "Mean loss of each rank over runs that differ in seed or in the order of the text."
    parser = Parser(prog="python -m bottleneck.benchmark.repeats", description=about)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    curves = curve.read(parser.parse_args(argv).runs)
    found = repeats(curves)
    columns = list(dict.fromkeys((start, kind) for start, kind, _ in found))
    print("| rank | " + " | ".join(f"{start}, {kind}" for start, kind in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for rank in sorted({rank for *_, rank in found}):
        cells = []
        for start, kind in columns:
            losses = found.get((start, kind, rank), [])
            spread = f" ± {half_width(losses):.4f}" * (len(losses) > 1)
            cells.append(f"{np.mean(losses):.4f}{spread} ({len(losses)})" if losses else "")
        print(f"| {rank} | " + " | ".join(cells) + " |")
    print(f"\nMean loss ± half-width of its {LEVEL:.0%} interval over repeats (number of repeats).")
    diverged = sum(h["status"] != "ok" for c in curves for h in c["heads"])
    if diverged:
        print(f"Left out: {diverged} diverged heads.")


if __name__ == "__main__":
    sys.exit(cli.one_line_errors(lambda: command(sys.argv[1:])))

"""The stored curves of `study=forecast`, from runs of that study with `study.check`; prints how its law fares on them.

    python -m bottleneck.study study=forecast … 'study.check=[4194304,16777216]' hydra.run.dir=RUN
    python -m bottleneck.benchmark forecast RUN… --to bottleneck/studies/formulas/forecast_curves.csv

A budget that a run finished before it was stopped counts, too. `forecast.sh` beside this file makes the stored runs.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from bottleneck.benchmark.table import Row
from bottleneck.core.errors import UserError, check
from bottleneck.core.files import write_atomic
from bottleneck.studies.formulas import forecast as laws

NAME = "forecast"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="folder of a run (default: the stored curves)"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the curves there")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Rows of `laws.COLUMNS` of one run of the study. Raises UserError if it has none."""
    rows = []
    for file in sorted((run / "forecast.parts").glob("*.json")):
        try:
            part = json.loads(file.read_text())["content"]
            about = {name: part["about"][name] for name in laws.COLUMNS if name in part["about"]}
            rows += [
                {**about, "text": part["about"]["data"], "original": part["original"], "tokens": part["tokens"], **head}
                for head in part["losses"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not a result of study=forecast: {error}") from error
    check(bool(rows), f"{run}: no results of study=forecast there")
    return sorted(rows, key=lambda row: (row["rank"], row["tokens"], row["lr"]))


def run(args: argparse.Namespace) -> list[Row]:
    """One row for each way of leaving out, and one for each backbone and text."""
    found = [row for folder in args.runs for row in rows_of(folder)]
    curves = laws.curves_of(found) if found else laws.read()
    data = laws.points(curves)
    check(bool(data), "forecast: no budget beyond the short runs; give runs with study.check")
    if args.to is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, laws.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        write_atomic(args.to, lambda part: part.write_bytes(text.getvalue().encode()))
    law = laws.fit(data)
    print(f"law: a = {law.a:.4f}, b₀ = {law.b[0]:.4f}, b₁ = {law.b[1]:.4f}, β = {law.beta:.3f}")
    print(f"half-width of an interval: {law.error:.3f} · (drop + {laws.NOISE} nats)")
    rows = []
    for name in laws.GROUPS:
        held = laws.leave_one_out(data, name)
        rows += [_row(f"without each {name}", name, held)] if held else []
        for group in dict.fromkeys(f.group for f in held):
            which = f"ranks near {2**group}" if name == "rank" else f"{name} {group}"
            rows.append(_row(f"without {which}", name, [f for f in held if f.group == group]))
        wide = [f for f in held if f.curve.rank >= laws.WIDE]
        for tokens in sorted({f.tokens for f in wide}):
            at = f"without each {name}, {tokens:,} tokens, rank ≥ {laws.WIDE}"
            rows.append(_row(at, name, [f for f in wide if f.tokens == tokens]))
    return rows


def _row(case: str, name: str, held: Sequence[laws.Forecasted]) -> Row:
    """Percentiles of the absolute error of the loss in nats; what else is known in the note."""
    c = laws.summary(name, held)
    p20, p50, p80 = (float(p) for p in np.percentile([abs(f.error) for f in held], [20, 50, 80]))
    note = f"{c.points} losses, error {c.rms:.3f} (root mean square), {c.coverage:.0%} inside"
    if not math.isnan(c.half_width):  # NaN without such ranks
        note += f", half-width at ranks ≥ {laws.WIDE}: {c.half_width:.3f} in the median, {c.widest:.3f} at most"
    return Row("forecast", case, "law", p20, p50, p80, "nats", note=note)

"""The result of a run: perplexity against rank, as curve.json, curve.csv, pictures and a table; merged across runs.

    python -m bottleneck.curve RUN_DIR… --out DIR

Runs that differ in backbone, text, budget or recipe stay separate lines: only comparable heads share one.
This module is the front of the room: other rooms use the names that it imports.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, Optional

from rich.console import Console

from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import Parser, check
from bottleneck.core.run_file import RUN_FILE
from bottleneck.results import equal_cost
from bottleneck.results.cost import AXES, MEASURED, measured_on
from bottleneck.results.files import MERGED, complete, given_twice, read, write, write_missing
from bottleneck.results.knee import cost_lines
from bottleneck.results.labels import labels
from bottleneck.results.merging import band_losses, finish, mark_best, merge
from bottleneck.results.schema import IDENTITY, SCHEMA, printable
from bottleneck.results.table import show

log = logging.getLogger(__name__)
__all__ = [
    "IDENTITY",
    "MERGED",
    "SCHEMA",
    "band_losses",
    "complete",
    "finish",
    "given_twice",
    "mark_best",
    "merge",
    "read",
    "show",
    "write",
    "write_missing",
]


def command(argv: list[str]) -> None:
    """`python -m bottleneck.curve`. Raises UserError for bad input."""
    parser = Parser(prog="python -m bottleneck.curve", description="Merge runs into one curve.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run or a multirun")
    parser.add_argument("--out", required=True, type=Path, help="folder for curve.json, curve.csv, curve.png")
    parser.add_argument(
        "--x",
        choices=list(AXES),
        default="rank",
        help="axis of curve.png; bytes: read to decode one token alone, in 16 bits; flops: per token; step_ms, "
        "decode_ms: measured before by python -m bottleneck.benchmark cost RUN_DIR",
    )
    args = parser.parse_args(argv)
    for run in args.runs:
        check(run.exists(), f"{run}: no such folder")
    for run in dict.fromkeys(given_twice(args.runs)):
        log.warning("%s: the run is given twice and counts once", run)
    curves = merge(read(args.runs, skip=args.out))
    whose = "is the folder of a run, whose curve.json would be lost; give another folder"
    check(not (args.out / RUN_FILE).exists(), f"--out {args.out}: {whose}")
    if args.x != "rank":
        _check_cost(curves, args.x)
    write(curves, args.out, args.x)
    console = Console()
    show(curves, console)
    for c, label in zip(curves, labels(curves)) if args.x != "rank" else ():
        found = [*cost_lines(c, args.x), *equal_cost.lines(c, args.x)]
        for line in [f"{label}:"] * (len(curves) > 1 and bool(found)) + found:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    more = ", details.png" if (args.out / "details.png").is_file() else ""
    print(printable(f"wrote {args.out}/curve.json, curve.csv, curve.png{more}"))


def _check_cost(curves: list[dict[str, Any]], x: str) -> None:
    """Raises UserError for heads whose cost is not known: otherwise their lines would silently be missing."""
    unknown = sorted({h.get("kind", "low_rank") for c in curves for h in c["heads"] if AXES[x].of(h) is None})
    if x in MEASURED:
        how = "python -m bottleneck.benchmark cost RUN_DIR measures them on this machine"
        check(not unknown, f"--x {x}: not measured for heads of kind {', '.join(unknown)}; {how}")
        machines = sorted({measured_on(h) for c in curves for h in c["heads"]})
        check(len(machines) == 1, f"--x {x}: measured in different ways: {'; '.join(machines)}; {how}")
    check(not unknown, f"--x {x}: not known for heads of kind {', '.join(unknown)}; rank and parameters always are")


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, reported in one line."""
    words = sys.argv[1:] if argv is None else argv
    return cli.one_line_errors(lambda: command(words), after_interrupt="run the same command again")

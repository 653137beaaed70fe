"""A draft's heads taught by a target beside it, against the same heads without one: tokens/s, and memory.

    python -m bottleneck.benchmark taught --target pythia-1b --shape pythia-160m

Both models have random weights, and the tokens are random, since speed depends on shapes alone. The target is a folder
with weights, as `head.teacher=model:PATH` wants it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from bottleneck.benchmark import ours, shapes
from bottleneck.benchmark.table import Row, row
from bottleneck.core.errors import check

NAME = "taught"
OBJECTIVES = ("distill", "mixed", "lk")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    ours.add_arguments(parser, steps=9)
    parser.add_argument("--target", default="pythia-1b", help="shape of the target (default: pythia-1b)")
    parser.add_argument("--objectives", nargs="+", default=["distill", "lk"], choices=OBJECTIVES)


def run(args: argparse.Namespace) -> list[Row]:
    """A row for the heads that learn from the text, and one for each objective with the target's distribution."""
    ranks = ours.read_ranks(args)
    check(args.steps > 1, "--steps: the first step is warm-up, give 2 or more")
    rows_of = {name: shapes.shape(name).vocab for name in (args.target, args.shape)}
    check(
        rows_of[args.target] >= rows_of[args.shape],
        f"--target {args.target}: has {rows_of[args.target]} rows, --shape {args.shape} has {rows_of[args.shape]}",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said, rows = Console(stderr=True), []
    with (
        tempfile.TemporaryDirectory() as name,
        ours.inputs(args.shape, args.steps * args.batch * args.block) as (backbone, tokens),
    ):
        target = shapes.weights_folder(args.target, Path(name) / "target", device)
        for objective in ["ce", *args.objectives]:
            teacher = [] if objective == "ce" else [f"head.teacher=model:{target}"]
            case = ours.Case(
                args.shape,
                ranks,
                args.rates,
                args.steps,
                args.batch,
                args.micro_batch,
                args.block,
                device,
                [*args.overrides, f"objective={objective}", *teacher],
            )
            said.print(f"{case.name}: {objective}", highlight=False)
            found = ours.measure(case, backbone, tokens)
            by = f"{objective}, by {args.target}" if teacher else "ce, no target"
            parts = ", ".join(f"{p} {1e3 * s:.1f} ms" for p, s in found.parts.items())
            rows.append(
                row(
                    NAME,
                    case.name,
                    by,
                    found.seconds,
                    case.tokens,
                    "tokens",
                    peak_mib=found.peak_mib,
                    device=device,
                    note=parts,
                )
            )
    return rows

"""Speed measured against peers: python -m bottleneck.benchmark NAME [--csv FILE]

A benchmark is a module of this package with `NAME`, `add_arguments(parser)` and `run(args) -> list[Row]`. It is
imported when it is chosen.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Optional

from rich.console import Console

from bottleneck.benchmark import slowed, table
from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import Parser, check

WIDTH = 130  # of the table at least, also if the output is a file
BENCHMARKS = {
    "heads": "one head step against PyTorch, QuACK, Liger and cut-cross-entropy: time, memory, error",
    "objectives": "one head step under each objective, in units of cross-entropy's",
    "tiles": "the best tiles of the low-rank kernels, by search",
    "variants": "variants of the low-rank kernels beside the kernels as they are",
    "decode": "the head's step in decoding: one matrix against two of rank r",
    "vllm": "the head's step inside vLLM, likewise",
    "sweep": "one pass that trains all ranks against one ordinary Lightning run per rank",
    "taught": "heads taught by a target beside the backbone against the same heads without: tokens/s, memory",
    "scale": "one sweep on 1, 2, 4 … GPUs: tokens/s, where a step's time goes, memory",
    "killed": "one process of a run killed under torchrun: time lost, heads compared",
    "data": "preparing tokens against datasets.map, loading prepared tokens, opening and reading token files",
    "starts": "structured solves for a start beside fisher and refined: KL and time",
    "startup": "seconds until the first optimizer step, part by part, and of --help",
    "cost": "milliseconds of a training step and of a decoded token for each head of runs, written into their curves",
    "forecast": "the stored curves of study=forecast, and how its law fares on ranks, backbones and texts left out",
    "forward": "hidden states per second of the frozen backbone, eager and compiled",
}
FILES = {"vllm": "vllm_decode"}  # where a name is not that of the module


def command(argv: list[str]) -> list[table.Row]:
    names = ", ".join(BENCHMARKS)
    check(bool(argv), f"benchmark: give one of {names}")
    if argv[0] in ("-h", "--help"):
        print("\n".join([__doc__.strip(), "", *(f"  {name:10s} {about}" for name, about in BENCHMARKS.items())]))
        return []
    check(argv[0] in BENCHMARKS, f"benchmark {argv[0]}: no such benchmark; allowed are {names}")
    module = importlib.import_module(f"bottleneck.benchmark.{FILES.get(argv[0], argv[0])}")
    parser = Parser(prog=f"python -m bottleneck.benchmark {module.NAME}", description=BENCHMARKS[module.NAME])
    parser.add_argument("--csv", type=Path, help="write the rows there as well")
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(argv[1:])
    with slowed.watch() as readings:
        rows = module.run(args)
    for row in rows:
        if row.device == "cuda":
            row.slowed = slowed.warning(readings)
    table.show(rows, Console(width=max(Console().width, WIDTH)))
    if args.csv is not None:
        table.write_csv(rows, args.csv)
    return rows


def main(argv: Optional[list[str]] = None) -> int:
    """Return the exit code: 2 for bad input, reported in one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    work = sys.argv[1:] if argv is None else argv
    return cli.one_line_errors(lambda: command(work), after_interrupt="no rows are written")


if __name__ == "__main__":
    sys.exit(main())

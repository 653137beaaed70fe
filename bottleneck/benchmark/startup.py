"""How long a run takes until its first optimizer step, part by part, and how long --help takes.

Each run is `python train.py` in a process of its own, which ends after that step. Rows are seconds on the clock; their
notes have the CPU seconds of that process. What is measured is printed at once, and kept after a Ctrl-C. The backbone's
weights are random but stored as a model's are, and read from the disk; the first run also fills the caches of compiled
kernels, so it is reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from bottleneck.benchmark import ours, shapes
from bottleneck.benchmark.moments import LAST
from bottleneck.benchmark.table import Row, row
from bottleneck.config.numbers import as_count
from bottleneck.core.errors import check
from bottleneck.core.paths import ROOT

NAME = "startup"
HELPS = {
    "train.py --help": ["train.py", "--help"],
    "curve --help": ["-m", "bottleneck.curve", "--help"],
    "study --help": ["-m", "bottleneck.study", "--help"],
    "export --help": ["-m", "bottleneck.export", "--help"],
}


class Moment(NamedTuple):
    """Seconds on the clock and of the CPU since a command began."""

    clock: float
    cpu: float


Run = dict[str, Moment]  # the end of each part of a start, in order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ours.add_arguments(parser, steps=2)
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs after the first, and calls of each --help (default: 3)"
    )


def run(args: argparse.Namespace) -> list[Row]:
    ranks = ours.read_ranks(args)
    as_count("--repeats", args.repeats)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # unlike the other benchmarks of whole runs, as `train.py` decides: so short a run does not compile its layers
    more = ["backbone.weights=pretrained", "backbone.compile=auto", *args.overrides]
    case = ours.Case(args.shape, ranks, args.rates, args.steps, args.batch, args.micro_batch, args.block, device, more)
    said = Console(stderr=True)
    rows: list[Row] = []
    runs: list[Run] = []
    try:
        for name, command in HELPS.items():
            rows.append(_row(name, "whole command", [_whole(command) for _ in range(args.repeats)], "cpu"))
            said.print(f"{name}: {rows[-1].p50:.2f} s, {rows[-1].note}", highlight=False, soft_wrap=True)
        with ours.inputs(args.shape, args.steps * case.tokens) as (backbone, tokens):
            shapes.random_backbone(args.shape, device).save_pretrained(backbone)
            for number in range(1 + args.repeats):
                runs.append(_moments(case, backbone, tokens))
                parts = ", ".join(f"{part} {took.clock:.2f} s" for part, took in _durations(runs[-1]).items())
                said.print(f"run {number}: {parts}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:  # or a time limit that sends it
        if not rows + runs:
            raise
        said.print("interrupted; the rows before are kept", highlight=False, soft_wrap=True)
    return rows + _rows(case.name, runs, device)


def _rows(case: str, runs: list[Run], device: str) -> list[Row]:
    """One row for the first run, one for each part of the later ones, and one for their sum."""
    ends = [list(moments.values())[-1] for moments in runs]
    rows = [_row(case, "first run: to the end of the first step", ends[:1], device)] if runs else []
    if runs[1:]:
        parts = [_durations(moments) for moments in runs[1:]]
        rows += [_row(case, part, [took[part] for took in parts], device) for part in parts[0]]
        rows.append(_row(case, "to the end of the first step", ends[1:], device))
    return rows


def _durations(moments: Run) -> Run:
    """Seconds of each part."""
    begins = [Moment(0.0, 0.0), *moments.values()]
    return {
        part: Moment(end.clock - begin.clock, end.cpu - begin.cpu)
        for begin, (part, end) in zip(begins, moments.items())
    }


def _row(case: str, what: str, took: list[Moment], device: str) -> Row:
    cpu = statistics.median(t.cpu for t in took)
    return row(NAME, case, what, [t.clock for t in took], device=device, note=f"{cpu:.2f} s of CPU")


def _whole(command: list[str]) -> Moment:
    """Run a command of Python. Raises UserError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _, status, used = os.wait4(process.pid, 0)  # instead of process.wait, which does not tell the CPU seconds
    except KeyboardInterrupt:
        ours.stop(process)
        raise
    clock = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    check(process.returncode == 0, f"benchmark: {' '.join(command)} ended with {process.returncode}")
    return Moment(clock, used.ru_utime + used.ru_stime)


def _moments(c: ours.Case, backbone: Path, tokens: Path) -> Run:
    """Run a case until its first step is done. Raises UserError if it fails before."""
    with tempfile.TemporaryDirectory() as run:
        file = Path(run) / "moments.json"
        command = [sys.executable, "-m", "bottleneck.benchmark.moments", str(file)]
        command += [*ours.overrides(c, backbone, tokens), f"hydra.run.dir={run}/run"]
        start = time.time()
        code = ours.call(command)
        found = json.loads(file.read_text()) if file.is_file() else {}
        check(code == 0 and LAST in found, f"benchmark: train.py ended with {code} before its first step, see above")
        return {part: Moment(moment - start, cpu) for part, (moment, cpu) in found.items()}

"""How long a run takes until its first optimizer step, part by part, and how long --help takes.

Each run is `python train.py` in a process of its own. The backbone's weights are random but stored as a model's are,
and read from the disk; the first run also fills the caches of compiled kernels, so it is reported apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from bottleneck.benchmark import ours, shapes
from bottleneck.benchmark.table import Row, row
from bottleneck.config.numbers import as_count
from bottleneck.core.errors import UserError
from bottleneck.core.paths import ROOT

NAME = "startup"
HELPS = {
    "train.py --help": ["train.py", "--help"],
    "curve --help": ["-m", "bottleneck.curve", "--help"],
    "study --help": ["-m", "bottleneck.study", "--help"],
    "export --help": ["-m", "bottleneck.export", "--help"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ours.add_arguments(parser, steps=2)
    parser.add_argument("--repeats", type=int, default=3, help="runs after the first (default: 3)")


def run(args: argparse.Namespace) -> list[Row]:
    ranks = ours.read_ranks(args)
    as_count("--repeats", args.repeats)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said = Console(stderr=True)
    rows = []
    for name, command in HELPS.items():
        seconds = [_seconds([sys.executable, *command]) for _ in range(1 + args.repeats)][1:]
        rows.append(row(NAME, name, "whole command", seconds))
    more = ["backbone.weights=pretrained", *args.overrides]
    case = ours.Case(args.shape, ranks, args.rates, args.steps, args.batch, args.micro_batch, args.block, device, more)
    with ours.inputs(args.shape, args.steps * case.tokens) as (backbone, tokens):
        shapes.random_backbone(args.shape, device).save_pretrained(backbone)
        runs = []
        for number in range(1 + args.repeats):
            runs.append(_moments(case, backbone, tokens))
            took = runs[-1][list(runs[-1])[-1]]
            said.print(f"run {number}: first step done after {took:.1f} s", highlight=False)
    rows.append(row(NAME, case.name, "first run: to the end of the first step", [list(runs[0].values())[-1]]))
    return rows + _parts(case.name, runs[1:], device)


def _parts(case: str, runs: list[dict[str, float]], device: str) -> list[Row]:
    """One row for each part, and the sum. Args: runs: {part: seconds after the command at its end}, in order."""
    names = list(runs[0])
    rows = []
    for before, part in zip([None, *names], names):
        seconds = [moments[part] - (moments[before] if before else 0.0) for moments in runs]
        rows.append(row(NAME, case, part, seconds, device=device))
    ends = [moments[names[-1]] for moments in runs]
    return [*rows, row(NAME, case, "to the end of the first step", ends, device=device)]


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode:
        raise UserError(f"benchmark: {' '.join(command[1:])} ended with {done.returncode}")
    return time.perf_counter() - start


def _moments(c: ours.Case, backbone: Path, tokens: Path) -> dict[str, float]:
    """Run a case. Returns seconds from the command to the end of each part, in order. Raises UserError if it fails."""
    with tempfile.TemporaryDirectory() as run:
        file = Path(run) / "moments.json"
        command = [sys.executable, "-m", "bottleneck.benchmark.moments", str(file)]
        command += [*ours.overrides(c, backbone, tokens), f"hydra.run.dir={run}/run"]
        start = time.time()
        code = ours.call(command)
        if code or not file.is_file():
            raise UserError(f"benchmark: train.py ended with {code}, see above")
        return {part: moment - start for part, moment in json.loads(file.read_text()).items()}

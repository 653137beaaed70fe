"""Kill one process of a run under torchrun by SIGKILL; measure the time lost and compare the heads.

python -m bottleneck.benchmark killed --shape pythia-1b --processes 4
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

from bottleneck.benchmark import ours, scale
from bottleneck.benchmark.table import Row, row
from bottleneck.core.errors import UserError, check
from bottleneck.core.paths import ROOT

NAME = "killed"
WAIT = 300.0  # seconds for a group to start, or to start again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    scale.add_arguments(parser)
    parser.add_argument("--checkpoint-every", type=int, default=5, help="steps between checkpoints (default: 5)")


def trains(pid: int) -> bool:
    """Whether a process trains or supervises, and is not a helper process of Python."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"train.py" in words or b"spawn_main" in words


def differences(a: Path, b: Path) -> float:
    """Return the largest relative difference between two runs' heads; 0 if they are bit-identical."""
    worst = 0.0
    for file in sorted((a / "heads").iterdir()):
        one, other = load_file(file), load_file(b / "heads" / file.name)
        worst = max([worst, *(float((one[k] - other[k]).abs().max() / one[k].abs().max()) for k in one)])
    return worst


class Run:
    """A run under launch/torchrun.sh, of which one process may be killed."""

    def __init__(self, processes: int, overrides: list[str], folder: Path):
        self.folder = folder
        env = dict(os.environ, NPROC=str(processes), RESTARTS="1", PYTHON=sys.executable, RUN_DIR=str(folder))
        # in its own session, so that all of its processes can be ended with this one
        self.process = subprocess.Popen(
            [str(ROOT / "launch/torchrun.sh"), *overrides], env=env, stdout=sys.stderr, start_new_session=True
        )

    def step(self) -> int:
        """The last step that was logged."""
        file = self.folder / "metrics.csv"
        words = file.read_text().splitlines()[-1:] if file.exists() else []
        number = words[0].split(",")[0] if words else ""
        return int(number) if number.isdigit() else 0

    def until(self, step: int) -> float:
        """Wait until a step is logged; return that time. Raises UserError after WAIT, or if the run has ended."""
        end = time.monotonic() + WAIT
        while self.step() < step:
            check(
                self.process.poll() is None,
                f"benchmark: the run ended with {self.process.returncode} before step {step}, see above",
            )
            check(time.monotonic() < end, f"benchmark: no step {step} within {WAIT:.0f} s, see above")
            time.sleep(0.02)
        return time.monotonic()

    def end(self) -> None:
        if self.process.wait() != 0:
            raise UserError(
                f"benchmark: {self.folder.name}: launch/torchrun.sh ended with {self.process.returncode}, see above"
            )

    def stop(self) -> None:
        ours.stop(self.process)


def _kill(one: Run, every: int) -> tuple[int, float]:
    """Kill a worker after two checkpoints; return the step reached and the seconds until it was passed again."""
    one.until(2 * every + 1)
    workers = [p for p in ours.family(one.process.pid)[1:] if trains(p)]  # the first is torchrun's agent
    killed = time.monotonic()
    os.kill(workers[-1], signal.SIGKILL)
    time.sleep(1.0)  # let pending rows reach the log
    reached = one.step()
    return reached, one.until(reached + 1) - killed


def run(args: argparse.Namespace) -> list[Row]:
    counts, ranks, device = scale.read(args)
    n, every = counts[-1], args.checkpoint_every
    least = f"give {2 * every + 3} or more, twice --checkpoint-every and a little"
    check(every >= 1 and args.steps >= 2 * every + 3, f"--steps {args.steps}: {least}")
    said = Console(stderr=True)
    case = ours.Case(
        args.shape,
        ranks,
        args.rates,
        args.steps,
        n * args.batch,
        args.micro_batch,
        args.block,
        device,
        [*args.overrides, f"trainer.checkpoint_every={every}"],
    )
    with ours.inputs(args.shape, args.steps * case.tokens) as (backbone, tokens), tempfile.TemporaryDirectory() as name:
        overrides = ours.overrides(case, backbone, tokens)
        folders = [Path(name) / which for which in ("whole", "cut")]
        rows: list[Row] = []
        for folder in folders:
            said.print(f"{case.name} on {n}: {folder.name}", highlight=False)
            one = Run(n, overrides, folder)
            try:
                start = one.until(1)
                if folder.name == "cut":
                    reached, lost = _kill(one, every)
                else:
                    step = (one.until(args.steps) - start) / (args.steps - 1)
                one.end()
            finally:
                one.stop()
        apart = differences(*folders)
    rows.append(
        row(
            NAME,
            case.name,
            f"{n} processes, undisturbed",
            [step],
            case.tokens,
            "tokens",
            device=device,
            note=f"seconds a step, with a checkpoint every {every}",
        )
    )
    again = reached - reached // every * every
    heads = "heads bit-identical" if apart == 0 else f"heads differ by up to {apart:.1e} of their largest entry"
    rows.append(
        row(
            NAME,
            case.name,
            "one SIGKILL",
            [lost],
            device=device,
            note=f"seconds until step {reached} was passed again, {again} steps of them repeated; {heads}",
        )
    )
    return rows

"""Run `python train.py` in its own process, on a shape with random weights and random tokens, and read its log."""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np

from bottleneck.benchmark import shapes
from bottleneck.config.numbers import as_count
from bottleneck.core.errors import UserError, check
from bottleneck.core.paths import ROOT

PATIENCE = 100.0  # seconds after a Ctrl-C: a step, a checkpoint, and torch's agent waiting for its processes
PARTS = ("forward", "heads", "reduction", "optimizer")


class Case(NamedTuple):
    """A measured run. batch: sequences in an optimizer step, over all processes; rates: heads at each rank."""

    shape: str
    ranks: list[int]
    rates: int
    steps: int
    batch: int
    micro_batch: int
    block: int
    device: str
    overrides: list[str]

    @property
    def name(self) -> str:
        return f"{self.shape}, {len(self.ranks) * self.rates} heads"

    @property
    def tokens(self) -> int:
        return self.batch * self.block


class Logged(NamedTuple):
    """Seconds of each step after the first, median seconds of each part, peak memory of one GPU in MiB or None."""

    seconds: list[float]
    parts: dict[str, float]
    peak_mib: float | None


def add_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """Declare the arguments of a benchmark of `train.py` on a shape. Args: steps: the default of --steps."""
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides of train.py: trainer=fsdp, backbone.compile=true"
    )
    parser.add_argument(
        "--shape", default="pythia-160m", help=f"one of {', '.join(shapes.SHAPES)} (default: pythia-160m)"
    )
    parser.add_argument("--ranks", help="default: those of ranks=auto for the shape")
    parser.add_argument("--rates", type=int, default=1, help="learning rates, and so heads, at every rank (default: 1)")
    parser.add_argument(
        "--steps",
        type=int,
        default=steps,
        help=f"optimizer steps of each of our runs; the first is warm-up (default: {steps})",
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="sequences in an optimizer step, of one GPU (default: 64)"
    )
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences in a forward pass (default: 8)")
    parser.add_argument("--block", type=int, default=2048, help="tokens in a sequence (default: 2048)")


def read_ranks(args: argparse.Namespace) -> list[int]:
    """Check a benchmark's numbers and return its ranks. Raises UserError."""
    for name in ("rates", "steps", "batch", "micro_batch", "block"):
        as_count("--" + name.replace("_", "-"), getattr(args, name))
    if not args.ranks:
        return shapes.ranks(args.shape)
    check(
        all(w.isdigit() and int(w) > 0 for w in args.ranks.split(",")),
        f"--ranks {args.ranks}: must be whole numbers with commas between",
    )
    top = shapes.shape(args.shape).hidden
    ranks = [int(r) for r in args.ranks.split(",")]
    check(max(ranks) <= top, f"--ranks {args.ranks}: allowed are 1 to {top}, the hidden size of {args.shape}")
    return ranks


@contextlib.contextmanager
def inputs(shape: str, tokens: int) -> Iterator[tuple[Path, Path]]:
    """Make temporary folders of a backbone's shape and of that many prepared tokens."""
    with tempfile.TemporaryDirectory() as name:
        backbone = shapes.backbone_folder(shape, Path(name) / "backbone")
        yield backbone, shapes.tokens_folder(Path(name) / "tokens", tokens, shapes.shape(shape).vocab)


def overrides(c: Case, backbone: Path, tokens: Path) -> list[str]:
    """Return the overrides of train.py for a case, all but the run's folder; the case's own come last."""
    rates = [round(1e-3 * 1.5**i, 6) for i in range(c.rates)]
    sharded = any(
        o in ("trainer=fsdp", "trainer=deepspeed_zero3") or o.startswith("trainer.shard=") for o in c.overrides
    )
    return [
        "experiment=paper",
        "backbone=local",
        f"backbone.path={backbone}",
        "backbone.weights=random",
        "data=prepared",
        f"data.prepared={tokens}",
        f"data.block_size={c.block}",
        f"ranks={c.ranks}",
        f"optim.lr={rates}",
        "head.init=scaled",
        "head.calibration_tokens=4096",
        f"batch_size={c.batch}",
        f"tokens={c.steps * c.tokens}",
        "trainer.val_every=null",
        f"trainer.micro_batch_size={c.micro_batch}",
        "trainer.log_every=1",
        f"trainer.accelerator={'gpu' if c.device == 'cuda' else 'cpu'}",
        "trainer.checkpoint_every=null",
        f"backbone.compile={'true' if c.device == 'cuda' and not sharded else 'auto'}",
        *c.overrides,
    ]


def family(pid: int) -> list[int]:
    """Return a living process and all its descendants."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(p) for p in path.read_text().split() if int(p) not in found]
    return found


def stop(process: subprocess.Popen, patience: float = 0.0) -> None:
    """End a run and all its processes, which torch starts in their own sessions.

    Args: patience: seconds for it to end by itself after a Ctrl-C.
    """
    if process.poll() is None and patience:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    if process.poll() is None:
        for pid in reversed(family(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def call(command: list[str]) -> int:
    """Return the exit code of a command; its processes end with it, also if this process is interrupted."""
    process: subprocess.Popen | None = None
    try:
        with _interrupt_later():  # a Ctrl-C while Popen returns would leave a process that nobody knows
            process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
        return process.wait()
    finally:
        if process is not None:
            stop(process, PATIENCE)


@contextlib.contextmanager
def _interrupt_later() -> Iterator[None]:
    """Raise a Ctrl-C that comes within the block at its end. Outside the main thread none comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def measure(c: Case, backbone: Path, tokens: Path) -> Logged:
    """Run a case. Raises UserError if it fails; its output goes to stderr."""
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, str(ROOT / "train.py"), *overrides(c, backbone, tokens), f"hydra.run.dir={run}"]
        code = call(command)
        if code:
            raise UserError(f"benchmark: train.py ended with {code}, see above")
        found: dict[str, list[float]] = {}
        with open(Path(run) / "metrics.csv", newline="") as f:
            for r in csv.DictReader(f):
                found.setdefault(f"{r['metric']}/{r['head']}", []).append(float(r["value"]))
    parts = {
        p: float(np.median(found[f"train/seconds/{p}"][1:]))
        for p in PARTS
        if len(found.get(f"train/seconds/{p}", [])) > 1
    }
    peak = found.get("train/peak_memory_gib/all")
    return Logged(
        [c.tokens / s for s in found["train/tokens_per_second/all"]], parts, 1024 * max(peak) if peak else None
    )

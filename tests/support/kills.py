"""SIGKILL any process of a run at random moments until it finishes: nothing may be lost, no step logged twice.

python tests/support/kills.py --kills 20 --processes 2 OVERRIDES        prints each kill; exit code 1 if results differ
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bottleneck.benchmark.killed import trains  # noqa: E402
from bottleneck.benchmark.ours import family  # noqa: E402
from bottleneck.training.run_folder import LAST, PREVIOUS  # noqa: E402


def disturb(overrides: list[str], folder: Path, kills: int, seed: int, say=lambda words: None) -> int:
    """Run, kill one process at a random moment and repeat; then let the run finish. Returns the number of kills."""
    rng = random.Random(seed)
    done = 0
    while True:
        command = [sys.executable, str(ROOT / "train.py"), *overrides, "ckpt_path=last", f"hydra.run.dir={folder}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done < kills:
            marks = [(p, p.stat().st_mtime_ns if p.exists() else 0) for p in (folder / LAST, folder / PREVIOUS)]
            began = time.monotonic()
            # only after this try has trained a step, so that the run makes progress
            while process.poll() is None and time.monotonic() - began < 120:
                if any(p.exists() and p.stat().st_mtime_ns != mark for p, mark in marks):
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.6))
            victims = [p for p in family(process.pid) if trains(p)]
            if process.poll() is None and victims:
                victim = rng.choice(victims)
                os.kill(victim, signal.SIGKILL)
                done += 1
                say(f"kill {done}: process {victims.index(victim)} of {len(victims)}")
        code = process.wait(300)
        error = process.stderr.read()
        if code == 0:
            return done
        assert code in (2, -signal.SIGKILL), (
            error
        )  # our error line, or the killed process was the one that would print it
        assert "Traceback" not in error, error


def differences(whole: Path, cut: Path) -> list[str]:
    """Differences of the disturbed run from the undisturbed one: heads bit for bit, each step logged once."""
    wrong = [
        f"heads/{p.name}"
        for p in (whole / "heads").iterdir()
        if (cut / "heads" / p.name).read_bytes() != p.read_bytes()
    ]
    a, b = ([r for r in (d / "metrics.csv").read_text().splitlines() if "second" not in r] for d in (whole, cut))
    return wrong + ["metrics.csv"] * (a != b) + [str(p) for p in cut.rglob("*.part")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    overrides = [*args.overrides, f"trainer.devices={args.processes}", "trainer.log_every=1"]
    with tempfile.TemporaryDirectory() as name:
        whole, cut = Path(name) / "whole", Path(name) / "cut"
        subprocess.run(
            [sys.executable, "train.py", *overrides, f"hydra.run.dir={whole}"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        done = disturb(overrides, cut, args.kills, args.seed, print)
        wrong = differences(whole, cut)
    print(f"{done} kills; " + (f"differs: {', '.join(wrong)}" if wrong else "heads bit-identical, every step once"))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

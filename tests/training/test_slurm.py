"""A real Slurm, started by the tests: a job that is warned, preempted or killed resumes and ends with equal heads."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bottleneck.training.run_folder import LAST
from conftest import ROOT, assert_same_heads, heads_of
from support import slurm_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# the embedded backbone: 40 steps of half a second
RUN = [
    "ranks=[8,64]",
    "tokens=81920",
    "batch_size=4",
    "data.validation_tokens=4096",
    "head.calibration_tokens=2048",
    "trainer.micro_batch_size=2",
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.checkpoint_every=5",
    "trainer.progress=false",
    "trainer.log_every=1",
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The same run without Slurm, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "train.py", *RUN, "trainer.devices=2", f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def submit(slurm, folder: Path, *options: str) -> str:
    env = {"PYTHON": sys.executable, "RUN_DIR": str(folder)}
    exported = ",".join(["ALL", *(f"{k}={v}" for k, v in env.items())])
    command = [
        "sbatch",
        "--parsable",
        "--ntasks-per-node=2",
        f"--export={exported}",
        f"--output={folder}.log",
        *options,
        "launch/slurm.sbatch",
        *RUN,
    ]
    return slurm.run(*command, cwd=ROOT).strip()


def under_way(slurm, folder: Path, steps: int = 7) -> None:
    """Wait until a run has done some steps."""

    def there() -> bool:
        path = folder / "metrics.csv"
        return path.exists() and any(
            int(r.split(",")[0] or 0) >= steps
            for r in path.read_text().splitlines()[1:]
            if r.count(",") >= 4 and r.split(",")[0].isdigit()
        )

    log = Path(f"{folder}.log")
    output = log.read_text()[-2000:] if log.exists() else ""
    slurm.until(there, 200, f"{folder} does not start training: {output}")


def finished(slurm, job: str, folder: Path, whole: Path) -> str:
    slurm.until(
        lambda: slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), 300, f"job {job} does not end"
    )
    text = Path(f"{folder}.log").read_text()
    assert slurm.state(job) == "COMPLETED", text[-3000:]
    assert_same_heads(heads_of(whole), heads_of(folder))
    # every step is there once
    a, b = ([r for r in (d / "metrics.csv").read_text().splitlines() if "second" not in r] for d in (whole, folder))
    assert a == b
    return text


@pytest.mark.parametrize("how", ["USR1", "requeue", "killed"])
def test_a_job_resumes_by_itself(slurm, whole, tmp_path, how):
    folder = tmp_path / "run"
    job = submit(slurm, folder)
    under_way(slurm, folder)
    if how == "USR1":
        slurm.run("scancel", "--signal=USR1", job)
    elif how == "requeue":
        slurm.run("scontrol", "requeue", job)
    elif how == "killed":
        # as where a node dies, when Slurm itself puts the job back (not shown: Debian's slurmctld 22.05 crashes after
        # it has)
        for pid in map(
            int,
            subprocess.run(["pgrep", "-f", f"hydra.run.dir={folder}"], capture_output=True, text=True).stdout.split(),
        ):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        slurm.until(lambda: slurm.state(job) in ("FAILED", "CANCELLED"), 90, "the job does not end")
        slurm.run("scontrol", "requeue", job)
    slurm.hurry(job)
    text = finished(slurm, job, folder, whole)
    assert "resuming from" in text
    if how == "USR1":  # what Slurm sends ahead of a time limit
        assert f"job {job} is back in the queue" in text


def test_a_finished_job_that_is_requeued_does_nothing(slurm, whole, tmp_path):
    folder = tmp_path / "run"
    job = submit(slurm, folder)
    finished(slurm, job, folder, whole)
    before = {
        p: p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (".lock", "train.log") and ".hydra" not in p.parts
    }
    slurm.run("scontrol", "requeue", job)
    slurm.hurry(job)
    text = finished(slurm, job, folder, whole)
    assert "is finished: nothing to do" in text
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_sweep_is_an_array_job(slurm, whole, tmp_path):
    """hydra/launcher=slurm: two jobs of two tasks each; one receives submitit's signal, USR2, and resumes."""
    overrides = [o for o in RUN if not o.startswith("ranks")]
    command = [
        sys.executable,
        "train.py",
        "-m",
        "hydra/launcher=slurm",
        *overrides,
        "ranks=8,64",
        "trainer.devices=2",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    sweep = subprocess.Popen(
        command, cwd=ROOT, env=slurm.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        under_way(slurm, tmp_path / "sweep" / "1", 3)
        first = slurm.run("squeue", "-h", "-r", "-o", "%A %a").split()
        job = slurm.run("squeue", "-h", "-r", "-o", "%F_%K %T").splitlines()
        target = next(line.split()[0] for line in job if line.split()[0].endswith("_1"))
        slurm.run("scancel", "--signal=USR2", target)
        slurm.hurry(target)
        out, _ = sweep.communicate(timeout=400)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, (first, out[-3000:])
    together = {}
    for number in "01":
        together |= heads_of(tmp_path / "sweep" / number)
    assert_same_heads(heads_of(whole), together)
    assert json.loads((tmp_path / "sweep" / "1" / "curve.json").read_text())["heads"][0]["rank"] == 64
    assert (tmp_path / "sweep" / "1" / LAST).exists()

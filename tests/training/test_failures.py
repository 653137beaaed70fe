"""Failures of one part of a larger command: reported in one line, and the other parts run."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode

from bottleneck.benchmark import killed, ours, scale
from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import UserError
from bottleneck.training.metrics_csv import MetricsCSV
from conftest import ROOT


@pytest.mark.parametrize(
    "launcher, mode, goes_on",
    [
        ("x.BasicLauncher", RunMode.MULTIRUN, True),
        ("x.SlurmLauncher", RunMode.MULTIRUN, False),
        ("x.BasicLauncher", RunMode.RUN, False),
    ],
)
def test_a_defect_in_one_job_does_not_stop_the_others(monkeypatch, capsys, launcher, mode, goes_on):
    """Its traceback is printed and the next jobs run, as after a UserError. On a cluster or alone it is raised."""
    run = SimpleNamespace(
        runtime=SimpleNamespace(output_dir="out", cwd="."),
        job=SimpleNamespace(num=1, chdir=False, override_dirname="ranks=8,tokens=5", get=lambda *_: 1),
        overrides=SimpleNamespace(task=["ranks=8", "tokens=5"]),
        mode=mode,
        launcher={"_target_": launcher},
        sweep=SimpleNamespace(dir="sweep"),
    )
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: run)
    monkeypatch.setattr(cli.sys, "argv", ["train.py", "-m", "ranks=4,8", "tokens=5"])
    monkeypatch.setattr(cli, "failures", [])
    monkeypatch.setattr(cli, "started", [0])
    monkeypatch.setattr(cli, "folders", [])
    monkeypatch.setattr(cli, "sweeps", [])
    with contextlib.nullcontext() if goes_on else pytest.raises(ZeroDivisionError):
        cli.job(lambda: 1 / 0)
    assert ("Traceback" in capsys.readouterr().err) == goes_on
    assert cli.failures == (["job 1 (ranks=8): ZeroDivisionError: division by zero"] if goes_on else [])
    if goes_on:
        assert (
            cli.one_line_errors(lambda: None) == 2
            and "1 of 2 jobs failed:\njob 1 (ranks=8): ZeroDivisionError" in capsys.readouterr().err
        )


@pytest.mark.slow
def test_a_refused_run_leaves_no_folder_and_a_stopped_one_names_its_own(tmp_path, toy):
    """In a default folder, whose name the user does not know. A folder with the user's files is not removed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def started(*overrides, **options):
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *overrides],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    refused = started("optim.lr=-1")
    assert (
        "error: " in refused.communicate()[1] and refused.returncode == 2 and not any((tmp_path / "outputs").glob("*"))
    )
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    assert started("optim.lr=-1", "hydra.run.dir=own").wait() == 2 and (tmp_path / "own" / "notes.txt").exists()
    lost = started("ckpt_path=last")
    assert (
        "error: ckpt_path=last: resumes in hydra.run.dir, which is a new folder by default" in lost.communicate()[1]
        and lost.returncode == 2
    )
    run = started(*toy, "tokens=76800", "trainer.log_every=1")
    while not any("train/loss" in m.read_text() for m in tmp_path.glob("outputs/*/*/metrics.csv")):
        time.sleep(0.02)
        assert run.poll() is None
    run.terminate()
    _, error = run.communicate()
    (folder,) = (p.relative_to(tmp_path) for p in tmp_path.glob("outputs/*/*"))
    assert run.returncode == 143 and error.strip().endswith(
        f"; resume with ckpt_path=last and hydra.run.dir={folder}"
    ), error


def test_metrics_on_a_full_disk_are_one_line():
    logger = MetricsCSV(Path("/dev/full"))
    logger._kept = set()
    with pytest.raises(UserError, match="^/dev/full: cannot be written: .*No space left"):
        logger.log_metrics({"train/loss/r8": 1.0, "tokens": 5}, step=1)


def arguments(**given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scale.add_arguments(parser)
    args = parser.parse_args(
        ["--shape", "tiny", "--batch", "2", "--micro-batch", "2", "--block", "64", "--steps", "3", "--processes", "1,2"]
    )
    return argparse.Namespace(**{**vars(args), "overrides": [], **given})


@pytest.mark.parametrize(
    "error, kept", [(UserError("out of memory"), ["2 processes"]), (None, ["1 process", "2 processes"])]
)
def test_one_number_of_gpus_that_fails_leaves_the_other_rows(monkeypatch, error, kept):
    def measure(case, backbone, tokens):
        if error and case.overrides[-1] == "trainer.devices=1":
            raise error
        return SimpleNamespace(seconds=[1.0, 1.0], peak_mib=1.0, parts={"forward": 0.5})

    monkeypatch.setattr(scale.ours, "measure", measure)
    monkeypatch.setattr(scale.ours, "inputs", lambda *_: contextlib.nullcontext((None, None)))
    assert [r.implementation for r in scale.run(arguments())] == kept


def test_all_numbers_of_gpus_failing_is_an_error_and_an_interruption_keeps_rows(monkeypatch):
    calls = []

    def measure(case, backbone, tokens):
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return SimpleNamespace(seconds=[1.0], peak_mib=1.0, parts={"forward": 0.5})

    monkeypatch.setattr(scale.ours, "inputs", lambda *_: contextlib.nullcontext((None, None)))
    monkeypatch.setattr(scale.ours, "measure", measure)
    assert len(scale.run(arguments())) == 1

    def broken(*_):
        raise UserError("no")

    monkeypatch.setattr(scale.ours, "measure", broken)
    with pytest.raises(UserError, match="^benchmark scale: on 1: no; on 2: no$"):
        scale.run(arguments())


def test_a_stopped_run_leaves_no_process_behind():
    """Not even one in its own session, as torch's workers are."""
    run = killed.Run.__new__(killed.Run)
    run.process = subprocess.Popen(["bash", "-c", "setsid sleep 300 & wait"], start_new_session=True)
    while len(pids := ours.family(run.process.pid)) < 2:
        time.sleep(0.01)
    run.stop()
    assert_gone(pids)


def assert_gone(pids):
    end = time.monotonic() + 10
    while any(Path(f"/proc/{p}").exists() and "Z" not in Path(f"/proc/{p}/stat").read_text().split()[2] for p in pids):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("deaf", [False, True])
def test_an_interrupted_benchmark_ends_its_run(deaf, monkeypatch, tmp_path):
    """Before, subprocess.run killed the run 0.25 s after Ctrl-C, and torch's workers, in their own sessions, kept their
    GPUs. Now the run gets time to end itself; otherwise it is killed together with all its descendants.
    """
    monkeypatch.setattr(ours, "PATIENCE", 1.0 if deaf else 60.0)
    said, pids = tmp_path / "said", []
    trap = "trap '' INT" if deaf else f"trap 'sleep 0.5; kill $!; touch {said}; exit 130' INT"

    before = ours.family(os.getpid())  # helpers of earlier tests among them

    def interrupt():
        while (
            len(found := [p for p in ours.family(os.getpid()) if p not in before]) < 2
            or "sleep" not in Path(f"/proc/{found[-1]}/cmdline").read_text()
        ):
            time.sleep(0.01)
        pids.extend(found)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        ours.call(["bash", "-c", f"{trap}; setsid sleep 300 & wait"])
    assert_gone(pids)
    assert said.exists() != deaf

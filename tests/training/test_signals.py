"""Signals at every moment of a run: the step is finished and saved, and the run resumes to the undisturbed heads."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import Stopped, how_to_resume
from bottleneck.training.progress import TokenProgress
from bottleneck.training.run_folder import LAST
from bottleneck.training.signals import Flag
from conftest import assert_same_heads, heads_of


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(number, step): send a signal while that step ends, before the run looks at its flag."""

    def arrange(number: int, step: int) -> None:
        def send(self, trainer, *_):
            if trainer.global_step == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(TokenProgress, "on_train_batch_end", send)

    return arrange


@pytest.mark.parametrize("number, step", [(signal.SIGTERM, 20), (signal.SIGHUP, 5)])
def test_a_signal_ends_the_run_after_its_step(run, tmp_path, signal_at, number, step, monkeypatch):
    """Once, a signal in the last step was lost, and a closed terminal killed the run without a checkpoint."""
    whole = run(run_dir=tmp_path / "whole")
    with monkeypatch.context():
        signal_at(number, step)
        with pytest.raises(Stopped) as caught:
            run("trainer.progress=true", "trainer.checkpoint_every=50", run_dir=tmp_path / "cut")
    assert (caught.value.signal, caught.value.step) == (number, step)
    assert torch.load(tmp_path / "cut" / LAST, weights_only=True)["global_step"] == step
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert run("ckpt_path=last", run_dir=tmp_path / "cut").curve == whole.curve
    assert_same_heads(heads_of(tmp_path / "whole"), heads_of(tmp_path / "cut"))


def test_slurms_warning_in_the_last_step_requeues_the_job(run, tmp_path, monkeypatch, signal_at):
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    signal_at(signal.SIGUSR1, 2)
    with pytest.raises(Stopped, match="SIGUSR1 after step 2"):
        run("trainer.progress=true", "tokens=1024", "ranks=[2]")
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


def test_sums_of_the_last_step_are_all_read():
    """On a GPU flags are read some steps later, so the last step must read all that remain."""
    flag = Flag()
    for value in (0.0, 15.0, 0.0):
        flag.send(torch.tensor([value]))
    assert flag.agreed(last=True) and not flag._sums
    flag.send(torch.tensor([0.0]))
    assert not flag.agreed(last=True)


def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch):
    """nohup starts processes with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        flag = Flag()
        flag.listen((signal.SIGHUP,))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        flag.leave()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_outside_the_main_thread_trains_and_logs_the_limitation(run, caplog):
    """Python allows signal handlers in the main thread only: it was a ValueError."""
    found = []
    with caplog.at_level("INFO"):
        thread = threading.Thread(target=lambda: found.append(run("tokens=512", "ranks=[2]")))
        thread.start()
        thread.join()
    assert found and found[0].curve["heads"][0]["status"] == "ok"
    assert "outside the main thread: a signal ends it without saving" in caplog.text


def test_the_hint_after_a_stopped_multirun_names_the_sweep(monkeypatch, capsys):
    """With -m, hydra.run.dir=SWEEP/1 is not read: the command in the old hint started a new multirun elsewhere."""

    def main():
        raise Stopped(signal.SIGTERM, 7)

    monkeypatch.setattr(cli, "folders", ["many/1"])
    for sweeps, words in (
        (["many"], "resume with the same command, ckpt_path=last and hydra.sweep.dir=many"),
        ([], "resume with ckpt_path=last and hydra.run.dir=many/1"),
    ):
        monkeypatch.setattr(cli, "sweeps", sweeps)
        assert cli.one_line_errors(main) == 128 + signal.SIGTERM
        assert capsys.readouterr().err == f"stopped by SIGTERM after step 7; {words}\n"


def test_the_hint_of_a_run_without_checkpoints_promises_none(run, monkeypatch, capsys, tmp_path):
    """The folder is that of a real run, whose config says so."""

    def main():
        raise Stopped(signal.SIGTERM, 7)

    run("tokens=512", "ranks=[2]", "trainer.checkpoint_every=null", run_dir=tmp_path)
    monkeypatch.setattr(cli, "folders", [tmp_path])
    monkeypatch.setattr(cli, "sweeps", [])
    assert cli.one_line_errors(main) == 128 + signal.SIGTERM
    kept = "no checkpoint was kept (trainer.checkpoint_every=null): the same command starts again"
    assert capsys.readouterr().err == f"stopped by SIGTERM after step 7; {kept}\n"
    assert how_to_resume(tmp_path) == kept, "what a run says whose process was killed"


def test_slurms_launcher_without_slurm_is_one_line(monkeypatch, capsys):
    """The words are submitit's own."""
    from submitit.slurm.slurm import SlurmExecutor

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert cli.one_line_errors(lambda: SlurmExecutor(folder="x")) == 2
    assert capsys.readouterr().err == "error: hydra/launcher=slurm: there is no Slurm here (no srun command)\n"

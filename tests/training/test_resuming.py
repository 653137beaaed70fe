"""Resuming with one process: damaged checkpoint, kill between two renames, finished run, requeue during validation."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from bottleneck.core.errors import Stopped, UserError
from bottleneck.training.resume import _another as another
from bottleneck.training.resume import wanted_checkpoint as wanted
from bottleneck.training.run_folder import LAST, LOCK, PREVIOUS
from conftest import assert_same_heads, composed, heads_of


def test_a_damaged_last_checkpoint_is_replaced_by_the_previous_one(run, tmp_path, caplog):
    """One flipped byte among the weights is enough; torch itself does not notice it."""
    first = run("trainer.checkpoint_every=7", run_dir=tmp_path / "a")
    run("trainer.checkpoint_every=7", run_dir=tmp_path / "b")
    last = tmp_path / "b" / LAST
    (tmp_path / "b" / "curve.json").unlink()
    raw = bytearray(last.read_bytes())
    raw[len(raw) // 2] ^= 1
    last.write_bytes(raw)
    with caplog.at_level("WARNING"):
        resumed = run("trainer.checkpoint_every=7", "ckpt_path=last", run_dir=tmp_path / "b")
    assert "damaged" in caplog.text and "resuming from previous.ckpt, step 14" in caplog.text
    assert resumed.curve == first.curve
    assert_same_heads(heads_of(tmp_path / "a"), heads_of(tmp_path / "b"))
    # the damaged file was renamed and did not replace the good one, so the same works again
    assert last.with_name("last.ckpt.damaged").read_bytes() == bytes(raw)
    (tmp_path / "b" / "curve.json").unlink()
    last.write_bytes(raw)
    assert run("trainer.checkpoint_every=7", "ckpt_path=last", run_dir=tmp_path / "b").curve == first.curve
    (tmp_path / "b" / "curve.json").unlink()
    for name in (LAST, PREVIOUS):
        (tmp_path / "b" / name).write_bytes(b"no")
    with pytest.raises(UserError, match="last.ckpt: damaged"):
        run("trainer.checkpoint_every=7", "ckpt_path=last", run_dir=tmp_path / "b")


def test_a_run_killed_between_two_renames_resumes_from_the_previous_checkpoint(run, tmp_path):
    whole = run(run_dir=tmp_path / "a")
    run(run_dir=tmp_path / "b")
    (tmp_path / "b" / LAST).unlink()
    assert run("ckpt_path=last", run_dir=tmp_path / "b").curve == whole.curve


def test_a_finished_run_is_left_as_it_is(run, tmp_path):
    first = run()
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != LOCK}
    again = run("ckpt_path=last")
    assert again.curve == first.curve and again.module is None
    assert files == {p: p.stat().st_mtime_ns for p in files}


@pytest.mark.parametrize("kept", ["checkpoints", "no checkpoints"])
def test_inputs_that_a_finished_run_does_not_read_are_named(run, caplog, kept):
    """The run may be repeated where its backbone lies elsewhere, so another path is no error; but it was silent."""
    every = ["trainer.checkpoint_every=null"] if kept == "no checkpoints" else []
    first = run(*every)
    again = run(*every, "ckpt_path=last")
    assert "was not read" not in caplog.text
    again = run(*every, "ckpt_path=last", "data.files=elsewhere.jsonl")
    assert again.curve == first.curve and "data.files=" in caplog.text and "was not read" in caplog.text


def test_a_finished_run_without_checkpoints_is_not_trained_again(run, tmp_path, monkeypatch):
    """The same command, requeued by Slurm or repeated by hand, finds the run finished by comparing run.json."""
    first = run("trainer.checkpoint_every=null")
    for restarts in ("1", "0"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        again = run("trainer.checkpoint_every=null", "ckpt_path=last")
        assert again.module is None and again.curve == first.curve


@pytest.mark.parametrize("kept", ["no checkpoints", "deleted checkpoints"])
def test_a_finished_run_without_checkpoints_is_not_overwritten(run, tmp_path, kept):
    """A command with other ranks replaced the curve, and `heads/` held the heads of both."""
    every = ["trainer.checkpoint_every=null"] if kept == "no checkpoints" else []
    run(*every)
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="holds a run already"):
        run(*every, "ranks=[4]")
    with pytest.raises(UserError, match="ranks=.4.: the run in .* has .2, 8, 32."):
        run(*every, "ranks=[4]", "ckpt_path=last")
    (tmp_path / "run" / "run.json").rename(tmp_path / "run.json")  # the folder of an earlier version
    with pytest.raises(UserError, match="holds results of a run that left no checkpoint"):
        run(*every, "ckpt_path=last")
    (tmp_path / "run.json").rename(tmp_path / "run" / "run.json")
    assert files == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_heads_of_another_run_are_named_in_words_that_can_be_pasted(run, tmp_path):
    """Regression: they were a Python repr of hundreds of characters."""
    low, mos = "{kind: low_rank, rank: 8}", "{kind: mos, rank: [2, 4], lr: 0.01, components: 2}"
    heads = f"[{low}, {mos}, {{kind: block, bands: [30]}}]"
    first = run(f"heads={heads}", "ranks=16", "tokens=512", run_dir=tmp_path / "run").curve
    for other, words in ((["ranks=[2]"], "null"), (["heads=[{rank: 8}]", "ranks=auto"], f"[{low}]")):
        with pytest.raises(UserError) as caught:
            run(*other, "tokens=512", "ckpt_path=last", run_dir=tmp_path / "run")
        said = str(caught.value)
        start, _, stored = said.partition(f"the run in {tmp_path / 'run' / LAST} has ")
        assert start == f"heads={words}: " and stored == f"{heads}; a run is resumed with the settings it began with"
    pasted = run(f"heads={stored.partition(';')[0]}", "ranks=16", "tokens=512", "ckpt_path=last")
    assert pasted.module is None and pasted.curve == first


def test_a_restarted_job_that_began_from_a_file_resumes_from_its_own_checkpoint(tmp_path):
    file = str(tmp_path / "p.ckpt")
    assert (
        wanted(file, tmp_path, False) == file == wanted(file, tmp_path, True)
        and wanted(None, tmp_path, True) == "last"
        and wanted(None, tmp_path, False) is None
    )
    (tmp_path / PREVIOUS).parent.mkdir()
    (tmp_path / PREVIOUS).touch()
    assert wanted(file, tmp_path, True) == "last" and wanted(file, tmp_path, False) == file


def test_a_time_limit_in_the_last_validation_requeues_the_job(run, tmp_path, monkeypatch):
    """All steps are done and saved; the curve is made by the next try."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    whole = run(run_dir=tmp_path / "whole")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as m:
        m.setattr("bottleneck.training.module.compare", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(Stopped, match="SIGUSR1"):
            run(run_dir=tmp_path / "cut")
    assert (tmp_path / "asked").read_text() == "requeue 77\n" and not (tmp_path / "cut" / "curve.json").exists()
    assert signal.getsignal(signal.SIGUSR1) == before
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(run_dir=tmp_path / "cut").curve == whole.curve
    assert_same_heads(heads_of(tmp_path / "whole"), heads_of(tmp_path / "cut"))


def test_one_run_in_a_folder(run, tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr("bottleneck.training.run_folder.LOCK_SECONDS", 0.2)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / LOCK), pytest.raises(UserError, match="another run is using this folder"):
        run()


def test_a_finished_run_is_not_read_for_another_backbone_or_text(run, toy, tmp_path):
    """Regression: a notebook got the curve of another model, with only a line in the log."""
    run()
    mine, other = tmp_path / "mine.txt", tmp_path / "other.txt"
    mine.write_text("one\n")
    other.write_text("two\n")
    old, new, gone = composed(toy).backbone.path, str(tmp_path / "model"), str(tmp_path / "gone")
    shutil.copytree(old, new)
    assert another("backbone.path", old, new) and another("backbone.path", "org/a", "org/b")
    assert another("data.files", [str(mine)], [str(tmp_path / "*.txt")])
    assert not another("data.files", [str(mine)], str(mine.parent / "." / mine.name))  # the same, spelled otherwise
    assert not another("backbone.path", gone, new)  # moved
    assert not another("backbone.path", "org/a", new)  # downloaded
    with pytest.raises(UserError, match="backbone.path=.*model: the run in .*run is finished, and was trained with"):
        run("ckpt_path=last", f"backbone.path={new}")

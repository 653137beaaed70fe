"""A refused run leaves nothing in a new folder and changes nothing in an existing one, however late it is refused."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from bottleneck.cli.refused_run import FolderBefore
from bottleneck.core.errors import UserError
from bottleneck.core.held_log import HeldLog, drop_held_logs, write_held_logs
from bottleneck.training.run_folder import LAST, PREVIOUS
from conftest import shell


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder and the hash of its content."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def logger_to(path: Path, monkeypatch) -> logging.Logger:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [HeldLog(str(path))])
    monkeypatch.setattr(root, "level", logging.INFO)
    return root


def test_a_log_is_written_once_the_run_is_accepted(tmp_path, monkeypatch):
    path = tmp_path / "train.log"
    log = logger_to(path, monkeypatch)
    log.info("prepared\udce9")  # from a file name that is not UTF-8
    assert not path.exists()
    write_held_logs()
    log.info("trains")
    drop_held_logs()  # too late: the run was accepted
    assert path.read_text() == "prepared\\udce9\ntrains\n"
    log.handlers[0].close()


@pytest.mark.parametrize("refused", [True, False])
def test_a_log_that_is_held_at_the_end_belongs_to_a_crash_or_to_a_refusal(tmp_path, monkeypatch, refused):
    path = tmp_path / "train.log"
    path.write_text("earlier\n")
    log = logger_to(path, monkeypatch)
    log.info("loading")
    if refused:
        drop_held_logs()
    log.handlers[0].close()
    assert path.read_text() == ("earlier\n" if refused else "earlier\nloading\n")


def write_bookkeeping(folder: Path) -> None:
    for name in (".hydra/config.yaml", ".lock", "train.log", "wandb/run-1/a.wandb", "wandb.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("new")


def test_what_a_refused_run_wrote_goes_and_nothing_else(tmp_path):
    """The folder and those above it that it made; of a folder with the user's files, its own files alone."""
    before = FolderBefore.of(tmp_path / "a" / "b")
    write_bookkeeping(tmp_path / "a" / "b")
    before.restore()
    assert content(tmp_path) == {}

    (tmp_path / "own" / "empty").mkdir(parents=True)
    (tmp_path / "own" / "train.log").write_text("of an earlier run")
    whole = content(tmp_path)
    before = FolderBefore.of(tmp_path / "own")
    (tmp_path / "own" / ".lock").touch()
    before.restore()
    assert content(tmp_path) == whole
    before = FolderBefore.of(tmp_path / "own" / "empty")
    write_bookkeeping(tmp_path / "own" / "empty")
    before.restore()
    assert content(tmp_path) == whole  # the empty folder was there before


def test_the_files_of_a_run_that_trained_or_is_at_work_stay(tmp_path):
    before = FolderBefore.of(tmp_path / "run")
    write_bookkeeping(tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").touch()
    whole = content(tmp_path)
    before.restore()
    assert content(tmp_path) == whole
    (tmp_path / "run" / "metrics.csv").unlink()
    whole = content(tmp_path)
    with FileLock(tmp_path / "run" / ".lock"):  # another run, which loads its backbone
        before.restore()
        assert content(tmp_path) == whole
    before.restore()
    assert content(tmp_path) == {}


def test_a_refused_resume_changes_no_byte(run, toy, toy_backbone, tmp_path):
    """The backbone's weights are compared when the checkpoint is restored. Before that, run.json had been written anew
    with the path of the wrong backbone, the log had new lines, and last.ckpt had another name.
    """
    run("tokens=5120", run_dir=tmp_path / "run")
    for name in ("curve.json", "curve.csv"):
        (tmp_path / "run" / name).unlink()  # not finished
    (tmp_path / "run" / LAST).write_bytes(b"damaged")
    assert (tmp_path / "run" / PREVIOUS).exists()
    shutil.copytree(toy_backbone, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["gpt_neox.final_layer_norm.weight"] *= 1.5
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    whole = content(tmp_path / "run")
    with pytest.raises(UserError, match="trained on other backbone weights"):
        run("tokens=5120", "ckpt_path=last", f"backbone.path={tmp_path / 'other'}", run_dir=tmp_path / "run")
    assert content(tmp_path / "run") == whole
    run("tokens=5120", "ckpt_path=last", run_dir=tmp_path / "run")
    assert (tmp_path / "run" / LAST).with_name("last.ckpt.damaged").read_bytes() == b"damaged"


@pytest.mark.slow
def test_a_run_refused_after_its_text_was_prepared_leaves_nothing(toy, tmp_path):
    """Once, .hydra/, .lock and train.log stayed, in the user's folder as well."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes").write_text("mine")
    for folder, devices in (("deep/new", 1), ("own", 2)):
        cache = f"data.cache_dir={tmp_path / 'cache'}{devices}"
        words = [*toy, "tokens=1e9", cache, f"hydra.run.dir={folder}", f"trainer.devices={devices}"]
        done = shell(*words, cwd=tmp_path)
        assert done.returncode == 2 and "tokens: 1000000000 are requested" in done.stderr, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["cache1", "cache2", "own"]
    assert os.listdir(tmp_path / "own") == ["notes"]

"""Which jobs a multirun merges: its own that succeeded, wherever their folders lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from bottleneck.cli import one_line_errors as cli
from bottleneck.results import curve
from bottleneck.training.multirun import TOKEN, MergeCurves
from support.curves import made


def multirun(sweep: Path, jobs: dict[str, dict | None], monkeypatch: pytest.MonkeyPatch) -> MergeCurves:
    """What Hydra calls for a multirun of jobs {subdir: losses of its heads, None where it fails}."""
    monkeypatch.setattr(cli, "failures", [])
    callback = MergeCurves()
    whole = OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}, "logger": {"kind": "csv"}})
    sweep.mkdir(exist_ok=True)
    (sweep / "multirun.yaml").touch()
    callback.on_multirun_start(whole)
    for name, losses in jobs.items():
        config = OmegaConf.create({"hydra": {"mode": "MULTIRUN", "runtime": {"output_dir": str(sweep / name)}}})
        callback.on_job_start(config)
        if losses is None:
            cli.failures.append(f"job {name}")
        else:
            curve.write([made(losses)], sweep / name)
        done = JobReturn()
        done.status = JobStatus.COMPLETED
        callback.on_job_end(config, done)
    callback.on_multirun_end(whole)
    return callback


def ranks(sweep: Path) -> list[int]:
    return [h["rank"] for h in json.loads((sweep / "curve" / "curve.json").read_text())["heads"]]


def test_an_earlier_multiruns_jobs_are_not_merged(tmp_path, monkeypatch, caplog):
    """-m again with fewer jobs in the same folder: once, the old third job was merged without a warning."""
    sweep = tmp_path / "sweep"
    multirun(sweep, {"0": {8: 2.5}, "1": {16: 2.3}, "2": {32: 2.2}}, monkeypatch)
    assert ranks(sweep) == [8, 16, 32] and not caplog.records
    multirun(sweep, {"0": {8: 2.4}, "1": {64: 2.1}}, monkeypatch)
    assert ranks(sweep) == [8, 64] and "not merged" in caplog.text and "failed this time: 2" in caplog.text


def test_a_failed_jobs_old_result_is_not_merged(tmp_path, monkeypatch, caplog):
    """The folder of a job that fails this time still holds the curve of the earlier multirun."""
    sweep = tmp_path / "sweep"
    multirun(sweep, {"0": {8: 2.5}, "1": {16: 2.3}, "2": {32: 2.2}}, monkeypatch)
    multirun(sweep, {"0": {8: 2.5}, "1": None, "2": {32: 2.2}}, monkeypatch)
    assert ranks(sweep) == [8, 32] and "failed this time: 1" in caplog.text
    multirun(sweep, {"0": None, "1": None, "2": {32: 2.2}}, monkeypatch)
    assert f"{sweep / 'curve'} holds the curve of an earlier multirun" in caplog.text


def test_jobs_in_folders_of_folders_are_merged(tmp_path, monkeypatch):
    """With a slash in hydra.sweep.subdir the merged curve was once silently missing."""
    multirun(tmp_path / "sweep", {"small/8": {8: 2.5}, "small/16": {16: 2.3}, "large/64": {64: 2.1}}, monkeypatch)
    assert ranks(tmp_path / "sweep") == [8, 16, 64]


def test_jobs_without_the_environment(tmp_path, monkeypatch):
    """If a cluster does not pass the environment on, file times separate this multirun's jobs from earlier ones."""
    sweep = tmp_path / "sweep"
    monkeypatch.setattr(MergeCurves, "on_job_start", lambda self, config: os.environ.pop(TOKEN, None))
    multirun(sweep, {"0": {8: 2.5}, "1": {16: 2.3}, "2": {32: 2.2}}, monkeypatch)
    os.utime(sweep / "2" / ".multirun", (1, 1))
    assert ranks(sweep) == [8, 16, 32]
    multirun(sweep, {"0": {8: 2.5}, "1": {16: 2.3}}, monkeypatch)
    assert ranks(sweep) == [8, 16]


def test_a_single_run_leaves_no_mark(tmp_path):
    config = OmegaConf.create({"hydra": {"mode": "RUN", "runtime": {"output_dir": str(tmp_path)}}})
    (tmp_path / "curve.json").touch()
    MergeCurves().on_job_end(config, SimpleNamespace(status=JobStatus.COMPLETED))
    assert not (tmp_path / ".multirun").exists()

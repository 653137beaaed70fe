"""Run folders written by the code before the rooms were rebuilt (tests/assets/old_run): they resume and read as before.

The folder holds a backbone, a text, a run that was killed after step 8 of 12 (its checkpoint is of step 5), and the
same run undisturbed. `written_by.json` names the machine: sums round differently on another CPU or with another torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bottleneck.results import curve, page
from bottleneck.serve import export
from conftest import ROOT, assert_same_heads, composed, heads_of

OLD = ROOT / "tests" / "assets" / "old_run"


def resumed(folder: str) -> Any:
    """Repeat the command that wrote both runs, with ckpt_path=last, in the current folder."""
    from train import train

    overrides = [
        *("backbone=local", "backbone.path=backbone", "data=local", "data.files=text.jsonl", "data.cache_dir=cache"),
        *("data.block_size=32", "data.validation_fraction=0.1", "data.validation_tokens=1000", "batch_size=4"),
        *(
            "tokens=1536",
            "trainer=cpu",
            "trainer.micro_batch_size=2",
            "trainer.threads=1",
            "trainer.checkpoint_every=5",
        ),
        *("trainer.log_every=1", "ranks=[2,8]", "head.calibration_tokens=512", "ckpt_path=last"),
    ]
    return train(composed(overrides), Path(folder))


def same_machine() -> bool:
    about = json.loads((OLD / "written_by.json").read_text())
    cpu = next((x.split(":", 1)[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "")
    return (about["torch"], about["cpu"]) == (torch.__version__, cpu)


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A copy of the old folders, which is the current folder of the test."""
    monkeypatch.chdir(shutil.copytree(OLD, tmp_path / "runs"))
    return tmp_path / "runs"


def test_an_interrupted_old_run_resumes_to_the_undisturbed_heads(copy, caplog):
    with caplog.at_level("INFO"):
        resumed("interrupted")
    assert "step 5 of 12" in caplog.text
    old, new = heads_of(copy / "finished"), heads_of(copy / "interrupted")
    if same_machine():
        assert_same_heads(old, new)
    for name, tensors in old.items():
        for part, tensor in tensors.items():
            torch.testing.assert_close(new[name][part], tensor, rtol=1e-4, atol=1e-5)
    a, b = (json.loads((copy / d / "curve.json").read_text()) for d in ("finished", "interrupted"))
    for key in curve.IDENTITY:
        assert a[key] == b[key], key  # lines of one picture
    for x, y in zip(a["heads"], b["heads"]):
        assert (x["rank"], x["lr"], x["seed"]) == (y["rank"], y["lr"], y["seed"])
        assert x["loss"] == (y["loss"] if same_machine() else pytest.approx(y["loss"], abs=1e-5))
    logs = [(copy / d / "metrics.csv").read_text().splitlines() for d in ("finished", "interrupted")]
    rows = [[r.split(",")[:4] for r in log if "second" not in r] for log in logs]
    known = {metric for *_, metric, _ in rows[0]}  # a later version measures more
    assert rows[0] == [r for r in rows[1] if r[2] in known]  # every step once


def test_a_finished_old_run_is_left_as_it_is(copy):
    before = {p: p.read_bytes() for p in (copy / "finished").rglob("*") if p.is_file() and ".hydra" not in p.parts}
    assert resumed("finished").module is None
    assert before == {p: p.read_bytes() for p in before}


def test_commands_read_an_old_run(copy, tmp_path):
    """curve, report and export: the same numbers and heads as the run wrote."""
    finished = copy / "finished"
    assert curve.main([str(finished), "--out", str(tmp_path / "merged")]) == 0
    merged, own = (json.loads((d / "curve.json").read_text()) for d in (tmp_path / "merged", finished))
    assert merged == own
    assert page.main([str(finished), "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert export.main([str(finished), "--rank", "8", "--to", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "config.json").exists()

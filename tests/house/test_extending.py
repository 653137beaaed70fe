"""docs/extending.md: every example is written to a folder as the page names it, loaded as a plugin, and used."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import ROOT

PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def mine(tmp_path_factory) -> Path:
    """The plugin of the page."""
    folder = tmp_path_factory.mktemp("plugin")
    for name, text in BLOCK.findall(PAGE.read_text()):
        if name.startswith("mine/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    return folder / "mine"


def python(*words: str, **env: str) -> str:
    """Output of a command of the project, which must succeed."""
    path = os.pathsep.join([*([env["PYTHONPATH"]] if "PYTHONPATH" in env else []), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_all_six_are_on_the_page(mine):
    text = "".join(p.read_text() for p in mine.glob("*.py"))
    for registry in ("STARTS", "HEAD_KINDS", "OBJECTIVES", "METRICS", "STUDIES", "LOSSES"):
        assert f"{registry}.register(" in text


@pytest.fixture(scope="session")
def trained(mine, toy, tmp_path_factory) -> Path:
    """A run with the page's start, head kind, objective and metric."""
    folder = tmp_path_factory.mktemp("run") / "first"
    options = "head.options={smoothing:0.2,initial:2.0}"
    words = ["head=gain", "head.init=pca", "objective=smoothed", options, "ranks=[2,8]", "tokens=2048"]
    out = python("train.py", *toy, f"plugin={mine}", *words, f"hydra.run.dir={folder}")
    assert "TV" in out and "label smoothing" in out
    return folder


def test_a_start_a_kind_an_objective_and_a_metric(trained):
    """The row names start and kind, the recipe the objective and its option; the metric is in JSON, CSV and table."""
    curve = json.loads((trained / "curve.json").read_text())
    assert {(h["init"], h["kind"], h["options"]["initial"]) for h in curve["heads"]} == {("pca", "gain", 2.0)}
    assert {"A", "B", "gain"} == set(load_file(next((trained / "heads").glob("gain-initial2e0_r8_*"))))
    assert (curve["recipe"]["objective"], curve["recipe"]["smoothing"]) == ("smoothed", 0.2)
    for head, row in zip(curve["heads"], csv.DictReader((trained / "curve.csv").open())):
        assert 0 < head["total_variation"] < 1 and float(row["total_variation"]) == head["total_variation"]
        assert head["loss"] < head["initial_loss"]
    assert curve["heads"][0]["total_variation"] > curve["heads"][1]["total_variation"]


@pytest.mark.slow
def test_a_head_kind_and_a_loss_implementation(mine, toy, tmp_path):
    """The kind begins as the low-rank head of its start does; another implementation has the same losses."""
    kinds = {}
    for name, words in {
        "gain": ["head=gain", "head.options={initial:2.0}"],
        "chunked": ["head.loss_impl=chunked"],
        "full_logits": ["head.loss_impl=full_logits"],
    }.items():
        folder = tmp_path / name
        python("train.py", *toy, f"plugin={mine}", "ranks=[4]", "tokens=2048", *words, f"hydra.run.dir={folder}")
        (kinds[name],) = json.loads((folder / "curve.json").read_text())["heads"]
    gain, plain = kinds["gain"], kinds["chunked"]
    assert gain["kind"] == "gain" and gain["options"] == {"initial": 2.0} and "kind" not in plain
    assert gain["parameters"] == plain["parameters"] + 320
    assert gain["initial_loss"] == pytest.approx(plain["initial_loss"], abs=1e-5) and gain["loss"] != plain["loss"]
    assert kinds["full_logits"]["loss"] == pytest.approx(plain["loss"], abs=1e-4)


@pytest.mark.slow
def test_a_study(mine, toy_backbone, tmp_path):
    """Its own key is read; it writes the three files."""
    words = ["backbone=local", f"backbone.path={toy_backbone}", "study=row_norms", "study.bins=5"]
    python("-m", "bottleneck.study", f"plugin={mine}", *words, "trainer=cpu", f"hydra.run.dir={tmp_path}")
    found = json.loads((tmp_path / "row_norms.json").read_text())
    assert found["largest"] >= found["mean"] > 0
    assert (tmp_path / "row_norms.csv").exists() and (tmp_path / "row_norms.png").exists()


@pytest.mark.slow
def test_an_installed_package_is_found_by_its_entry_point(mine, toy, tmp_path):
    """A dist-info folder on the path is what an installer leaves; no plugin= is given."""
    site = tmp_path / "site"
    about = site / "mine-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(dict(BLOCK.findall(PAGE.read_text()))["pyproject.toml of the package"]
        .replace('[project.entry-points."bottleneck.plugins"]', "[bottleneck.plugins]").replace('"', ""))  # fmt: skip
    (site / "mine.py").write_text((mine / "pca_start.py").read_text())
    (site / "conf").symlink_to(mine / "conf")
    folder = tmp_path / "run"
    words = ["head=pca", "ranks=[2]", "tokens=512", f"hydra.run.dir={folder}"]
    python("train.py", *toy, *words, PYTHONPATH=str(site))
    assert json.loads((folder / "curve.json").read_text())["heads"][0]["init"] == "pca"

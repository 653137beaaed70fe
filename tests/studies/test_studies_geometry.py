"""Rank correlations against brute force and known cases; joining results of other studies; bad input."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bottleneck.core.errors import UserError
from bottleneck.studies.formulas.spearman import bootstrap_interval, spearman
from bottleneck.studies.geometry import changes, collect
from conftest import ROOT
from support.study_runs import QUICK, run_study, toy_series


def test_spearman_is_the_correlation_of_ranks():
    """Without ties it is 1 − 6 Σd² / (n (n² − 1)) for every order of five; a constant has none."""
    x = np.arange(5.0)
    for y in itertools.permutations(range(5)):
        d = np.array(y) - x
        assert spearman(x, np.array(y, float)) == pytest.approx(1 - 6 * (d @ d) / (5 * 24))
    assert spearman(np.exp(x), -(x**3)) == -1 and spearman(x, np.ones(5)) is None and spearman(x[:2], x[:2]) is None


def test_bootstrap_intervals_have_their_coverage():
    """About 95 of 100 intervals of independent values contain 0; a strong relation has an interval far from 0."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(100):
        low, high = bootstrap_interval(rng.normal(size=40), rng.normal(size=40), 0.95, 200, seed=i)
        hits += low <= 0 <= high
    assert 88 <= hits <= 99
    x = rng.normal(size=40)
    low, high = bootstrap_interval(x, x + 0.3 * rng.normal(size=40), 0.95, 200)
    assert low > 0.7 and high <= 1


def table(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def made(folder: Path) -> None:
    """Two models: the loss falls, entropy follows its every change, stable rank only drifts."""
    rng = np.random.default_rng(1)
    spectrum, losses = [], []
    for model in ("a", "b"):
        loss = 5.0
        for step in range(40):
            loss += rng.normal() * 0.1 - 0.05
            losses.append({"model": model, "step": step, "loss": loss, "stderr": ""})
            spectrum.append(
                {
                    "model": model,
                    "step": step,
                    "matrix": "head",
                    "entropy": loss**2,
                    "effective_rank": -step + 3 * rng.normal(),
                    "stable_rank": rng.normal(),
                    "participation_ratio": 1,
                    "condition": "",
                    "top_share": 0.5,
                }
            )
    table(folder / "one" / "spectrum.csv", spectrum)
    table(folder / "two" / "saturation.csv", losses)


def test_relations_are_told_from_drift(tmp_path):
    made(tmp_path)
    content = run_study(tmp_path / "out", "study=geometry", f"study.results={tmp_path}", "study.draws=300")
    found = {r["metric"]: r for r in content["relations"]}
    assert found["head: entropy"]["rho"] == 1 and found["head: entropy"]["reading"] == "moves with the loss"
    assert (
        found["head: effective_rank"]["rho"] > 0.5
        and found["head: effective_rank"]["reading"] == "drifts with training"
    )
    assert (
        found["head: stable_rank"]["reading"] == "no relation seen"
        and found["head: participation_ratio"]["rho"] is None
    )
    assert (
        found["head: entropy"]["pairs"] == 80
        and found["head: entropy"]["changes"] == 78
        and "head: condition" not in found
    )
    points, _ = collect([str(tmp_path)])
    dx, dy = changes(points, "head: entropy")
    assert len(dx) == 78 and np.sign(dx).tolist() == np.sign(dy).tolist()


@pytest.mark.slow
def test_numbers_are_the_same_in_every_process(tmp_path):
    """Bootstrap intervals do not depend on the seed with which Python hashes strings."""
    rng = np.random.default_rng(2)
    rows = [
        {"model": f"m{k}", "step": step, "matrix": "head", "entropy": rng.normal(), "loss": rng.normal()}
        for k in range(8)
        for step in range(4)
    ]
    table(tmp_path / "in" / "spectrum.csv", rows)
    table(tmp_path / "in" / "saturation.csv", rows)
    words = [
        sys.executable,
        "-m",
        "bottleneck.study",
        "study=geometry",
        f"study.results={tmp_path / 'in'}",
        "study.draws=50",
    ]
    for seed in "12":
        subprocess.run(
            [*words, f"hydra.run.dir={tmp_path / seed}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
    assert (tmp_path / "1" / "geometry.csv").read_text() == (tmp_path / "2" / "geometry.csv").read_text()


@pytest.mark.slow
def test_geometry_reads_the_results_of_other_studies(toy_backbone, toy_text, tmp_path):
    series = toy_series(toy_backbone, tmp_path / "toy", {f"step{n}": 0.1 * n for n in range(4)})
    words = [
        *QUICK,
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "backbone=local",
        f"backbone.path={series}",
    ]
    for name in ("spectrum", "anisotropy"):
        run_study(tmp_path / "done" / name, f"study={name}", *words)
    content = run_study(tmp_path / "out", "study=geometry", f"study.results={tmp_path / 'done'}", "study.draws=50")
    assert len(content["checkpoints"]) == 4 and {r["metric"].split(":")[0] for r in content["relations"]} == {
        "head",
        "weighted",
        "last layer",
    }


@pytest.mark.slow
def test_single_models_are_joined_across_studies(toy_backbone, toy_text, tmp_path):
    """Models without steps, one named with invalid mathematics: no study invents a step; geometry finds both rows."""
    models = toy_series(toy_backbone, tmp_path / "toys", {"a": 0.0, "b": 0.3, r"$\bad$": 0.6})
    words = [
        *QUICK,
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "backbone.path=unused",
    ]
    words.append("study.models=[" + ",".join(f"'{models / name}'" for name in ("a", "b", r"$\bad$")) + "]")
    saturation = run_study(tmp_path / "done" / "one", "study=saturation", *words)
    assert [(m["final"]["step"], m["final"]["tokens"], m["from_step"]) for m in saturation["models"]] == [
        (None, 0, None)
    ] * 3
    run_study(tmp_path / "done" / "two", "study=spectrum", "study.hidden=false", *words)
    run_study(tmp_path / "drawn", "study=anisotropy", *words)
    for file in ("one/saturation.csv", "two/spectrum.csv"):
        assert [row["step"] for row in csv.DictReader(open(tmp_path / "done" / file))] == [""] * 3
    content = run_study(tmp_path / "out", "study=geometry", f"study.results={tmp_path / 'done'}", "study.draws=50")
    assert [(p["model"], p["step"]) for p in content["checkpoints"]] == [("a", None), ("b", None), (r"$\bad$", None)]
    assert all(p["loss"] > 0 and p["head: entropy"] > 0 for p in content["checkpoints"])
    assert {r["metric"]: (r["pairs"], r["changes"]) for r in content["relations"]}["head: entropy"] == (3, 0)


def test_bad_input_names_the_file(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        collect([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="run those studies first"):
        collect([str(tmp_path)])
    table(tmp_path / "x" / "saturation.csv", [{"model": "a", "step": 1, "loss": "high"}])
    with pytest.raises(UserError, match="saturation.csv: loss=high of a, step 1: is not a number"):
        collect([str(tmp_path)])
    for name, text, words in (
        ("saturation", "name\na\n", "not a table of study=saturation: it has no column model, step, loss"),
        ("spectrum", "model,step,entropy\na,1,2\n", "has no column matrix"),
        ("anisotropy", "model,step,loss,mean_cosine\na,1,2,3\n", "has no column layer, layers"),
        ("spectrum", "model,step,matrix,entropy\n", "spectrum.csv: has no rows"),
        ("spectrum", "", "has no column model, step, matrix"),
        ("spectrum", "model,step,matrix,entropy\na,1\n", "line 2 ends too early"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.csv").write_text(text)
        with pytest.raises(UserError) as caught:
            collect([str(tmp_path / name)])
        assert words in str(caught.value) and f"{name}.csv" in str(caught.value)
        shutil.rmtree(tmp_path / name)


def test_models_without_checkpoints_do_not_drift_with_training(tmp_path):
    rows = [{"model": f"m{k}", "step": "", "matrix": "head", "entropy": k, "loss": 9 - k} for k in range(12)]
    table(tmp_path / "in" / "spectrum.csv", rows)
    table(tmp_path / "in" / "saturation.csv", rows)
    (relation,) = run_study(tmp_path / "out", "study=geometry", f"study.results={tmp_path / 'in'}", "study.draws=50")[
        "relations"
    ]
    assert relation["rho"] == -1 and relation["reading"] == "goes with the loss across models"
    assert spearman(np.array([3.0, 1.0, 3.0, 9.0]), np.array([2.5, 1, 2.5, 4])) == 1, "ties share their mean"

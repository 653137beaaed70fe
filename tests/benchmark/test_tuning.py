"""Rates tuned over several runs: which heads are trained again, at which rates, in words that train.py takes."""

from __future__ import annotations

import os
import subprocess

import pytest

from bottleneck.benchmark import tuning
from bottleneck.config.checks import check_config
from bottleneck.core.errors import UserError
from conftest import ROOT, composed
from support.curves import made, save


def head(rank: int, lr: float, loss: float | None, **more) -> dict:
    return {"rank": rank, "lr": lr, "loss": loss, "status": "diverged" if loss is None else "ok", **more}


MOS = {"kind": "mos", "options": {"components": 4}}


def curves(*heads: dict) -> list[dict]:
    return [{"heads": list(heads[::2])}, {"heads": list(heads[1::2])}]


def test_only_edges_are_tried_further():
    """Highest, lowest, inside, one rate alone, and an edge that a diverged rate closes; over several runs."""
    found = tuning.beyond(
        curves(
            *[head(8, lr, loss) for lr, loss in ((1e-3, 3.0), (2e-3, 2.9), (4e-3, 2.8))],
            *[head(8, lr, loss, **MOS) for lr, loss in ((1e-3, 2.7), (2e-3, 2.8), (4e-3, 2.9))],
            *[head(64, lr, loss) for lr, loss in ((1e-3, 2.0), (2e-3, 1.9), (4e-3, 2.0))],
            head(128, 1e-3, 1.5),
            *[head(64, lr, loss, **MOS) for lr, loss in ((1e-3, 2.0), (2e-3, 1.9), (4e-3, None))],
        )
    )
    assert found == [
        {"kind": "low_rank", "rank": 8, "lr": [8e-3, 1.6e-2]},
        {"kind": "mos", "rank": 8, "components": 4, "lr": [5e-4, 2.5e-4]},
    ]
    assert tuning.beyond(curves(*[head(8, lr, None) for lr in (1e-3, 2e-3)])) == [
        {"kind": "low_rank", "rank": 8, "lr": [5e-4, 2.5e-4]}
    ]


def test_best_rates_and_their_neighbours():
    given = curves(*[head(8, lr, loss) for lr, loss in ((1e-3, 3.0), (2e-3, 2.9), (4e-3, None))], head(64, 5e-3, 1.0))
    assert tuning.best(given) == [
        {"kind": "low_rank", "rank": 8, "lr": [2e-3]},
        {"kind": "low_rank", "rank": 64, "lr": [5e-3]},
    ]
    assert tuning.best(given, (0.5, 1.5))[0]["lr"] == [1e-3, 3e-3]
    with pytest.raises(UserError, match=r"rank: 8}\] diverged at every rate, 0.001, 0.002"):
        tuning.best(curves(head(8, 1e-3, None), head(8, 2e-3, None)))


@pytest.mark.parametrize("name", ("kinds_smollm2", "kinds_gemma3"))
def test_heads_of_an_experiment_go_through_train(name):
    """The printed override composes to the same heads, with rates as well; a budget that is not there is refused."""
    file = ROOT / "conf" / "experiment" / f"{name}.yaml"
    heads = [{**e, "lr": [1e-3, 2e-3]} for e in tuning.entries(file, 1)]
    c = check_config(composed([f"experiment={name}", f"heads={tuning.override(heads)}"]))
    assert [{**e, "rank": e["rank"][0]} for e in c.heads] == heads and len(heads) == 9
    with pytest.raises(UserError, match="budget 3: .* has the budgets 0 to 2"):
        tuning.entries(file, 3)


def test_the_command(run, tmp_path, capsys):
    """A real run, then its edge again with what the command prints, beside the first run in one curve."""
    given = ["ranks=[2,8]", "head.kind=mos", "head.options={components: 2}"]
    run(*given, "optim.lrs=[1e-9,1e-8]", run_dir=tmp_path / "run")
    capsys.readouterr()
    tuning.command(["beyond", str(tmp_path / "run")])
    printed = capsys.readouterr().out.strip()
    assert printed == (
        "[{kind: mos, rank: 2, components: 2, lr: [1e-07, 1e-06]}, "
        "{kind: mos, rank: 8, components: 2, lr: [1e-07, 1e-06]}]"
    )
    run(f"heads={printed}", "ranks=auto", run_dir=tmp_path / "run-edge1")
    capsys.readouterr()
    tuning.command(["best", str(tmp_path / "run"), str(tmp_path / "run-edge1"), "--factors", "1", "2"])
    assert capsys.readouterr().out.count("lr: [1e-06, 2e-06]") == 2
    with pytest.raises(UserError, match="none: no curve.json there"):
        tuning.command(["beyond", str(tmp_path / "none")])


def test_runs_of_other_tokens_are_refused(tmp_path):
    """The best rate falls with the budget, and the lowest loss would be that of the longer run."""
    one, two = save(tmp_path / "a", made({8: 2.5})), save(tmp_path / "b", made({8: 2.4}, tokens=2000))
    with pytest.raises(UserError, match="runs with tokens 1000, 2000"):
        tuning.command(["best", str(one), str(two)])


@pytest.mark.parametrize(
    "script, given",
    [
        ("kinds.sh", {"PARTS": "curve typo"}),
        ("kinds.sh", {"BUDGETS": "0 7"}),
        ("kinds.sh", {"EDGES": "two"}),
        ("kinds.sh", {"STARTS": "scaled typo"}),
        ("forecast.sh", {"BACKBONES": "tiny typo"}),
        ("forecast.sh", {"TEXTS": "tests"}),  # no budget
        ("forecast.sh", {"TEXTS": "tests:1000"}),  # no budget that is trained
        ("forecast.sh", {"TEXTS": "none:4194304"}),
    ],
    ids=str,
)
def test_the_scripts_refuse_bad_values_before_they_train(tmp_path, script, given):
    """Regression: with GPUS, EDGES=two left out the edges and the exit code was 0."""
    log, stub = tmp_path / "log", tmp_path / "python"
    stub.write_text(f"#!/bin/sh\necho run >> {log}\n")
    stub.chmod(0o755)
    set_up = {"PYTHON": str(stub), "OUT": str(tmp_path / "out"), "GPUS": "0 1", "TEXTS": "tests:4194304"}
    env = {**os.environ, **set_up, **given}
    done = subprocess.run(["bash", str(ROOT / "bottleneck/benchmark" / script), "x"], env=env, capture_output=True)
    assert done.returncode == 2 and next(iter(given)).encode() in done.stderr and not log.exists()

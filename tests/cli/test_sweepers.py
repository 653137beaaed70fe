"""What a Hydra sweeper gets: the value of every job and one merged curve; relative paths stay valid."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from bottleneck.training.run_results import optimized_value
from conftest import ROOT

CALLBACK = """
import json
from hydra.experimental.callback import Callback

class Values(Callback):
    def on_job_end(self, config, job_return, **kwargs):
        with open("values.jsonl", "a") as f:
            f.write(json.dumps([config.hydra.job.num, job_return.return_value]) + "\\n")
"""


def row(rank: int, loss, status: str = "ok", **more) -> dict:
    return {"rank": rank, "loss": loss, "status": status, "perplexity": loss and math.exp(loss), **more}


@pytest.mark.parametrize(
    "metric, value",
    [("loss", 2.0), ("loss@8", 3.0), ("perplexity", math.exp(2.0)), ("kl@8", 0.5), ("loss@16", math.inf)],
)
def test_a_run_returns_the_value_of_its_best_head(tmp_path, metric, value):
    """The lowest loss; a diverged head counts as infinity, also where its loss is lower."""
    heads = [row(8, 3.0, kl=0.5), row(8, 4.0, kl=0.1), row(64, 2.0, kl=0.2), row(16, 1.0, "diverged", kl=None)]
    (tmp_path / "curve.json").write_text(json.dumps({"heads": heads}))
    assert optimized_value(tmp_path, metric) == value


@pytest.mark.slow
def test_a_multirun_returns_losses_merges_deep_folders_and_keeps_relative_paths(tmp_path, toy):
    """hydra.sweep.subdir with a slash, hydra.job.chdir, a relative path, optimized_metric; a job that fails returns
    NaN.
    """
    (tmp_path / "callbacks.py").write_text(CALLBACK)
    (text,) = (word.removeprefix("data.files=") for word in toy if word.startswith("data.files="))
    os.symlink(text, tmp_path / "text.jsonl")
    words = [word for word in toy if not word.startswith(("data.files=", "ranks=", "tokens="))]
    words += ["data.files=text.jsonl", "tokens=1024", "ranks=2,8,64", "optimized_metric=loss", "hydra.sweep.dir=sweep"]
    words += ["hydra.sweep.subdir=a/${hydra.job.num}", "hydra.job.chdir=true"]
    words += ["+hydra.callbacks.values._target_=callbacks.Values"]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and "64 is above the hidden size" in done.stderr, done.stderr[-2000:]
    files = [*tmp_path.rglob("values.jsonl")]
    values = dict(json.loads(line) for file in files for line in file.read_text().splitlines())
    for number, rank in ((0, 2), (1, 8)):
        curve = json.loads((tmp_path / "sweep" / "a" / str(number) / "curve.json").read_text())
        assert curve["heads"][0]["rank"] == rank and values[number] == curve["heads"][0]["loss"]
    assert math.isnan(values[2])
    merged = json.loads((tmp_path / "sweep" / "curve" / "curve.json").read_text())
    assert [h["rank"] for h in merged["heads"]] == [2, 8]

"""W&B's offline files, read back by its own command: a run a head, alike from one process and from a multirun; resumed runs go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bottleneck.config.checks import check_config
from bottleneck.training.tracking import WandbHeads
from conftest import ROOT, composed, shell

OFFLINE = ["logger=wandb", "logger.mode=offline", "logger.tags=[a,b]", "trainer.log_every=5"]
MACHINE = ("_runtime", "_timestamp", "_wandb.runtime")  # differ from try to try, as do all keys with seconds in them


def runs(folder: Path) -> list[dict]:
    """Every W&B run whose files are below a folder: id, config, name, group, job type, history, summary, artifacts."""
    found: dict[str, dict] = {}
    wandb = Path(sys.executable).with_name("wandb")
    for file in sorted(folder.rglob("*.wandb")):
        lines = subprocess.run(
            [wandb, "leet", "inspect", "--json", str(file)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        first = next((r["run"] for r in records if r["type"] == "run"), None)
        if first is None:  # a try that reached no server
            continue
        config = {k: v for k, v in first["config"]["update"].items() if k != "_wandb"}
        run = found.setdefault(
            first["run_id"],
            {"id": first["run_id"], "files": 0, "config": config, "history": [], "summary": {}, "artifacts": []},
        )
        run |= {
            "name": first["display_name"],
            "group": first["run_group"],
            "job": first["job_type"],
            "tags": first.get("tags", []),
        }
        run["files"] += 1
        for r in records:
            if r["type"] == "history":
                run["history"].append(
                    {k: v for k, v in r["history"]["item"].items() if k not in MACHINE and "second" not in k}
                )
            elif r["type"] == "summary":
                run["summary"] |= {
                    k: v for k, v in r["summary"]["update"].items() if k not in MACHINE and "second" not in k
                }
            elif r["type"] == "artifact":
                run["artifacts"].append([c["path"] for c in r["artifact"]["manifest"]["contents"]])
    return list(found.values())


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("wandb")))
        patch.delenv("WANDB_SWEEP_ID", raising=False)
        yield patch


@pytest.fixture(scope="module")
def together(toy, quiet, tmp_path_factory) -> list[dict]:
    from train import train

    folder = tmp_path_factory.mktemp("together") / "three"
    train(composed([*toy, *OFFLINE]), folder)
    return runs(folder)


def test_a_run_for_each_head_and_one_for_the_curve(together):
    heads = sorted((r for r in together if r["job"] == "head"), key=lambda r: r["config"]["rank"])
    (curve,) = [r for r in together if r["job"] == "curve"]
    assert [r["config"]["rank"] for r in heads] == [2, 8, 32] and len({r["id"] for r in together}) == 4
    for r in heads:
        assert r["group"] == curve["group"] == "three" and r["tags"] == ["a", "b"]
        for key in (
            "parameters",
            "lr",
            "seed",
            "init",
            "backbone",
            "hidden_size",
            "vocab_size",
            "data",
            "tokens",
            "git_commit",
        ):
            assert key in r["config"], key
        steps = [(h["_step"], h["tokens"]) for h in r["history"]]
        assert steps == sorted(steps) and steps[-1] == (20, 10240) and (10, 5120) in steps
        last = r["history"][-1]
        assert {
            "val/loss",
            "val/perplexity",
            "val/bits_per_byte",
            "val/loss_full",
            "train/loss",
            "train/lr",
            "train/grad_norm",
            "val/kl",
        } <= set(last)
        assert (
            r["summary"]["val/perplexity"] == r["summary"]["final/perplexity"]
            and r["summary"]["best/loss"] <= r["summary"]["final/loss"]
        )
        assert r["summary"]["status"] == "ok" and 0 < r["summary"]["final/acceptance"] < 1
        assert all(f"final/loss_{band}" in r["summary"] for band in ("1-10", "11-100")) and "lr_final" in r["config"]
    assert sorted(curve["artifacts"][-1]) == ["curve.csv", "curve.json", "curve.png", "details.png"]
    keys = {k for h in curve["history"] for k in h}
    assert (
        any(k.startswith("heads") for k in keys)
        and any(k.startswith("perplexity_against_rank") for k in keys)
        and any(k.startswith("curve") for k in keys)
    )


@pytest.mark.slow
def test_a_multirun_gives_the_same_runs(toy, quiet, together, tmp_path):
    sweep = [o for o in toy if not o.startswith("ranks")]
    done = shell("-m", *sweep, *OFFLINE, "ranks=2,8,32", f"hydra.sweep.dir={tmp_path / 'many'}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = runs(tmp_path / "many")
    apart, one = ({r["config"]["rank"]: r for r in rs if r["job"] == "head"} for rs in (found, together))
    assert apart.keys() == one.keys()
    for rank in one:
        for part in ("config", "summary", "history", "name", "tags"):
            assert apart[rank][part] == one[rank][part], (rank, part)
        assert apart[rank]["group"] == "many"
    (curve,) = [r for r in found if r["job"] == "curve"]  # of all jobs, not one each
    assert curve["group"] == "many" and curve["summary"]["heads"] == 3


def test_a_resumed_run_goes_on_in_the_same_runs(toy, quiet, together, tmp_path):
    from bottleneck.training.progress import TokenProgress
    from train import train

    class Killed(BaseException):
        pass

    def stop(self, trainer, *a):
        if trainer.global_step == 11:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenProgress, "on_train_batch_end", stop)
        with pytest.raises(Killed):
            train(composed([*toy, *OFFLINE, "trainer.progress=true"]), tmp_path / "cut")
    first = {r["config"]["rank"]: r["id"] for r in runs(tmp_path / "cut")}
    train(composed([*toy, *OFFLINE, "ckpt_path=last"]), tmp_path / "cut")
    heads = {r["config"]["rank"]: r for r in runs(tmp_path / "cut") if r["job"] == "head"}
    assert {rank: r["id"] for rank, r in heads.items()} == first and all(r["files"] == 2 for r in heads.values())
    for r in together:
        if r["job"] == "head":
            assert heads[r["config"]["rank"]]["summary"] == r["summary"]
            assert {h["_step"] for h in heads[r["config"]["rank"]]["history"]} == {h["_step"] for h in r["history"]}


def test_the_best_loss_is_of_all_tries(toy, quiet, tmp_path):
    """A rate that spoils the head: the best is that of step 0, which the second try never saw."""
    from train import train

    overrides = [*toy, *OFFLINE, "ranks=[8]", "optim.lr=3", "tokens=2048", "trainer.checkpoint_every=1"]
    train(composed(overrides), tmp_path / "run")
    (tmp_path / "run" / "curve.json").unlink()  # as if it had been killed while it validated
    train(composed([*overrides, "ckpt_path=last"]), tmp_path / "run")
    (head,) = [r for r in runs(tmp_path / "run") if r["job"] == "head"]
    assert head["files"] == 2 and head["summary"]["best/loss"] < head["summary"]["final/loss"] - 0.1
    assert head["summary"]["best/loss"] == pytest.approx(head["summary"]["final/initial_loss"])


def test_an_agents_run_is_the_heads_run(toy, quiet, tmp_path, monkeypatch):
    from train import train

    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "agentsrun")
    train(composed([*toy, *OFFLINE, "ranks=[8]", "tokens=1024"]), tmp_path / "run")
    (only,) = runs(tmp_path / "run")
    assert only["id"] == "agentsrun" and only["job"] == "head"


def test_the_sweep_file_is_the_default_sweep():
    sweep = yaml.safe_load((ROOT / "launch/wandb_sweep.yaml").read_text())
    ranks = sweep["parameters"]["ranks"]["values"]
    fixed = [w for w in sweep["command"] if not w.startswith("${")]
    assert sweep["program"] == "train.py" and fixed == ["logger=wandb"] and sweep["command"][-1] == "${args_no_hyphens}"
    assert [check_config(composed([*fixed, f"ranks={r}"])).ranks for r in ranks] == [
        [8],
        [16],
        [32],
        [64],
        [128],
        [256],
    ]


def test_a_server_that_cannot_be_reached_stops_nothing(toy, quiet, tmp_path, monkeypatch, caplog):
    """An account is there, the server is not: a warning, and the run goes on offline."""
    from train import train

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(WandbHeads, "TIMEOUT", 3)
    with caplog.at_level("WARNING"):
        result = train(composed([*toy, "logger=wandb", "ranks=[8]", "tokens=1024"]), tmp_path / "run")
    assert result.curve["heads"][0]["status"] == "ok"
    assert "cannot be reached" in caplog.text and "0" * 40 not in caplog.text
    assert {r["job"] for r in runs(tmp_path / "run")} == {"head", "curve"}

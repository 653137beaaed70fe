"""W&B's offline files, read back by W&B itself: one run per head, equal for one run and a multirun; resumed runs."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from bottleneck.config.checks import check_config
from bottleneck.config.schema import LoggerConfig
from bottleneck.core.errors import UserError
from bottleneck.training import wandb_heads, wandb_runs
from bottleneck.training.wandb_runs import wandb_settings
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


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_wandb_runs(toy, quiet, together, tmp_path):
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
    """With a rate that makes the head worse, the best loss is that of step 0, which the resumed try did not see."""
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
    """With an account but no reachable server, the run warns and continues offline."""
    from train import train

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_runs, "SECONDS", 3)
    with caplog.at_level("WARNING"):
        result = train(composed([*toy, "logger=wandb", "ranks=[8]", "tokens=1024"]), tmp_path / "run")
    assert result.curve["heads"][0]["status"] == "ok"
    assert "cannot be reached" in caplog.text and "0" * 40 not in caplog.text
    assert {r["job"] for r in runs(tmp_path / "run")} == {"head", "curve"}


def test_settings_are_an_explicit_key_then_the_environment_then_the_default():
    """Once, WANDB_MODE and the others were ignored in favour of `online`, which could upload private text."""
    default = wandb_settings(LoggerConfig(), {})
    assert (default.project, default.mode, default.entity, default.group, default.tags, default.folder) == (
        "bottleneck",
        "online",
        None,
        None,
        (),
        None,
    )
    names = ("PROJECT", "ENTITY", "RUN_GROUP", "NAME", "DIR")
    variables = {f"WANDB_{n}": f"of-{n.lower()}" for n in names} | {"WANDB_TAGS": "a, b", "WANDB_MODE": "offline"}
    found = wandb_settings(LoggerConfig(), variables)
    assert (found.project, found.entity, found.group, found.name) == (
        "of-project",
        "of-entity",
        "of-run_group",
        "of-name",
    )
    assert found.tags == ("a", "b") and found.mode == "offline" and found.folder == Path("of-dir")
    explicit = LoggerConfig(project="p", entity="e", group="g", name="n", tags=["t"], mode="online")
    found = wandb_settings(explicit, variables)
    assert (found.project, found.entity, found.group, found.name) == ("p", "e", "g", "n")
    assert found.tags == ("t",) and found.mode == "online"
    for given, mode in (("dryrun", "offline"), ("run", "online"), ("disabled", "disabled")):
        assert wandb_settings(LoggerConfig(), {"WANDB_MODE": given}).mode == mode
    assert wandb_settings(LoggerConfig(), {"WANDB_DISABLED": "true"}).mode == "disabled"
    assert wandb_settings(LoggerConfig(mode="offline"), {"WANDB_MODE": "online"}).mode == "offline"
    with pytest.raises(UserError, match="WANDB_MODE=maybe: must be one of"):
        wandb_settings(LoggerConfig(), {"WANDB_MODE": "maybe"})
    with pytest.raises(UserError, match="has 100 letters; a tag has 1 to 64"):
        wandb_settings(LoggerConfig(tags=["x" * 100]), {})


def test_a_sweep_id_without_an_agents_run_is_left_over(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_SWEEP_ID", "left-over")
    assert wandb_heads._agents_run() == ""  # it was a KeyError
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert wandb_heads._agents_run() == "abc"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert wandb_heads._agents_run() == ""


def test_wandb_offline_as_a_command_holds(tmp_path, monkeypatch, caplog):
    """`wandb offline` and `wandb init` write settings files. The run passed its own default over them and uploaded."""
    monkeypatch.chdir(tmp_path)
    home, here = tmp_path / "config", tmp_path / "wandb"
    variables = {"WANDB_CONFIG_DIR": str(home)}
    for folder, text in ((home, "entity = team\nmode = online\n"), (here, "project = theirs\nmode = offline\n")):
        folder.mkdir()
        (folder / "settings").write_text("[default]\n" + text)
    found = wandb_settings(LoggerConfig(), variables)
    assert (found.mode, found.project, found.entity) == ("offline", "theirs", "team")
    found = wandb_settings(LoggerConfig(), variables | {"WANDB_MODE": "online", "WANDB_PROJECT": "p"})
    assert (found.mode, found.project) == ("online", "p")
    assert not caplog.records
    assert wandb_settings(LoggerConfig(mode="online"), variables).mode == "online"
    assert "overrides mode = offline in W&B's settings file" in caplog.text


def test_what_the_environment_forbids_is_not_uploaded(toy, quiet, tmp_path, monkeypatch):
    """Offline, in the folder of WANDB_DIR; disabled, no file at all."""
    from train import train

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # an upload would warn that it cannot be reached
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    monkeypatch.setenv("WANDB_TAGS", "x,y")
    short = ["logger=wandb", "ranks=[8]", "tokens=512"]
    train(composed([*toy, *short]), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.wandb"))
    found = runs(tmp_path / "elsewhere")
    assert {r["job"] for r in found} == {"head", "curve"}
    assert all(r["group"] == "mine" and r["tags"] == ["x", "y"] for r in found)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("WANDB_DIR")
    train(composed([*toy, *short]), tmp_path / "disabled")
    assert not list((tmp_path / "disabled").rglob("*wandb*"))


@pytest.mark.slow
def test_several_heads_of_one_agents_trial(toy, quiet, tmp_path):
    """The agent's run shows their curve and the lowest loss. Once, all heads got the agent's run id: a traceback."""
    env = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "agentsrun", "WANDB_SILENT": "true"}
    done = shell(*toy, *OFFLINE, "ranks=[2,8]", "tokens=1024", f"hydra.run.dir={tmp_path / 'run'}", **env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {r["id"]: r for r in runs(tmp_path / "run")}
    assert len(found) == 3 and found["agentsrun"]["job"] == "curve"
    heads = [r for r in found.values() if r["job"] == "head"]
    assert sorted(r["config"]["rank"] for r in heads) == [2, 8]
    lowest = min(r["summary"]["final/loss"] for r in heads)
    assert found["agentsrun"]["summary"]["val/loss"] == pytest.approx(lowest)
    assert "val/perplexity" in found["agentsrun"]["summary"] and found["agentsrun"]["artifacts"]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A W&B server that knows no API key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b'{"errors": [{"message": "Invalid API key"}]}'
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *args) -> None:
        pass


BAD_ACCOUNTS = [
    ({"WANDB_API_KEY": "0" * 40}, "the server refused the run: .*Invalid API key"),
    ({"WANDB_API_KEY": "short"}, "API key must have"),
    ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "nonsense"}, "base_url.*valid URL"),
]


@pytest.mark.slow
@pytest.mark.parametrize("variables, words", BAD_ACCOUNTS)
def test_a_refused_account_is_one_line_and_no_offline_run(toy, tmp_path, variables, words):
    """Once, an invalid key was reported as "server cannot be reached", and the run went offline with exit code 0."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_SILENT": "true"} | variables
    done = shell(*toy, "logger=wandb", "ranks=[2]", "tokens=512", f"hydra.run.dir={tmp_path / 'run'}", **env)
    server.shutdown()
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and re.search(words, line), done.stderr[-2000:]


@pytest.mark.slow
def test_wandb_without_a_home_folder_is_one_line(toy, tmp_path):
    """Neither HOME nor an entry of the user in the password file, as in some containers."""
    code = "import os, pwd, runpy, sys; sys.argv[0] = 'train.py'; os.environ.pop('HOME', None)\n"
    code += "def nobody(*a): raise KeyError('getpwuid(): uid not found: 1234')\n"
    code += "pwd.getpwuid = pwd.getpwnam = nobody\nrunpy.run_path('train.py', run_name='__main__')"
    args = [*toy, *OFFLINE, "ranks=[2]", "tokens=512", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    lines = [line for line in done.stderr.strip().splitlines() if "Matplotlib" not in line]  # it warns about its cache
    assert len(lines) == 1 and "logger=wandb: Could not determine home directory" in lines[0], done.stderr

"""Files of a run's folder with the right structure and wrong content are refused or skipped, with one line."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from bottleneck.core.errors import UserError
from bottleneck.core.run_file import RUN_FILE, read_run_config, read_run_file, write_run_file
from bottleneck.training import wandb_heads
from bottleneck.training.checkpoint import CHECKSUM, content_checksum, read_checkpoint
from bottleneck.training.finished_run import open_run
from bottleneck.training.metrics_csv import MetricsCSV
from bottleneck.training.run_folder import LAST, PREVIOUS
from conftest import assert_same_heads, composed, heads_of

EVERY = "trainer.checkpoint_every=7"  # checkpoints of steps 14 and 20


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory) -> Path:
    from train import train

    folder = tmp_path_factory.mktemp("whole") / "run"
    train(composed([*toy, EVERY]), folder)
    return folder


def without_head(c):
    del c["state_dict"]["bank.heads." + c["bottleneck"]["heads"][1] + ".A"]


def without_heads(c):
    c["state_dict"] = {}


def nan_weights(c):
    c["state_dict"]["bank.heads." + c["bottleneck"]["heads"][0] + ".B"][0, 0] = float("nan")


def other_shape(c):
    c["state_dict"]["bank.heads." + c["bottleneck"]["heads"][0] + ".B"] = torch.zeros(3, 32)


def without_moments(c):
    c["optimizer_states"][0]["state"] = {}


def one_moment_missing(c):
    del c["optimizer_states"][0]["state"][2]["exp_avg_sq"]


def nan_moment(c):
    c["optimizer_states"][0]["state"][3]["exp_avg"][0, 0] = float("nan")


def beyond_the_end(c):
    c["global_step"] = 21


def another_step(c):
    c["global_step"] = 15


def negative_step(c):
    c["global_step"] = -1


def missing(key):
    def remove(c):
        del c[key]

    return remove


def no_initial(c):
    del c["bottleneck"]["initial"]


def other_head_names(c):
    c["bottleneck"]["heads"] = c["bottleneck"]["heads"][:2]


def loops_of_another_kind(c):
    c["loops"] = {"fit_loop": 3}


def rounded_weights(c):
    c["state_dict"] |= {name: t.bfloat16() for name, t in c["state_dict"].items()}


def whole_number_weights(c):
    c["state_dict"] |= {name: t.int() for name, t in c["state_dict"].items()}


def no_schedule(c):
    c["lr_schedulers"][0] = {"last_epoch": c["global_step"]}


def schedule_of_another_step(c):
    c["lr_schedulers"][0]["last_epoch"] = 1


def optimizer_without_betas(c):
    del c["optimizer_states"][0]["param_groups"][0]["betas"]


def optimizer_of_a_later_step(c):
    c["optimizer_states"][0]["state"][0]["step"] += 1000


DAMAGE = [
    rounded_weights,
    whole_number_weights,
    no_schedule,
    schedule_of_another_step,
    optimizer_without_betas,
    optimizer_of_a_later_step,
    without_head,
    without_heads,
    nan_weights,
    other_shape,
    without_moments,
    one_moment_missing,
    nan_moment,
    beyond_the_end,
    another_step,
    negative_step,
    *(
        missing(key)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "bottleneck")
    ),
    no_initial,
    other_head_names,
    loops_of_another_kind,
]


@pytest.mark.parametrize("checksum", ["kept", "none"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__qualname__)
def test_a_damaged_checkpoint_is_never_used(whole, toy, tmp_path, damage, checksum):
    """Each once resumed silently or raised a traceback. A kept checksum does not match the content. Without a checksum,
    as in checkpoints of earlier versions, names, shapes, moments, finiteness and step are compared.
    """
    from bottleneck.config.checks import check_config
    from bottleneck.heads.bank import HeadBank
    from bottleneck.heads.key import HeadKey
    from bottleneck.training import resume

    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    c = torch.load(whole / LAST, weights_only=True)
    damage(c)
    if checksum == "none" and "bottleneck" in c:
        del c["bottleneck"][CHECKSUM]
    torch.save(c, folder / LAST)
    config = check_config(composed([*toy, EVERY, "ckpt_path=last"]))
    heads = json.loads((whole / "curve.json").read_text())["heads"]
    bank = HeadBank([HeadKey(h["rank"], h["lr"], h["seed"]) for h in heads], 320, 32)

    def start():
        return resume.verify(resume.find(config, folder), config, run_dir=folder, bank=bank)

    with pytest.raises(UserError, match="last.ckpt: "):
        start()
    shutil.copy(whole / PREVIOUS, folder / PREVIOUS)
    found = start()
    assert found.path == folder / PREVIOUS and found.step == 14


def test_a_run_resumes_from_the_previous_checkpoint_with_a_warning(whole, run, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    for name in ("curve.json", "heads"):
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
        (tmp_path / "run" / name).unlink(missing_ok=True) if name == "curve.json" else None
    c = torch.load(tmp_path / "run" / LAST, weights_only=True)
    without_moments(c)
    del c["bottleneck"][CHECKSUM]
    torch.save(c, tmp_path / "run" / LAST)
    with caplog.at_level(logging.WARNING):
        run(EVERY, "ckpt_path=last")
    assert "moments are missing; resuming from previous.ckpt, step 14" in caplog.text
    assert_same_heads(heads_of(whole), heads_of(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt.damaged").exists()


def test_a_checksum_is_of_the_content_alone(whole, tmp_path):
    """The same content in another file has the same checksum; each single change another one."""
    content = read_checkpoint(whole / LAST)
    about = {k: v for k, v in content["bottleneck"].items() if k != CHECKSUM}
    plain = content | {"bottleneck": about}
    assert content_checksum(plain) == content["bottleneck"][CHECKSUM] == content_checksum(copy.deepcopy(plain))
    torch.save(content, tmp_path / "copy.ckpt")
    read_checkpoint(tmp_path / "copy.ckpt")
    a = {"x": torch.zeros(2, 3), "y": [1, (2.0, "z")]}
    changed = [
        {"x": torch.zeros(3, 2), "y": [1, (2.0, "z")]},
        {"x": torch.zeros(2, 3).double(), "y": [1, (2.0, "z")]},
        {"x": torch.zeros(2, 3), "y": [1, (2.0, "w")]},
        {"y": [1, (2.0, "z")], "x": torch.zeros(2, 3)},
    ]
    assert len({content_checksum(t) for t in [a, *changed]}) == 5


def test_a_metrics_csv_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(UserError, match="metrics.csv: cannot be read: Is a directory"):
        MetricsCSV(tmp_path / "metrics.csv", resume_step=5).log_metrics({"train/loss/r8": 1.0, "tokens": 5}, step=6)


@pytest.mark.parametrize(
    "junk",
    [
        b"\x00\xff\xfe",
        b"1,2\n\x00,,,,\n",
        "²,1,train/loss,r8,1.0\n".encode(),
        b'"open quote,',
        b"9" * 5000 + b",1,a,b,1",
    ],
)
def test_junk_in_metrics_csv_is_dropped(tmp_path, junk, caplog):
    path = tmp_path / "metrics.csv"
    good = b"step,tokens,metric,head,value\n1,512,train/loss,r8,2.5\n"
    path.write_bytes(good + junk + b"\n2,1024,train/loss,r8,2.4\n9,1,train/loss,r8,1.0\n")
    logger = MetricsCSV(path, resume_step=5)
    logger.log_metrics({"tokens": 1536, "train/loss/r8": 2.3}, step=3)
    rows = path.read_text().splitlines()
    assert rows[1] == "1,512,train/loss,r8,2.5" and rows[-1] == "3,1536,train/loss,r8,2.3"
    assert "cannot be read and are dropped" in caplog.text


HUGE = b'{"best": {"r8": 1' + b"0" * 400 + b"}}"  # no float holds it


@pytest.mark.parametrize("junk", [b"[1]", b"\xff", b"{", b"null", b'{"r8": 7, "best": 3}', b'{"r8": "a/../b"}', HUGE])
def test_junk_in_wandb_json_gives_new_runs(tmp_path, junk):
    (tmp_path / "wandb.json").write_bytes(junk)
    assert wandb_heads._ids(tmp_path) == ({"best": {}} if junk == HUGE else {})


def test_a_run_file_of_foreign_bytes_is_written_anew(tmp_path):
    (tmp_path / RUN_FILE).write_bytes(b"\xff\xfe")
    write_run_file(tmp_path, {"seed": 1}, {})
    assert read_run_file(tmp_path) == {"seed": 1}


@pytest.mark.parametrize("name", [RUN_FILE, ".hydra/config.yaml"])
@pytest.mark.parametrize(
    "junk", [b"\xff\x00", b"{", b"[1, 2]", b"backbone: ${nowhere:x}", b"3", b'{"schema": 9, "config": {}}']
)
def test_junk_in_the_runs_own_files_is_one_line(whole, tmp_path, name, junk):
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "run.json", ".hydra"))
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(junk)
    with pytest.raises(UserError) as caught:
        open_run(tmp_path / "run")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_run_json_describes_the_run(whole, tmp_path):
    """run.json holds the checkpoint's settings, and commands read it rather than the files of a later command."""
    stored = read_checkpoint(whole / LAST)["bottleneck"]["config"]
    assert json.loads(json.dumps(stored)) == read_run_config(whole)
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / ".hydra").mkdir(exist_ok=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("backbone:\n  path: elsewhere\n")
    assert open_run(tmp_path / "run").backbone.path == stored["backbone"]["path"]

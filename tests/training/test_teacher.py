"""head.teacher=FOLDER: a head of an earlier run is the teacher, wherever its folder is; unfit ones are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from bottleneck.core.errors import UserError
from bottleneck.training.finished_run import open_run
from conftest import heads_of

UNMOVED = (
    "ranks=[4,32]",
    "optim.lr=1e-30",
    "tokens=512",
)  # the closed form as it is: at rank D the full head but for a shift of all logits


@pytest.fixture
def earlier(run, tmp_path):
    run(*UNMOVED, run_dir=tmp_path / "earlier")
    return tmp_path / "earlier"


def test_a_saved_copy_of_the_original_head_teaches_the_same(run, earlier, tmp_path):
    """A softmax ignores the shift of all logits, so both teachers must give equal heads; a trained teacher must not."""
    objective = ("ranks=[2,8]", "objective=mixed", "head.mix=0.9", "optim.lr=1e-2")
    own = run(*objective, run_dir=tmp_path / "own")
    told = run(*objective, f"head.teacher={earlier}", run_dir=tmp_path / "told")
    for name, t in heads_of(tmp_path / "own").items():
        torch.testing.assert_close(heads_of(tmp_path / "told")[name], t, rtol=1e-3, atol=1e-4)
    run("ranks=[32]", "optim.lr=1e-1", run_dir=tmp_path / "learned")
    other = run(*objective, f"head.teacher={tmp_path / 'learned'}", run_dir=tmp_path / "other")
    assert abs(other.curve["heads"][1]["loss"] - own.curve["heads"][1]["loss"]) > 1e-3
    name = told.curve["recipe"]["teacher"]
    assert (
        name.startswith("r32_lr1e-30_s0:")
        and name != other.curve["recipe"]["teacher"]
        and str(tmp_path) not in json.dumps(told.curve)
    )


@pytest.mark.parametrize("init", ["fisher", "refined", "svd"])
def test_closed_forms_approximate_the_teacher(run, tmp_path, init):
    """At rank D the closed form equals the teacher: its loss before training is the teacher's final loss, and its KL
    is zero.
    """
    learned = run("ranks=[4,32]", "optim.lr=1e-1", run_dir=tmp_path / "learned").curve
    taught = run(
        "ranks=[4,32]",
        f"head.init={init}",
        "objective=distill",
        "optim.lr=1e-30",
        f"head.teacher={tmp_path / 'learned'}",
        run_dir=tmp_path / "taught",
    ).curve
    assert taught["heads"][1]["initial_loss"] == pytest.approx(learned["heads"][1]["loss"], abs=1e-5)
    assert abs(learned["heads"][1]["loss"] - learned["reference"]["loss"]) > 1e-2  # the original head would fail


def test_a_run_resumes_with_the_same_teacher_in_another_folder(run, earlier, tmp_path):
    objective = ("ranks=[2,8]", "objective=distill", "ckpt_path=last")
    first = run(*objective, f"head.teacher={earlier}")
    shutil.move(earlier, tmp_path / "moved")
    assert run(*objective, f"head.teacher={tmp_path / 'moved'}").curve == first.curve  # finished: the same run
    run(*UNMOVED[:1], "optim.lr=1e-1", "tokens=512", run_dir=tmp_path / "another")
    with pytest.raises(UserError, match="head.teacher=r32_lr1e-1_s0:.*the run in .* has r32_lr1e-30_s0"):
        run(*objective, f"head.teacher={tmp_path / 'another'}")


def test_an_unfit_teacher_is_refused(run, earlier, toy_backbone, tmp_path):
    distill = ("ranks=[2]", "objective=distill")
    for value, words in (
        ("nowhere", "must be own, trained, model:PATH of another model, or the folder"),
        (tmp_path, "no curve.json there"),
    ):
        with pytest.raises(UserError, match=words):
            run(*distill, f"head.teacher={value}", run_dir=tmp_path / "refused")
    with pytest.raises(UserError, match="objective=ce does not use it"):
        run("ranks=[2]", f"head.teacher={earlier}", run_dir=tmp_path / "refused")
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(toy_backbone).config)
    shutil.copytree(toy_backbone, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="head.teacher=.*were trained on backbone"):
        run(*distill, f"head.teacher={earlier}", f"backbone.path={tmp_path / 'other'}", run_dir=tmp_path / "refused")
    narrow = json.loads((earlier / "curve.json").read_text())
    assert open_run(earlier).ranks == [4, 32]
    narrow["hidden_size"] = 48
    for h in narrow["heads"]:
        h["parameters"] = h["rank"] * (narrow["vocab_size"] + 48)
    (earlier / "curve.json").write_text(json.dumps(narrow))
    with pytest.raises(UserError, match=r"vocabulary and hidden size of \[320, 48\], this backbone's are \[320, 32\]"):
        run(*distill, f"head.teacher={earlier}", run_dir=tmp_path / "refused")


def test_the_trained_teacher_is_a_whole_head_of_full_rank(run, tmp_path):
    """Heads of rank d that leave tokens out are none; one beside a whole one does not count."""
    words = ("objective=distill", "head.teacher=trained", "optim.lr=1e-3")
    with pytest.raises(UserError, match="one head of kind low_rank or full and of the full rank 32 .*; found 0"):
        run("heads=[{kind: truncated, rows: 57},{rank: 4}]", "ranks=auto", *words, run_dir=tmp_path / "none")
    heads = "heads=[{kind: truncated, rows: 57},{rank: 4},{kind: full}]"
    result = run(heads, "ranks=auto", *words, run_dir=tmp_path / "one")
    assert [h["status"] for h in result.curve["heads"]] == ["ok"] * 3

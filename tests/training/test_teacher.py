"""head.teacher=FOLDER: the head of an earlier run teaches, whoever it is, wherever its folder lies; what does not fit
is refused.
"""

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


def test_the_full_head_in_a_folder_teaches_what_the_full_head_teaches(run, earlier, tmp_path):
    """Softmaxes ignore the shift, so two routes to one teacher must give the same heads; a teacher that has learned
    gives others.
    """
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
def test_closed_forms_are_of_the_head_that_teaches(run, tmp_path, init):
    """At rank D a closed form is its head itself, so its loss before any training is that with which the teacher ended,
    and its KL is none.
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
    assert abs(learned["heads"][1]["loss"] - learned["reference"]["loss"]) > 1e-2  # the own head would be told from it


def test_a_run_goes_on_with_the_same_teacher_wherever_it_lies(run, earlier, tmp_path):
    objective = ("ranks=[2,8]", "objective=distill", "ckpt_path=last")
    first = run(*objective, f"head.teacher={earlier}")
    shutil.move(earlier, tmp_path / "moved")
    assert run(*objective, f"head.teacher={tmp_path / 'moved'}").curve == first.curve  # finished: the same run
    run(*UNMOVED[:1], "optim.lr=1e-1", "tokens=512", run_dir=tmp_path / "another")
    with pytest.raises(UserError, match="head.teacher=r32_lr1e-1_s0:.*the run in .* has r32_lr1e-30_s0"):
        run(*objective, f"head.teacher={tmp_path / 'another'}")


def test_what_does_not_fit_is_refused(run, earlier, toy_backbone, tmp_path):
    distill = ("ranks=[2]", "objective=distill")
    for value, words in (("nowhere", "must be own, trained, or the folder"), (tmp_path, "no curve.json there")):
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

"""head.teacher=model:PATH: another model teaches, and metrics compare with it; unfit or exchanged ones are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from bottleneck.backbone.model import Backbone
from bottleneck.backbone.target import ABSENT, Target
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError
from bottleneck.evaluation.metrics.accepted import LENGTHS
from bottleneck.training.run_folder import LAST
from conftest import assert_same_heads, heads_of
from support.draft_runs import make_target

SMALL = ("ranks=[2,8]", "tokens=2048", "optim.lr=1e-2")


@pytest.fixture(scope="session")
def target(toy_backbone, tmp_path_factory):
    return make_target(toy_backbone, tmp_path_factory.mktemp("target") / "wide")


@pytest.mark.slow
def test_a_copy_of_the_backbone_teaches_as_the_original_head_does(run, toy_backbone, tmp_path):
    """Run beside the backbone on the same tokens, it has the same logits: same heads, same metrics, bit for bit."""
    for objective in ("distill", "mixed", "lk"):
        own, told = (
            run(*SMALL, f"objective={objective}", f"head.teacher={teacher}", run_dir=tmp_path / objective / name)
            for name, teacher in (("own", "own"), ("told", f"model:{toy_backbone}"))
        )
        assert_same_heads(heads_of(tmp_path / objective / "own"), heads_of(tmp_path / objective / "told"))
        assert own.curve["heads"] == told.curve["heads"]
        about = told.curve["target"]
        assert about["loss"] == pytest.approx(own.curve["reference"]["loss"], abs=1e-6)
        assert about["original"]["kl"] == 0 and about["original"]["accepted_8"] == pytest.approx(8, abs=1e-4)
        assert told.curve["recipe"]["teacher"] == f"model:{about['hash']}" and "target" not in own.curve


def test_heads_learn_another_models_distribution_and_metrics_compare_with_it(run, target, tmp_path):
    curves = {
        o: run("ranks=[8]", f"objective={o}", f"head.teacher=model:{target}", "optim.lr=3e-2", run_dir=tmp_path / o)
        for o in ("distill", "lk")
    }
    module = curves["distill"].module
    key, device = module.bank.keys[0], torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(target).to(device).eval()
    shares, keeps = [], []
    with torch.no_grad():
        for ids, y in module.validation(0, 1):
            p = torch.softmax(model(ids).logits[..., :320].double(), -1)
            q = torch.softmax((module.backbone(ids) @ module.bank[key].dense().T).double(), -1)
            shares.append(torch.minimum(p, q).sum(-1))
            keeps.append(y != -100)
    (head,) = curves["distill"].curve["heads"]
    kept = torch.cat([s[k] for s, k in zip(shares, keeps)])
    assert head["acceptance"] == pytest.approx(kept.mean().item(), abs=1e-5)
    for k in LENGTHS:  # every window of k validation tokens, by hand
        found = []
        for share, keep in zip(shares, keeps):
            for row, has in zip(share.tolist(), keep.tolist()):
                for i in range(len(row) - k + 1):
                    if all(has[i : i + k]):
                        chance, expected = 1.0, 0.0
                        for a in row[i : i + k]:
                            chance *= a
                            expected += chance
                        found.append(expected)
        assert head[f"accepted_{k}"] == pytest.approx(sum(found) / len(found), abs=1e-5)
    untaught = curves["distill"].curve["target"]["original"]
    assert head["kl"] < untaught["kl"] and head["acceptance"] > untaught["acceptance"]
    (direct,) = curves["lk"].curve["heads"]
    assert direct["acceptance"] > untaught["acceptance"] and direct["kl"] != head["kl"]


def test_company_does_not_change_a_taught_head(run, target, tmp_path):
    taught = ("objective=lk", f"head.teacher=model:{target}", "tokens=2048", "optim.lr=1e-2")
    together = run("ranks=[2,8]", *taught, run_dir=tmp_path / "both").curve["heads"][1]
    assert run("ranks=[8]", *taught, run_dir=tmp_path / "one").curve["heads"] == [{**together, "best": True}]
    both, one = heads_of(tmp_path / "both"), heads_of(tmp_path / "one")
    assert_same_heads({name: both[name] for name in one}, one)


def test_a_run_resumes_with_its_target_only(run, target, toy_backbone, tmp_path):
    """The target is known by its weights: its folder may move, but another model is refused, before it trains."""
    taught = (*SMALL, "objective=distill", "ckpt_path=last")
    moved = tmp_path / "moved"
    shutil.copytree(target, moved)
    first = run(*taught, f"head.teacher=model:{target}")
    (tmp_path / "run" / "curve.json").unlink()
    assert run(*taught, f"head.teacher=model:{moved}").curve == {
        **first.curve,
        "target": {**first.curve["target"], "name": "moved"},
    }
    stored = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert not any("target" in name for name in stored["state_dict"])
    assert stored["bottleneck"]["config"]["head"]["teacher"] == f"model:{first.curve['target']['hash']}"
    with pytest.raises(UserError, match="head.teacher=model:[0-9a-f]{16}: the run in .* has model:"):
        run(*taught, f"head.teacher=model:{toy_backbone}")
    assert json.loads((tmp_path / "run" / "curve.json").read_text())["target"]["hash"] == first.curve["target"]["hash"]


def test_an_unfit_target_is_refused(run, target, tmp_path, monkeypatch):
    monkeypatch.setattr(Target, "load", lambda *a, **k: pytest.fail("weights were loaded"))
    other = tmp_path / "other"
    shutil.copytree(target, other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(text))
    for teacher, words in (
        (f"model:{other}", "head.teacher=model:other: its tokenizer is not the backbone's"),
        ("model:", "must be own, trained, model:PATH"),
        (f"model:{tmp_path}/none", "^head.teacher=model:/.*/none: no such folder$"),
        (f"model:{tmp_path}", f"^head.teacher=model:{tmp_path}: no config.json there; give a Hub name"),
        (f"model:{tmp_path}/x.gguf", "x.gguf: no such file"),
    ):
        with pytest.raises(UserError, match=words):
            run(*SMALL, "objective=lk", f"head.teacher={teacher}")
    with pytest.raises(UserError, match="objective=ce does not use it"):
        run(*SMALL, f"head.teacher=model:{target}")
    with pytest.raises(UserError, match="trainer.shard=fsdp: does not go with head.teacher=model"):
        run(*SMALL, "objective=lk", f"head.teacher=model:{target}", "trainer.shard=fsdp", "trainer.devices=2")


def test_rows_that_the_target_lacks_have_no_probability(toy_backbone):
    backbone = Backbone.load(BackboneConfig(path=str(toy_backbone)))
    wide, ids = Target(backbone, backbone.vocab_size + 3), torch.arange(12).view(2, 6)
    logits = wide.float_logits(wide(ids).flatten(0, 1))
    assert (logits[:, -3:] == ABSENT).all() and (torch.softmax(logits, -1)[:, -3:] == 0).all()
    torch.testing.assert_close(logits[:, :-3], backbone.head.float_logits(backbone(ids).flatten(0, 1)))

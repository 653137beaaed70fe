"""`--form modelling`: Transformers computes every kind of head as the bank does; other forms refuse it in one line."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bottleneck.backbone.model import Backbone, load_model
from bottleneck.backbone.tiny_configs import tiny_config
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import HEAD_KINDS
from bottleneck.heads.head import build_head
from bottleneck.heads.key import HeadKey
from bottleneck.serve import export, kind_head
from bottleneck.serve.folder import check_logits, see
from bottleneck.serve.modelling import check_kind, rounded_logits, write_modelling
from conftest import composed
from support.study_runs import run_study
from train import train

ENTRIES = {
    "low_rank": "rank: 4",
    "full": "rank: 32",
    "low_rank_bias": "rank: 4",
    "low_rank_sparse": "rank: 4, rows: 20",
    "block": "rank: 4, bands: [30, 100]",
    "mos": "rank: 4, components: 3",
    "sigsoftmax": "rank: 4",
    "plif": "rank: 4, pieces: 8, limit: 3.0",
    "gated": "rank: 4",
    "context_temperature": "rank: 4",
    "truncated": "rank: 32, rows: 50",
    "low_rank_truncated": "rank: 4, rows: 50",
}


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def every_kind(toy, tmp_path_factory):
    """A run with a head of every kind: its folder and its rows by kind."""
    folder = tmp_path_factory.mktemp("kinds") / "run"
    heads = ", ".join(f"{{kind: {kind}, {options}}}" for kind, options in ENTRIES.items())
    words = [*toy, "tokens=2560", "data.validation_tokens=600", "ranks=auto", f"heads=[{heads}]"]
    return folder, {h.get("kind", "low_rank"): h for h in train(composed(words), folder).curve["heads"]}


def test_every_built_in_kind_has_a_formula():
    built_in = {k.name for k in HEAD_KINDS if k.build.__module__.startswith("bottleneck.")}
    assert built_in == set(kind_head.FORMULAS) == set(ENTRIES)


@pytest.mark.parametrize("kind", ENTRIES)
def test_transformers_computes_the_banks_logits(kind, every_kind, toy_backbone, tmp_path, capsys):
    """Loaded as the command says, with trust_remote_code: logits are those of the trained head; it also generates."""
    folder, rows = every_kind
    name = HeadKey.of(rows[kind]).name
    to = tmp_path / "out"
    assert export.main([str(folder), "--head", name, "--form", "modelling", "--to", str(to)]) == 0
    said = capsys.readouterr().out
    assert kind == "low_rank" or (f"\n{kind}" in said and "trust_remote_code=True" in said)
    assert kind != "mos" or "\nmos components=3, rank 4, lr" in said
    model = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True).eval()
    backbone, head = Backbone.load(BackboneConfig(path=str(toy_backbone))), export.open_run(folder).head(rows[kind])
    ids = torch.randint(0, backbone.vocab_size, (2, 20), generator=g(1))
    with torch.no_grad():
        got, want = model(input_ids=ids, use_cache=False).logits, head.logits(backbone(ids).flatten(0, 1))
    torch.testing.assert_close(got.flatten(0, 1), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    facts = json.loads((to / "bottleneck.json").read_text())
    assert facts["form"] == "modelling" and facts["head"].get("kind", "low_rank") == kind
    prompt = AutoTokenizer.from_pretrained(to)("some words", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        first = head.logits(backbone(prompt["input_ids"])[:, -1]).argmax()
    assert out[0, prompt["input_ids"].shape[1]] == first


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "falcon_h1"])
def test_families_that_tie_cap_or_scale(family, tmp_path):
    """The original head's cap, scale and ties leave no trace; 16-bit weights give the same within rounding."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path / "source")
    for dtype in ("float32", "bfloat16"):
        cfg = BackboneConfig(path=str(tmp_path / "source"), dtype=dtype)
        model = load_model(cfg)
        backbone = Backbone(model, family)
        key = HeadKey(4, 0.1, 0, "mos", (("components", 2),))
        head = build_head(key, backbone.vocab_size, backbone.hidden_size)
        with torch.no_grad():
            for i, p in enumerate(head.parameters()):
                p.copy_(torch.randn(p.shape, generator=g(i)) / 2)
        seen = see(model, backbone, dtype)
        part = tmp_path / dtype
        part.mkdir()
        write_modelling(model, backbone, key, head.tensors(), fresh=lambda: load_model(cfg), part=part)  # noqa: B023
        check_logits(part, seen, rounded_logits(head, seen), rounding=5e-2)


def test_a_wrong_formula_is_noticed_before_the_folder_is_there(every_kind, monkeypatch, tmp_path, capsys):
    """The folder is loaded again and compared: a modelling file that computes another thing is refused."""
    wrong = tmp_path / "kind_head.py"
    text = (export.Path(kind_head.__file__)).read_text()
    wrong.write_text(text.replace("return s + logsigmoid(s)", "return s"))
    monkeypatch.setattr(kind_head, "__file__", str(wrong))
    folder, rows = every_kind
    name = HeadKey.of(rows["sigsoftmax"]).name
    to = tmp_path / "out"
    assert export.main([str(folder), "--head", name, "--form", "modelling", "--to", str(to)]) == 2
    assert "its logits differ by" in capsys.readouterr().err and not to.exists()


@pytest.mark.parametrize(
    "form, words", [("dense", "is not one matrix"), ("serve", "has no factors"), ("factored", "no f")]
)
def test_other_forms_refuse_kinds_that_they_cannot_hold(every_kind, form, words, tmp_path, capsys):
    folder, rows = every_kind
    name = HeadKey.of(rows["mos"]).name
    assert export.main([str(folder), "--head", name, "--form", form, "--to", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "a head of kind mos" in line and "--form modelling" in line
    with pytest.raises(UserError, match="--form modelling: has no formula of kind gain; it has low_rank, full"):
        check_kind(HeadKey(4, 0.1, 0, "gain"))


@pytest.mark.parametrize("form", ["modelling", "serve"])
def test_without_its_code_a_folder_is_refused_and_saved_again_it_is_the_same(form, every_kind, tmp_path, caplog):
    """Transformers' own class would have a random head: it refuses, and its report says what to do. So does a copy."""
    folder, rows = every_kind
    name = HeadKey.of(rows["low_rank"]).name
    to, copy = tmp_path / "out", tmp_path / "copy"
    assert export.main([str(folder), "--head", name, "--form", form, "--to", str(to)]) == 0
    model = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True).eval()
    model.save_pretrained(copy)
    again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True).eval()
    ids = torch.randint(0, 60, (2, 9), generator=g(3))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, "transformers")
    try:
        for each in (to, copy):
            caplog.clear()
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                AutoModelForCausalLM.from_pretrained(each)
            assert "lm_head.needs_trust_remote_code" in caplog.text
    finally:
        root.removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", ["block", "low_rank_sparse"])
def test_other_linear_kinds_are_exported_as_ordinary_models(kind, every_kind, toy_backbone, tmp_path):
    """W of a block or of full rows beside A B, in a model that needs no code of its own."""
    folder, rows = every_kind
    to = tmp_path / "out"
    assert export.main([str(folder), "--head", HeadKey.of(rows[kind]).name, "--form", "dense", "--to", str(to)]) == 0
    model, run = AutoModelForCausalLM.from_pretrained(to).eval(), export.open_run(folder)
    backbone = Backbone.load(BackboneConfig(path=str(toy_backbone)))
    ids = torch.randint(0, backbone.vocab_size, (2, 20), generator=g(1))
    with torch.no_grad():
        got, want = model(input_ids=ids).logits, run.head(rows[kind]).logits(backbone(ids).flatten(0, 1))
    torch.testing.assert_close(got.flatten(0, 1), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_a_damaged_folder_is_named(every_kind, tmp_path):
    folder, rows = every_kind
    to = tmp_path / "out"
    assert (
        export.main([str(folder), "--head", HeadKey.of(rows["mos"]).name, "--form", "modelling", "--to", str(to)]) == 0
    )
    file = to / "model-head.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{to}: its weights are damaged or cut short"):
        AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True)


@pytest.mark.parametrize("form, kind", [("serve", "low_rank"), ("modelling", "low_rank_bias"), ("modelling", "block")])
def test_extract_reads_the_rank_of_heads_with_their_own_code(form, kind, every_kind, toy, tmp_path):
    """The rank shows in what the model answers; of kinds without one rank nothing is claimed."""
    folder, rows = every_kind
    to = tmp_path / "out"
    assert export.main([str(folder), "--head", HeadKey.of(rows[kind]).name, "--form", form, "--to", str(to)]) == 0
    text = [word for word in toy if word.startswith("data")]
    words = ["study=extract", "backbone=local", f"backbone.path={to}", *text, "tokens=400", "trainer=cpu"]
    (found,) = run_study(tmp_path / "study", *words, "backbone.trust_remote_code=true")["checkpoints"]
    if kind == "block":
        assert found["known_rank"] is None and found["rank"] == 4 + 2 + 1
    else:
        assert found["rank"] == found["known_rank"] == 4 and found["verdict"].endswith("as exported")
    with pytest.raises(UserError, match=f"an export of --form {form}, whose head has code of its own; .* --form dense"):
        run_study(tmp_path / "study", *words)
    for trusted in ("true", "false"):
        with pytest.raises(UserError, match=f"backbone.path={to}: an export of --form {form}"):
            train(composed([*toy, f"backbone.path={to}", f"backbone.trust_remote_code={trusted}"]), tmp_path / "run")


def test_extract_of_the_full_rank_behind_a_layer_norm(every_kind, toy, tmp_path):
    """Hidden states of a LayerNorm lie in a plane, so d - 1 is all that a head of rank d shows."""
    folder, rows = every_kind
    to = tmp_path / "out"
    assert export.main([str(folder), "--head", HeadKey.of(rows["full"]).name, "--form", "dense", "--to", str(to)]) == 0
    text = [word for word in toy if word.startswith("data")]
    words = ["study=extract", "backbone=local", f"backbone.path={to}", *text, "tokens=400", "trainer=cpu"]
    (found,) = run_study(tmp_path / "study", *words)["checkpoints"]
    assert (found["rank"], found["hidden_rank"], found["known_rank"]) == (31, 31, 32)
    assert "as exported (32 = d, of which hidden states after a LayerNorm show 31)" in found["verdict"]

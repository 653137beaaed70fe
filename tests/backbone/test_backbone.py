"""Backbones: their hidden states are the head's input, in every family; they stay frozen; others are refused."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
import transformers as T

from bottleneck.backbone.model import Backbone, FullHead, label, load_shape, load_tokenizer
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError
from bottleneck.evaluation.sums import full_head_loss

SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
GPT = dict(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
IDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
FAMILIES = {
    "gpt_neox": lambda: T.GPTNeoXConfig(**SMALL, **IDS, hidden_dropout=0.5, attention_dropout=0.5),
    "gpt2": lambda: T.GPT2Config(**GPT, **IDS),
    "opt": lambda: T.OPTConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        **IDS,
    ),
    "llama": lambda: T.LlamaConfig(**SMALL, **IDS),
    "gemma": lambda: T.GemmaConfig(**SMALL, **IDS, head_dim=8, num_key_value_heads=4),
    "gemma2": lambda: T.Gemma2Config(**SMALL, **IDS, head_dim=8, num_key_value_heads=4, final_logit_softcapping=0.5),
    "cohere": lambda: T.CohereConfig(**SMALL, **IDS, logit_scale=0.25),
    "granite": lambda: T.GraniteConfig(**SMALL, **IDS, logits_scaling=8.0),
    "phi": lambda: T.PhiConfig(**SMALL, **IDS),
    "qwen3": lambda: T.Qwen3Config(**SMALL, **IDS, num_key_value_heads=4),
}
NOT_PLAIN = {"gemma2", "cohere", "granite", "phi"}


def model_of(family: str):
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(FAMILIES[family]())
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_full_head_loss_is_the_loss_of_the_model(family):
    """Hidden states × original head (bias, scale, cap) give the loss that the model itself reports."""
    model = model_of(family)
    backbone = Backbone(model, family)
    ids = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(1))
    want = model.eval()(input_ids=ids, labels=ids).loss.item()
    h = backbone(ids)[:, :-1].flatten(0, 1)
    got = full_head_loss(h, backbone.head, ids[:, 1:].flatten()).item() / (3 * 19)
    assert abs(got - want) < 1e-5
    assert backbone.head.plain == (family not in NOT_PLAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt_neox", *sorted(NOT_PLAIN)])
def test_float_logits_are_not_rounded(family, dtype):
    """They equal the logits of the same numbers in float32; the model's own 16-bit logits differ more."""
    backbone = Backbone(model_of(family).to(dtype), family)
    h = backbone(torch.arange(24).view(2, 12)).flatten(0, 1)
    wide = FullHead(
        backbone.head.W_VD.float(),
        None if backbone.head.bias_V is None else backbone.head.bias_V.float(),
        backbone.head.scale,
        backbone.head.softcap,
    )
    want, got = wide.logits(h.float()), backbone.head.float_logits(h)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if dtype == torch.bfloat16:
        assert (backbone.head.logits(h).float() - want).abs().max() > 1e-4


def test_frozen_also_after_train():
    """Module.train() of a module that holds the backbone does not switch its dropout on."""
    backbone = Backbone(model_of("gpt_neox"), "x")  # its dropout is 0.5
    ids = torch.arange(24).view(2, 12)
    holder = torch.nn.Sequential(backbone)
    holder.train()
    first, second = backbone(ids), backbone(ids)
    assert torch.equal(first, second)
    assert not any(p.requires_grad for p in backbone.parameters()) and not first.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_names_the_family(dtype):
    """A model that does something unknown between hidden state and logits is refused, not silently trained on."""
    model = model_of("llama").to(dtype)
    Backbone(model, "unchanged")
    plain = model.forward

    def changed(change):
        model.forward = lambda **kw: (out := plain(**kw), setattr(out, "logits", change(out.logits)), out)[-1]
        return Backbone(model, "changed")

    # scale, cap, bias and cut are measured, so the family's names for them do not matter
    assert abs(changed(lambda z: z * 1.01).head.scale - 1.01) < 1e-3
    assert abs(changed(lambda z: 7.5 * torch.tanh(z / 7.5)).head.softcap - 7.5) < 1e-2
    assert changed(lambda z: z[..., :100]).vocab_size == 100
    bias = torch.linspace(-1, 1, 128, dtype=dtype)
    torch.testing.assert_close(changed(lambda z: z + bias).head.bias_V, bias)
    for change in (lambda z: z + 0.01 * z.abs(), lambda z: z.log_softmax(-1), lambda z: z * torch.arange(1, 129)):
        with pytest.raises(UserError, match="family llama is not supported"):
            changed(change)


def test_shape_is_known_without_weights(tmp_path):
    """The width of the head's input, which is not always hidden_size (OPT-350m), from config.json alone."""
    for family, width in (("opt", 16), ("llama", 32)):
        FAMILIES[family]().save_pretrained(tmp_path / family)
        hidden, context, vocab = load_shape(BackboneConfig(path=str(tmp_path / family)))
        assert (hidden, context, vocab) == (width, 64, 128)
        assert Backbone(model_of(family), family).hidden_size == width


def test_hash_ignores_dtype_and_sees_weights(toy_backbone):
    cfg = BackboneConfig(path=str(toy_backbone))
    a = Backbone.load(cfg)
    b = Backbone.load(BackboneConfig(path=str(toy_backbone), dtype="bfloat16"))
    assert a.hash == b.hash and b.lm_head.weight.dtype == torch.bfloat16
    model = T.AutoModelForCausalLM.from_pretrained(toy_backbone)
    assert Backbone(model, "x").hash == a.hash
    with torch.no_grad():
        model.get_output_embeddings().weight[123, 17] += 1
    assert Backbone(model, "x").hash != a.hash


def test_missing_weights_are_not_made_up(toy_backbone, tmp_path):
    """Transformers fills missing weights with random numbers; a backbone with a random head is refused."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(toy_backbone, tmp_path / "nohead")
    weights = load_file(folder / "model.safetensors")
    head = next(n for n in weights if "embed_out" in n or "lm_head" in n)
    save_file({n: w for n, w in weights.items() if n != head}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights are missing or of another shape"):
        Backbone.load(BackboneConfig(path=str(folder)))
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot load its weights"):
        Backbone.load(BackboneConfig(path=str(folder)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="backbone"):
        load_tokenizer(BackboneConfig(path=str(folder)))


def test_labels():
    assert label(BackboneConfig(path="EleutherAI/pythia-160m", revision="step3000")) == "pythia-160m@step3000"
    assert label(BackboneConfig(path="/models/mine/")) == "mine"


@pytest.mark.parametrize(
    "cfg, words",
    [
        (BackboneConfig(path="/no/such/folder"), "no such folder"),
        (BackboneConfig(path="{toy}", gguf_file="x.gguf"), "GGUF files there: none"),
        (BackboneConfig(path="{empty}"), "cannot load its"),
    ],
)
def test_bad_paths_are_one_line(cfg, words, toy_backbone, tmp_path):
    cfg = dataclasses.replace(cfg, path=cfg.path.format(toy=toy_backbone, empty=tmp_path))
    for load in (load_tokenizer, load_shape):
        with pytest.raises(UserError, match=words) as caught:
            load(cfg)
        assert "\n" not in str(caught.value) and "backbone." in str(caught.value)

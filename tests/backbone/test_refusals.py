"""Backbones that would give wrong results are refused in one line that names the reason."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Callable

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from bottleneck.backbone import adapters, load, proof
from bottleneck.backbone.model import Backbone, load_model, load_shape, load_tokenizer
from bottleneck.backbone.tiny_configs import tiny_config
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError
from bottleneck.heads.calibration import calibrate
from conftest import ROOT

TINY = ROOT / "data/backbones/tiny"


def refused(words: str, call: Callable) -> str:
    """The one line with which `call()` is refused."""
    with pytest.raises(UserError, match=words) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 700, line
    return line


def model_of(family: str, dtype=torch.float32, **changes):
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(config).to(dtype)


LOOKS_AHEAD = {
    "xlnet": {},
    "xlm": {},
    "cpmant": {},
    "bert": {"is_decoder": False},
    "bert-generation": {"is_decoder": False},
    "gemma": {"use_bidirectional_attention": True},
    "gemma3_text": {"use_bidirectional_attention": True},
    "llama": {"is_causal": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LOOKS_AHEAD)
def test_a_model_that_looks_ahead_is_refused(family, dtype):
    """Heads on it would see the tokens they predict."""
    model = model_of(family, dtype, **LOOKS_AHEAD[family])
    refused(f"family {family} as configured is not causal", lambda: Backbone(model, "x", block_size=24))


def leak(run, tokens, block, device):
    found = proof.dependence(run, tokens, block, device)
    assert found.others is None
    return found.later


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "mamba"])
def test_a_leak_is_found_wherever_it_is(family):
    """One token of lookahead; only in long blocks; only at repeated tokens: causal models made leaky by hand."""
    plain = Backbone(model_of(family), "x", block_size=40)
    device = torch.device("cpu")
    assert leak(plain, 96, 40, device) is None

    def next_token(ids):
        h = plain(ids)
        return h + 1e-3 * torch.roll(h, -1, 1)

    def beyond_32(ids):
        h = plain(ids)
        return h + 1e-3 * h.mean(1, keepdim=True) if ids.shape[1] > 32 else h

    def at_padding(ids):
        h = plain(ids)
        padded = (ids[:, -1:] == ids[:, -2:-1]).unsqueeze(-1)
        return torch.where(padded, h * 1.01, h)

    assert leak(next_token, 96, 40, device) and leak(at_padding, 96, 40, device)
    assert leak(beyond_32, 96, 40, device) and leak(beyond_32, 96, 32, device) is None

    def within(ids, start, chunk):
        """Both ways within chunks that the middle of the block does not cut."""
        h = plain(ids).clone()
        for first in range(0, start, chunk):
            h[:, first : first + chunk] += 0.1 * h[:, first : first + chunk].mean(1, keepdim=True)
        return h

    for start, chunk in ((40, 10), (40, 4), (8, 8), (2, 2)):
        assert leak(lambda ids, s=start, c=chunk: within(ids, s, c), 96, 40, device), (start, chunk)
    for block in (2, 3):
        assert leak(plain, 96, block, device) is None


def _dropped(ids, x):
    return torch.nn.functional.dropout(x, 0.1, training=True)  # as a family does that never asks for its mode


class _Remembered:
    """A cache that outlives the pass."""

    def __init__(self):
        self.last = 0

    def __call__(self, ids, x):
        before, self.last = self.last, x.mean((0, 1), keepdim=True)
        return x + before


def _normalised(ids, x):
    return (x - x.mean((0, 1), keepdim=True)) / x.std((0, 1), keepdim=True)  # BatchNorm in training mode


SPOILED = {"dropout": _dropped, "state": _Remembered(), "batch": _normalised}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SPOILED)
def test_hidden_states_must_be_a_function_of_their_own_tokens(kind, dtype):
    """Regression: movements were compared with those of an unchanged sequence, so where that moved as far, none
    counted."""
    model = model_of("llama", dtype)
    spoil = SPOILED[kind]
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: spoil(args[0], out).to(out.dtype))
    refused("gives the same tokens other hidden states in another pass", lambda: Backbone(model, "x", block_size=24))


@pytest.mark.parametrize("mark", ["eos_token_id", "pad_token_id"])
def test_a_model_that_counts_its_padding_is_refused(mark):
    """Regression: no probed sequence ended in the family's own end of text or padding, as a run's last block does."""
    model = model_of("llama", **{mark: 7})

    def mask_by_length(_, args, out):
        return out * (1 + 0.1 * (args[0] == 7).sum(1).view(-1, 1, 1))

    model.get_input_embeddings().register_forward_hook(mask_by_length)
    refused("is not causal", lambda: Backbone(model, "x", block_size=24))


def test_a_chunk_that_the_middle_does_not_cut():
    """Tokens 17 to 23 of a block of 32 see one another; the middle, the first and the last token are outside."""
    plain = Backbone(model_of("llama"), "x", block_size=32)

    def within(ids):
        h = plain(ids).clone()
        h[:, 17:24] += 0.1 * h[:, 17:24].mean(1, keepdim=True)
        return h

    assert leak(within, 96, 32, torch.device("cpu"))


def test_rounding_is_no_leak():
    """Hidden states that depend on the rest of the batch by rounding, as with mixtures of experts in 16 bits."""
    plain = Backbone(model_of("mixtral").bfloat16(), "x")

    def noisy(ids):
        g = torch.Generator().manual_seed(int(ids.sum()))
        h = plain(ids)
        return h + (4e-3 * torch.randn(h.shape, generator=g)).to(h.dtype) * h

    assert leak(noisy, 96, 64, torch.device("cpu")) is None


def test_blocks_longer_than_the_model_can_read_are_refused():
    """RoBERTa's 128 positions start at 2: its config promises more tokens than it can read."""
    Backbone(model_of("roberta"), "x", block_size=120)
    refused("data.block_size=128: backbone x .family roberta. cannot read", lambda: _roberta(128))


def _roberta(block: int) -> Backbone:
    return Backbone(model_of("roberta"), "x", block_size=block)


@pytest.fixture
def folder(toy_backbone, tmp_path) -> Path:
    return shutil.copytree(toy_backbone, tmp_path / "model")


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_no_usable_numbers(folder, value):
    """One bad embedding row, of a token that the probe may not contain."""

    def spoil(weights):
        weights["gpt_neox.embed_in.weight"][313] = value

    rewrite(folder, spoil)
    cfg = BackboneConfig(path=str(folder))
    line = refused("embed_in.weight are not usable numbers", lambda: Backbone.load(cfg))
    assert "32 of the weights" in line and "[313, 0]" in line


def test_a_number_of_a_buffer_that_is_not_usable():
    """The routing bias of an expert: Transformers keeps it in a buffer, and a NaN there wins every comparison."""
    model = model_of("dots1")
    (key,) = [n for n, _ in model.named_buffers() if "e_score_correction_bias" in n][-1:]
    model.get_buffer(key)[1] = float("nan")
    refused(f"1 of the numbers {key} are not usable", lambda: Backbone(model, "x"))


def test_weights_of_the_file_that_the_model_has_no_place_for(folder, caplog):
    """A bias of the head, scales of quantized weights, such weights alone; others are named in a warning."""
    whole = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.0.attention.dense.weight"
    cfg = BackboneConfig(path=str(folder))
    eight = (whole[name] * 16).to(torch.float8_e4m3fn)
    for changed, words in (
        ({"embed_out.bias": torch.ones(320)}, "no place for: (embed_out|lm_head).bias"),
        ({name: eight, f"{name}_scale_inv": torch.ones(1)}, f"no place for: {name}_scale_inv"),
        ({name: eight}, f"model.safetensors holds quantized weights, .* no quantization_config: {name}"),
        ({name: (whole[name] * 16).to(torch.int8)}, f"no quantization_config: {name}"),
    ):
        save_file(whole | changed, folder / "model.safetensors", metadata={"format": "pt"})
        refused(words, lambda: load_model(cfg))
    save_file(whole | {"vision.x.weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(cfg)
    assert "weights of the file that the model does not use: vision.x.weight" in caplog.text


@pytest.mark.parametrize("prefix", ["gpt_neox.", ""])
def test_a_config_that_counts_fewer_layers_than_the_file_has(folder, prefix):
    """Transformers loads the first ones with a warning: another backbone. Layers for further tokens do not count."""
    whole = load_file(folder / "model.safetensors")
    last = max(int(name.split(".")[2]) for name in whole if name.startswith("gpt_neox.layers."))
    added = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}.").replace("gpt_neox.", prefix): tensor.clone()
        for name, tensor in whole.items()
        if f"layers.{last}." in name
    }
    save_file(whole | added, folder / "model.safetensors", metadata={"format": "pt"})
    cfg = BackboneConfig(path=str(folder))
    refused(rf"layers that its config does not count: {prefix}layers.{last + 1}\.", lambda: load_model(cfg))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    load_model(cfg)


@pytest.mark.parametrize(
    "kind, way",
    [(k, w) for k in (torch.float8_e4m3fn, torch.int8, torch.float16) for w in ("bin", "hub")]
    + [(torch.int8, "old bin")],
)
def test_quantized_weights_without_a_config_in_other_places(folder, tmp_path, monkeypatch, kind, way):
    """Regression: only safetensors files of local folders were looked at."""
    whole = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    stored = whole | {name: (whole[name] * 16).to(kind)}
    path = str(folder)
    if way == "hub":
        path = "some/model"
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        monkeypatch.setattr(load, "cached_file", lambda *_, **__: str(folder / "config.json"))
        model = T.AutoModelForCausalLM.from_pretrained(folder)
        call = lambda: load._check_stored(model, BackboneConfig(path=path))
        monkeypatch.setattr(load, "base_of", lambda *_: None)
    else:
        (folder / "model.safetensors").unlink()
        torch.save(stored, folder / "pytorch_model.bin", _use_new_zipfile_serialization=way == "bin")
        call = lambda: load_model(BackboneConfig(path=path))
    if kind == torch.float16:
        call()
    else:
        refused(f"holds quantized weights, .* no quantization_config: {name}", call)


def test_hidden_states_that_overflow_are_found_by_calibration(toy_backbone):
    """Weights that are large but finite, whose hidden states are not."""
    backbone = Backbone.load(BackboneConfig(path=str(toy_backbone)))
    hidden = backbone(torch.arange(64).view(2, 32))
    hidden[1, 3] = float("nan")
    words = "hidden states or logits of the calibration tokens are not finite"
    refused(words, lambda: calibrate([hidden], backbone.head))


def test_missing_and_mismatched_weights_are_one_line(folder, capfd):
    whole = load_file(folder / "model.safetensors")
    cfg = BackboneConfig(path=str(folder))
    rewrite(folder, lambda w: [w.pop(n) for n in list(w) if "layers" in n])
    refused(r"weights are missing or of another shape: .* and \d+ more", lambda: load_model(cfg))
    save_file(
        {n: w[..., :5].clone() for n, w in whole.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    refused("of another shape: gpt_neox.embed_in.weight, ", lambda: load_model(cfg))
    assert len(capfd.readouterr().err.splitlines()) < 2  # Transformers' table of names is not printed


def test_the_key_at_fault_is_named(toy_backbone, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    bad = BackboneConfig(path=str(toy_backbone), tokenizer=str(tmp_path))
    refused("^backbone.tokenizer=", lambda: load_tokenizer(bad))
    bad = BackboneConfig(path=str(toy_backbone), attn_implementation="flush")
    refused("^backbone.attn_implementation=flush: ", lambda: load_model(bad))
    if importlib.util.find_spec("flash_attn") is None:
        bad = BackboneConfig(path=str(toy_backbone), attn_implementation="flash_attention_2")
        refused("^backbone.attn_implementation=flash_attention_2: ", lambda: load_model(bad))


@pytest.mark.parametrize("model", ["no merges", "Unigram with the scores of a BPE"])
def test_a_tokenizer_that_splits_its_own_words(tmp_path, model):
    """Transformers 5.17 reads the ranks in a GGUF file of Gemma as scores of a Unigram, and says nothing."""
    shutil.copytree(TINY, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    if model == "no merges":
        content["model"]["merges"] = []
    else:
        content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[word, -i] for i, word in enumerate(words)]}
    load_tokenizer(BackboneConfig(path=str(TINY)))
    file.write_text(json.dumps(content))
    line = "its tokenizer splits [0-9]+ of [0-9]+ words of its own vocabulary, such as 'Ġ"
    refused(line, lambda: load_tokenizer(BackboneConfig(path=str(tmp_path / "t"))))
    load_tokenizer(BackboneConfig(path=str(tmp_path / "t"), tokenizer=str(TINY)))
    named = BackboneConfig(path=str(TINY), tokenizer=str(tmp_path / "t"))
    refused("^backbone.tokenizer=.*splits", lambda: load_tokenizer(named))


def changed_config(folder: Path, **changes) -> BackboneConfig:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
    return BackboneConfig(path=str(folder))


def test_an_unknown_quantization_is_not_passed_over(folder):
    cfg = changed_config(folder, quantization_config={"quant_method": "ternary9", "bits": 2})
    for call in (load_shape, load_model):
        refused("quant_method=ternary9, which Transformers .* does not know", lambda call=call: call(cfg))


def test_a_revision_of_a_folder_is_refused(folder):
    """Transformers ignores it: the heads were trained on the folder's weights, under the revision's name."""
    cfg = BackboneConfig(path=str(folder), revision="step1000")
    for call in (load_shape, load_tokenizer, load_model):
        refused("backbone.revision=step1000: is for a Hub name; backbone.path=", lambda call=call: call(cfg))


@pytest.mark.parametrize("kind", ["T5Config", "ViTConfig", "CLIPConfig"])
def test_what_is_no_causal_lm_is_one_line(kind, tmp_path):
    getattr(T, kind)().save_pretrained(tmp_path)
    cfg = BackboneConfig(path=str(tmp_path))
    for call in (load_shape, load_model):
        refused("is not a causal language model", lambda call=call: call(cfg))


@pytest.mark.parametrize(
    "family, width, context, vocabulary",
    [
        ("reformer", 64, 128, 96),
        ("rembert", 32, 128, 96),
        ("electra", 32, 128, 96),
        ("inkling_text", 32, 128, 90),
        ("mpt", 32, 128, 96),
        ("whisper", 32, 128, 96),
        ("bloom", 32, None, 96),
    ],
)
def test_shape_under_other_names(family, width, context, vocabulary, tmp_path):
    """Width and vocabulary are those of the head, even if the config's hidden_size and vocab_size differ."""
    tiny_config(family).save_pretrained(tmp_path)
    assert load_shape(BackboneConfig(path=str(tmp_path))) == (width, context, vocabulary)


@pytest.fixture
def adapted(folder, tmp_path):
    """(adapter beside its base, adapter alone, plain base): the adapter changes every layer."""
    base = T.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False))
    alone = tmp_path / "alone"
    model.save_pretrained(alone)
    beside = shutil.copytree(folder, tmp_path / "beside")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(alone / name, beside / name)
    return beside, alone, folder, model.eval()


def test_an_adapter_is_applied(adapted):
    """Hidden states and logits are those of PEFT's own model, at either place of the adapter, and not the base's."""
    beside, alone, base, model = adapted
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        want = model(input_ids=ids).logits
    hashes = set()
    for path in (beside, alone):
        backbone = Backbone.load(BackboneConfig(path=str(path)))
        got = backbone.head.logits(backbone(ids))
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
        assert not any("lora" in name for name, _ in backbone.named_parameters())
        assert load_shape(BackboneConfig(path=str(path)))[0] == 32
        load_tokenizer(BackboneConfig(path=str(path)))
        hashes.add(backbone.hash)
    plain = Backbone.load(BackboneConfig(path=str(base)))
    assert len(hashes) == 1 and plain.hash not in hashes
    assert (plain.head.logits(plain(ids)) - want).abs().max() > 1e-2


@pytest.mark.parametrize("beside", [False, True])
def test_the_magnitudes_of_dora_are_applied(folder, tmp_path, beside):
    """Transformers itself leaves them out."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["dense_h_to_4h"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(T.AutoModelForCausalLM.from_pretrained(folder), config).eval()
    for key, p in model.named_parameters():
        if "magnitude" in key:
            p.data.mul_(1.5)
    path = folder if beside else tmp_path / "alone"
    model.save_pretrained(path)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        want = model(input_ids=ids).logits
    backbone = Backbone.load(BackboneConfig(path=str(path)))
    assert (backbone.head.logits(backbone(ids)) - want).abs().max() < 1e-5 * want.abs().max()


def test_a_damaged_adapter_is_refused(adapted):
    """Without some of its weights, with weights of other layers, and with a config that names no base."""
    beside, alone, _, _ = adapted
    for path in (beside, alone):
        file, cfg = path / "adapter_model.safetensors", BackboneConfig(path=str(path))
        whole = load_file(file)
        save_file({k: v for k, v in whole.items() if "layers.1" not in k}, file)
        refused("weights are missing or of another shape: .*layers.1.*lora_A.weight", lambda cfg=cfg: load_model(cfg))
        save_file({k.replace("layers", "blocks"): v for k, v in whole.items()}, file)
        refused("weights are missing or of another shape: .*lora_A.weight", lambda cfg=cfg: load_model(cfg))
        save_file(whole, file)
    for content in ("[1]", "{}", '{"base_model_name_or_path": null}', "{"):
        (alone / "adapter_config.json").write_text(content)
        refused("adapter_config.json (does not name|cannot be read)", lambda: load_shape(BackboneConfig(str(alone))))


def test_an_adapter_without_peft_is_refused(adapted, monkeypatch):
    beside, alone, _, _ = adapted
    find = adapters.importlib.util.find_spec
    monkeypatch.setattr(
        adapters.importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    for path in (beside, alone):
        for call in (load_shape, load_model, load_tokenizer):
            cfg = BackboneConfig(path=str(path))
            refused(r"holds a PEFT adapter .* pip install -e '\.\[peft\]'", lambda call=call, cfg=cfg: call(cfg))


def test_adapters_that_would_be_lost_are_refused(adapted):
    """An adapter on a base that has one itself (Transformers loads that base without it); weights without a config."""
    beside, alone, base, _ = adapted
    content = json.loads((alone / "adapter_config.json").read_text())
    cfg = BackboneConfig(path=str(alone))

    def with_base(path, **more):
        about = content | {"base_model_name_or_path": str(path)} | more
        (alone / "adapter_config.json").write_text(json.dumps(about))

    for path, words in (
        (beside, "has an adapter itself"),
        (alone, "is the adapter itself"),
        (alone / "missing", "its base model .*missing .* does not exist"),
        ("./missing", "its base model ./missing .* does not exist"),
    ):
        with_base(path)
        for call in (load_shape, load_model, load_tokenizer):
            refused(words, lambda call=call: call(cfg))
    for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"):
        with_base(base, peft_type=kind)
        refused(f"of kind {kind}, which is no change of weights", lambda: load_shape(cfg))
    (beside / "adapter_config.json").unlink()
    refused("holds the weights of a PEFT adapter .* without", lambda: load_shape(BackboneConfig(path=str(beside))))


def test_an_adapter_for_resized_embeddings_is_one_line(folder, tmp_path):
    base = T.AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(330)
    config = peft.LoraConfig(r=4, target_modules=["query_key_value"], modules_to_save=["embed_in"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "alone")
    cfg = BackboneConfig(path=str(tmp_path / "alone"))
    refused("of other shapes than the model's .* merge it into its base", lambda: load_model(cfg))


def test_an_adapter_of_the_hub(adapted, tmp_path, monkeypatch):
    """Regression: an adapter was looked for in local folders only, so without PEFT the base was read."""
    beside = adapted[0]
    snapshot = tmp_path / "hub/models--some--adapter/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(beside, snapshot)
    refs = tmp_path / "hub/models--some--adapter/refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapters._on_the_hub.cache_clear()
    assert adapters.adapter_of("some/adapter") == snapshot / "adapter_config.json"
    assert load_shape(BackboneConfig(path="some/adapter"))[0] == 32
    find = adapters.importlib.util.find_spec
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda n, *a: None if n == "peft" else find(n, *a))
    refused("some/adapter: holds a PEFT adapter", lambda: load_shape(BackboneConfig(path="some/adapter")))

"""Backbones of known shapes with random weights, and random tokens for them: speed depends on shapes alone."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from bottleneck.config.checks import RANK_LADDER
from bottleneck.core.errors import check
from bottleneck.core.paths import ROOT
from bottleneck.data.cache import FORMAT, tokenizer_hash


class Shape(NamedTuple):
    """A model's family and size. kv_heads, head_size, mlp: if not equal to heads, hidden / heads and 4 · hidden."""

    family: str  # Transformers' model_type
    hidden: int
    layers: int
    heads: int
    vocab: int = 50_304
    kv_heads: int | None = None
    head_size: int | None = None
    mlp: int | None = None


# Pythia (Biderman et al. 2023), OPT-30b (Zhang et al. 2022) as a GPT-NeoX, and the small models of 2024 and 2025.
SHAPES = {
    "pythia-70m": Shape("gpt_neox", 512, 6, 8),
    "pythia-160m": Shape("gpt_neox", 768, 12, 12),
    "pythia-410m": Shape("gpt_neox", 1024, 24, 16),
    "pythia-1b": Shape("gpt_neox", 2048, 16, 8),
    "neox-30b": Shape("gpt_neox", 7168, 48, 56),
    "llama-3.2-1b": Shape("llama", 2048, 16, 32, 128_256, kv_heads=8, head_size=64, mlp=8192),
    "qwen3-0.6b": Shape("qwen3", 1024, 28, 16, 151_936, kv_heads=8, head_size=128, mlp=3072),
    "gemma-3-1b": Shape("gemma3_text", 1152, 26, 4, 262_144, kv_heads=1, head_size=256, mlp=6912),
    "smollm2-360m": Shape("llama", 960, 32, 15, 49_152, kv_heads=5, head_size=64, mlp=2560),
    "olmo-2-1b": Shape("olmo2", 2048, 16, 16, 100_352, kv_heads=16, mlp=8192),
    "tiny": Shape("gpt_neox", 256, 4, 4),  # the embedded backbone's shape, to try a benchmark
}
CONTEXT = 2_048


def shape(name: str) -> Shape:
    """Return a shape by name. Raises UserError for an unknown name."""
    check(name in SHAPES, f"--shape {name}: there is no such shape; allowed are {', '.join(SHAPES)}")
    return SHAPES[name]


def ranks(name: str) -> list[int]:
    """Return the ranks of `ranks=auto`: up to and including the hidden size."""
    d = shape(name).hidden
    return [r for r in RANK_LADDER if r < d] + [d]


def _config(name: str) -> PretrainedConfig:
    s = shape(name)
    more: dict[str, Any] = {}
    if s.family != "gpt_neox":
        more = {"num_key_value_heads": s.kv_heads or s.heads, "pad_token_id": None}
        more |= {"head_dim": s.head_size} if s.head_size else {}
    return AutoConfig.for_model(
        s.family,
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        intermediate_size=s.mlp or 4 * s.hidden,
        max_position_embeddings=CONTEXT,
        vocab_size=s.vocab,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        **more,
    )


def random_backbone(name: str, device: str, layers: int | None = None) -> Any:
    """Return a model of that shape with random weights, bfloat16 on a GPU. Args: layers: default: all."""
    config = _config(name)
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def backbone_folder(name: str, folder: Path) -> Path:
    """Write that shape as a folder for `backbone.weights=random`; the embedded tokenizer stands in."""
    _config(name).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def weights_folder(name: str, folder: Path, device: str) -> Path:
    """Write that shape as a folder with random weights; the embedded tokenizer stands in."""
    random_backbone(name, device).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write the embedded tokenizer into a folder."""
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "data/backbones/tiny")


def tokens_folder(folder: Path, tokens: int, vocab: int, validation: int = 5_000) -> Path:
    """Write prepared tokens drawn from Zipf's law over the vocabulary, as `data.prepared` reads them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, vocab + 1)
    cumulative = np.cumsum(p / p.sum())
    dtype = np.dtype(np.uint16 if vocab <= 1 << 16 else np.int32)
    manifest: dict[str, Any] = {"format": FORMAT, "name": "zipf", "dtype": dtype.name, "eos": 0}
    manifest["tokenizer"] = tokenizer_hash(_tokenizer())
    for part, count in (("train", tokens + 1), ("validation", validation + 1)):
        ids = np.minimum(np.searchsorted(cumulative, rng.random(count)), vocab - 1).astype(dtype)
        ids.tofile(folder / f"{part}.bin")
        manifest[part] = {"tokens": count, "documents": 1, "bytes": 4 * count, "crc32": zlib.crc32(ids.tobytes())}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder

"""Backbones of known shapes with random weights, and random tokens for them: speed depends on shapes, not on what was learned."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from bottleneck.config.checks import RANK_LADDER
from bottleneck.core.errors import check
from bottleneck.core.paths import ROOT
from bottleneck.data.cache import FORMAT, tokenizer_hash

# hidden size, layers, attention heads of the Pythia models (Biderman et al. 2023), and of OPT-30b (Zhang et al. 2022) in the same
# family: 30.3 billion parameters; all have V = 50,304 and 2,048 tokens of context
SHAPES = {
    "pythia-70m": (512, 6, 8),
    "pythia-160m": (768, 12, 12),
    "pythia-410m": (1024, 24, 16),
    "pythia-1b": (2048, 16, 8),
    "neox-30b": (7168, 48, 56),
    "tiny": (256, 4, 4),  # the embedded backbone's, to try a benchmark
}
VOCAB, CONTEXT = 50_304, 2_048


def shape(name: str) -> tuple[int, int, int]:
    """Hidden size, layers, attention heads. Raises UserError for an unknown name."""
    check(name in SHAPES, f"--shape {name}: there is no such shape; allowed are {', '.join(SHAPES)}")
    return SHAPES[name]


def ranks(name: str) -> list[int]:
    """The ranks of `ranks=auto`: up to and including the hidden size."""
    d = shape(name)[0]
    return [r for r in RANK_LADDER if r < d] + [d]


def _config(name: str) -> GPTNeoXConfig:
    d, layers, heads = shape(name)
    return GPTNeoXConfig(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * d,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )


def random_backbone(name: str, device: str) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of that shape, bfloat16 on a GPU."""
    torch.manual_seed(0)
    with torch.device(device):
        return GPTNeoXForCausalLM(_config(name)).to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def backbone_folder(name: str, folder: Path) -> Path:
    """That shape as a folder for `backbone.weights=random`; the embedded backbone's tokenizer stands in, since no text is read."""
    _config(name).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/backbones/tiny")


def tokens_folder(folder: Path, tokens: int, validation: int = 5_000) -> Path:
    """Prepared tokens drawn from Zipf's law over the vocabulary, as `data.prepared` reads them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, VOCAB + 1)
    cumulative = np.cumsum(p / p.sum())
    manifest = {
        "format": FORMAT,
        "name": "zipf",
        "dtype": "uint16",
        "eos": 0,
        "tokenizer": tokenizer_hash(_tokenizer()),
    }
    for part, count in (("train", tokens + 1), ("validation", validation + 1)):
        ids = np.minimum(np.searchsorted(cumulative, rng.random(count)), VOCAB - 1).astype(np.uint16)
        ids.tofile(folder / f"{part}.bin")
        manifest[part] = {"tokens": count, "documents": 1, "bytes": 4 * count, "crc32": zlib.crc32(ids.tobytes())}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder

"""A truncated head as the files of a draft: its matrices, and vLLM's maps between its rows and the vocabulary.

vLLM's EAGLE-3 drafts read `d2t` [K], int64: the token of row i is i + d2t[i]; `t2d` [V], bool, says which tokens have a
row, and `config.json` has `draft_vocab_size` (vllm/model_executor/models/llama_eagle3.py). Tokens without a row have
probability 0 there; in training they share one part in a million.

Dims: D hidden size, R rank, K kept rows, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bottleneck.heads.vocabulary import draft_to_target
from bottleneck.serve.folder import write_json

KINDS = ("truncated", "low_rank_truncated")


def write_truncated(tensors: dict[str, Tensor], vocab_size: int, about: dict[str, Any], part: Path) -> None:
    """Write `model.safetensors` and `config.json` into a folder.

    Args:
        tensors: of the head's file: W [K, D], or A [K, R] and B [R, D], in the dtype to write; and tokens_K.
        about: provenance, for the config.
    """
    tokens_K = tensors["tokens_K"].long()
    names = {"W": "lm_head.weight", "A": "lm_head.up.weight", "B": "lm_head.down.weight"}
    has_row_V = torch.zeros(vocab_size, dtype=torch.bool)
    has_row_V[tokens_K] = True
    stored = {names[n]: t.contiguous() for n, t in tensors.items() if n in names}
    maps = {"d2t": draft_to_target(tokens_K), "t2d": has_row_V}
    save_file(stored | maps, part / "model.safetensors", metadata={"format": "pt"})
    shapes = {name: list(t.shape) for name, t in (stored | maps).items()}
    write_json(part / "config.json", {**about, "draft_vocab_size": len(tokens_K), "tensors": shapes})

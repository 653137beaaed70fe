"""Causal LMs of Transformers with a head of two matrices: logits = up(down(h)), at the cost of the rank.

`python -m bottleneck.export --form serve` copies this file into the folders it writes, where
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) finds it; it needs nothing but Transformers. There
is a class LowRank<Architecture> for every architecture of Transformers whose head is called lm_head.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

PREFIX = "LowRank"
DOWN, UP = "lm_head.down.weight", "lm_head.up.weight"
INDEX = "model.safetensors.index.json"


class LowRankHead(nn.Module):
    """Hidden states [..., D] to logits [..., V] through R numbers."""

    def __init__(self, hidden_size: int, rank: int, vocab_size: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, vocab_size, bias=False)

    @property
    def weight(self) -> Tensor:
        """Some families ask their head's weight for its dtype or device."""
        return self.up.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits."""
        weight = self.up.weight
        if weight.device.type == "cpu" and weight.is_contiguous() and min(weight.shape) > 1 and not self.training:
            # columns side by side: CPU libraries then compute a product with one vector two to three times as fast
            weight.data = weight.data.t().contiguous().t()
        return self.up(self.down(hidden))


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_folder(folder: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None) -> None:
    """Raise ValueError, in one line, if a folder lacks a file, has a head of another shape, or another tokenizer.

    Args: tokenizer: folder of the tokenizer, if it is not the same.
    """
    folder = os.fspath(folder)
    config = json.loads(_read(folder, "config.json"))
    where = json.loads(_read(folder, INDEX))["weight_map"]
    for name in sorted(set(where.values())):
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{folder}: {name} is missing, which {INDEX} lists")
    rank, (rows, width) = config["head_rank"], config["head_shape"]
    for name, shape in ((DOWN, [rank, width]), (UP, [rows, rank])):
        if name not in where:
            raise ValueError(f"{folder}: {INDEX} does not list {name}")
        with safe_open(os.path.join(folder, where[name]), "pt") as f:
            found = list(f.get_slice(name).get_shape()) if name in f.keys() else None
        if found != shape:
            raise ValueError(f"{folder}: {name} has shape {found}, config.json says {shape}")
    own = os.path.join(folder, "tokenizer.json")
    wanted = config.get("head_tokenizer")
    if not wanted or not os.path.isfile(own):
        return
    other = os.path.join(os.fspath(tokenizer or folder), "tokenizer.json")
    same = file_hash(own) == wanted and (not os.path.isfile(other) or _same_tokenizer(own, other))
    if not same:
        path = own if file_hash(own) != wanted else other
        raise ValueError(f"{folder}: {path} is not the tokenizer that the head was trained with")


def _same_tokenizer(one: str, other: str) -> bool:
    """Whether two files make the same tokens, however they are written; lengths of padding and cuts do not count."""
    if file_hash(one) == file_hash(other):
        return True
    read = [Tokenizer.from_file(path) for path in (one, other)]
    for each in read:
        each.no_padding()
        each.no_truncation()
    return bool(read[0].to_str() == read[1].to_str())


def _read(folder: str, name: str) -> str:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return f.read()
    except OSError as error:
        raise ValueError(f"{folder}: {name} cannot be read: {error.strerror}") from error


def _low_rank(architecture: str) -> type:
    base: Any = getattr(transformers, architecture)

    class LowRank(base):  # type: ignore[misc]  # the base is known at run time only
        _tied_weights_keys: dict[str, str] = {}  # as in Transformers' own classes

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            rows, width = config.head_shape
            self.lm_head = LowRankHead(width, config.head_rank, rows)

        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
            """As Transformers', with a folder that is not complete refused."""
            if os.path.isdir(path):
                check_folder(path)
            report = kwargs.pop("output_loading_info", False)
            model, found = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
            absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
            if absent:
                raise ValueError(f"{path}: weights are missing or of another shape: {', '.join(absent[:5])}")
            return (model, found) if report else model

    LowRank.__name__ = LowRank.__qualname__ = PREFIX + architecture
    return LowRank


def __getattr__(name: str) -> Any:
    architecture = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or not hasattr(transformers, architecture):
        raise AttributeError(name)
    globals()[name] = _low_rank(architecture)
    return globals()[name]

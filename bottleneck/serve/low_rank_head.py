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

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

PREFIX = "LowRank"
DOWN, UP = "lm_head.down.weight", "lm_head.up.weight"
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# Without this file's code Transformers would load the architecture's own class, with a random head and a warning. A
# weight of the original head's name that fits no head makes it refuse; the other name in its report says what to do.
REFUSED = ("lm_head.weight", "lm_head.needs_trust_remote_code")


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
    """Raise ValueError, in one line, if a folder lacks a file, has a damaged one, another head, or another tokenizer.

    Args: tokenizer: folder of the tokenizer, if it is not the same.
    """
    folder = os.fspath(folder)
    config = _read(folder, "config.json")
    rank, rows, width = _shape(folder, config)
    if os.path.isfile(os.path.join(folder, WHOLE)) and not os.path.isfile(os.path.join(folder, INDEX)):
        listing = WHOLE
        where: Any = dict.fromkeys(_shapes(folder, WHOLE), WHOLE)
    else:
        listing, where = INDEX, _read(folder, INDEX).get("weight_map")
    if not isinstance(where, dict) or not {DOWN, UP} <= where.keys():
        raise ValueError(f"{folder}: {listing} does not list {DOWN} and {UP}")
    found: dict[str, list[int]] = {}
    for name in sorted(set(where.values())):
        found |= _shapes(folder, name)
    absent = next((name for name in where if name not in found), None)
    if absent is not None:
        raise ValueError(f"{folder}: {where[absent]} lacks {absent}, which {INDEX} lists there")
    for name, shape in ((DOWN, [rank, width]), (UP, [rows, rank])):
        if found[name] != shape:
            raise ValueError(f"{folder}: {name} has shape {found[name]}, config.json says {shape}")
    wanted = config.get("head_tokenizer")
    if wanted:
        _check_tokenizer(folder, os.fspath(tokenizer or folder), wanted)


def _shape(folder: str, config: dict[str, Any]) -> tuple[int, int, int]:
    """Rank, rows and width of the head that a config describes."""
    rank, shape = config.get("head_rank"), config.get("head_shape")
    numbers = [rank, *shape] if isinstance(shape, list) else []
    if len(numbers) != 3 or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ValueError(f"{folder}: config.json has head_rank {rank} and head_shape {shape}; need R and [V, D]")
    return numbers[0], numbers[1], numbers[2]


def _shapes(folder: str, name: str) -> dict[str, list[int]]:
    """Shapes of the tensors in a file, by name. Reads no more than its header."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise ValueError(f"{folder}: {name} is missing, which {INDEX} lists")
    try:
        with safe_open(path, "pt") as f:
            return {tensor: list(f.get_slice(tensor).get_shape()) for tensor in f.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: {name} is damaged or cut short: {error}") from error


def _check_tokenizer(folder: str, other: str, wanted: str) -> None:
    own, theirs = (os.path.join(place, "tokenizer.json") for place in (folder, other))
    if not os.path.isfile(own):
        raise ValueError(f"{folder}: tokenizer.json is missing")
    if file_hash(own) != wanted:
        raise ValueError(f"{folder}: {own} is not the tokenizer that the head was trained with")
    if os.path.isfile(theirs) and not _same_tokenizer(own, theirs):
        raise ValueError(f"{folder}: {theirs} is not the tokenizer that the head was trained with")


def _same_tokenizer(one: str, other: str) -> bool:
    """Whether two files make the same tokens, however they are written; lengths of padding and cuts do not count."""
    if file_hash(one) == file_hash(other):
        return True
    read = [Tokenizer.from_file(path) for path in (one, other)]
    for each in read:
        each.no_padding()
        each.no_truncation()
    return bool(read[0].to_str() == read[1].to_str())


def _read(folder: str, name: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            content = json.load(f)
    except OSError as error:
        raise ValueError(f"{folder}: {name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder}: {name} is not a JSON object")
    return content


def _low_rank(architecture: str) -> type:
    base: Any = getattr(transformers, architecture)

    class LowRank(base):  # type: ignore[misc]  # the base is known at run time only
        _tied_weights_keys: dict[str, str] = {}  # as in Transformers' own classes
        _keys_to_ignore_on_load_unexpected = [*(base._keys_to_ignore_on_load_unexpected or ()), *REFUSED]

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            rows, width = config.head_shape
            self.lm_head = LowRankHead(width, config.head_rank, rows)

        @classmethod
        def is_custom_code(cls) -> bool:
            """All is initialised as in Transformers' own classes: else Falcon-H1's buffers stay without values."""
            return False

        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
            """As Transformers', with a folder that is not complete refused."""
            if os.path.isdir(path):
                check_folder(path)
            report = kwargs.pop("output_loading_info", False)
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # both are refused below, by name
            model, found = super().from_pretrained(path, *args, **kwargs)
            other = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
            absent = sorted([*found["missing_keys"], *other])
            if absent:
                raise ValueError(f"{path}: weights are missing or of another shape: {', '.join(absent[:5])}")
            return (model, found) if report else model

        def save_pretrained(self, path: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
            """As Transformers'. The tokenizer's identity is kept only if the tokenizer is already there."""
            state = dict(self.state_dict() if state_dict is None else state_dict)
            state |= {name: torch.zeros(1) for name in REFUSED}
            tokenizer = getattr(self.config, "head_tokenizer", None)
            try:
                if not os.path.isfile(os.path.join(path, "tokenizer.json")):
                    self.config.head_tokenizer = None
                return super().save_pretrained(path, *args, state_dict=state, **kwargs)
            finally:
                self.config.head_tokenizer = tokenizer

    LowRank.__name__ = LowRank.__qualname__ = PREFIX + architecture
    return LowRank


def __getattr__(name: str) -> Any:
    architecture = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or not hasattr(transformers, architecture):
        raise AttributeError(f"{name}: Transformers {transformers.__version__} has no {architecture}")
    globals()[name] = _low_rank(architecture)
    return globals()[name]

"""The target of a draft: another frozen model over the same vocabulary, run beside the backbone on the same tokens.

Its hidden states may have another width, so they are kept apart from the backbone's. Its head may have more or fewer
rows: families pad the vocabulary to a multiple of their own. Rows beyond the tokenizer's entries belong to no token.

Dims: N sequences, T sequence length, n tokens of a chunk, D hidden size of the target, V vocabulary of the draft.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bottleneck.backbone.load import label, looks_local
from bottleneck.backbone.model import Backbone
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError, check

ABSENT = -1e4  # logit of a row that the target does not have: its probability is 0, its logarithm still finite


def target_config(path: str, dtype: Any, named: Optional[str] = None) -> BackboneConfig:
    """The config of a target from a Hub name, a folder or a .gguf file.

    Args:
        dtype: as `backbone.dtype`.
        named: the option that names it, for messages; default: `head.teacher`.
    Raises: UserError where a file or folder is not there, or holds no config.json. Reads no file.
    """
    named, file = named or f"head.teacher=model:{path}", Path(path).expanduser()
    if path.endswith(".gguf"):
        check(file.is_file(), f"{named}: no such file")
        return BackboneConfig(path=str(file.parent), gguf_file=file.name, dtype=dtype)
    allowed = "give a Hub name, a model's folder or a .gguf file"
    check(bool(path.strip()), f"{named}: is empty; {allowed}")
    check(not file.is_file(), f"{named}: is a file; {allowed}")
    if file.is_dir():
        there = any((file / name).is_file() for name in ("config.json", "adapter_config.json"))
        check(there, f"{named}: no config.json there; {allowed}")
    else:
        check(not looks_local(path), f"{named}: no such folder")
    return BackboneConfig(path=str(file) if path.startswith("~") else path, dtype=dtype)


class Target(nn.Module):
    """Hidden states and logits of a target; frozen, always in eval mode, never in a checkpoint.

    Args: vocab_size: V, columns of the logits: the target's further rows are cut off, missing ones are `ABSENT`.

    Attributes:
        name: label in files.
        hash: identity of its weights, independent of the dtype they are loaded in.
    """

    def __init__(self, backbone: Backbone, vocab_size: int) -> None:
        super().__init__()
        self.backbone, self.vocab_size = backbone, vocab_size
        self.name, self.hash = backbone.name, backbone.hash

    @classmethod
    def load(
        cls,
        cfg: BackboneConfig,
        vocab_size: int,
        device: Union[torch.device, str] = "cpu",
        *,
        block_size: int,
        named: Optional[str] = None,
    ) -> Target:
        """Load the weights. Raises UserError as `Backbone.load`, in the words of `in_its_words`."""
        try:
            return cls(Backbone.load(cfg, device, block_size=block_size), vocab_size)
        except UserError as error:
            raise in_its_words(cfg, error, named) from error

    @torch.no_grad()
    def forward(self, ids_NT: Tensor) -> Tensor:
        """Token ids [N, T] to the target's hidden states [N, T, D]."""
        hidden: Tensor = self.backbone(ids_NT)
        return hidden

    @torch.no_grad()
    def float_logits(self, h_nD: Tensor) -> Tensor:
        """The target's hidden states [n, D] to float32 logits [n, V]."""
        logits = self.backbone.head.float_logits(h_nD)[:, : self.vocab_size]
        return pad(logits, (0, self.vocab_size - logits.shape[1]), value=ABSENT)


def in_its_words(cfg: BackboneConfig, error: UserError, named: Optional[str] = None) -> UserError:
    """An error about a backbone as one about the target. Args: named: as in `target_config`."""
    said, name = str(error), named or f"head.teacher=model:{label(cfg)}"
    if cfg.path in name:
        said = said.removeprefix(f"backbone.path={cfg.path}: ")
    return UserError(f"{name}: {said.replace('backbone.path', 'its path')}")

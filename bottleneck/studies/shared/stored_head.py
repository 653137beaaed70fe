"""Read a backbone's head from its safetensors files, without the rest of the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from bottleneck.backbone.adapters import adapter_of
from bottleneck.backbone.load import check_no_export
from bottleneck.backbone.model import load_config, load_shape
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError, check
from bottleneck.studies.shared.series import Checkpoint, Shapes, check_shape

# names of heads in checkpoints, and of the embeddings that serve as the head of tied models
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass
class Head:
    """The head of a checkpoint, float32 on the CPU: W [V, D], and whether the embeddings are the same tensor."""

    W_VD: Tensor
    tied: bool


def is_tied(backbone: BackboneConfig) -> bool:
    """Whether the model's config ties head and embeddings. Raises: UserError if the config cannot be read."""
    return bool(getattr(load_config(backbone).get_text_config(), "tie_word_embeddings", False))


def stored_head(cp: Checkpoint, shapes: Shapes) -> Optional[Head]:
    """The head as stored in the safetensors files, in their precision; None if its tensor cannot be identified, or may
    be changed by an adapter.

    A model may be configured as tied and yet hold two different matrices; Transformers then reads the head's own.
    Raises: UserError for another shape than its model's first checkpoint, unreadable files, and NaN.
    """
    check_no_export(cp.backbone)
    width, _, vocabulary = load_shape(cp.backbone)
    check_shape(cp, shapes[cp.model], (width, vocabulary))
    if adapter_of(cp.backbone.path, cp.backbone.revision) is not None:  # which may change the head
        return None
    tied = is_tied(cp.backbone)
    own = _read(cp, HEADS, (vocabulary, width))
    embeddings = _read(cp, EMBEDDINGS if tied else (), (vocabulary, width))
    W = own if own is not None else embeddings
    if W is None:
        return None
    check_finite(cp, W)
    return Head(W, tied and (own is None or embeddings is None or torch.equal(own, embeddings)))


def check_finite(cp: Checkpoint, W_VD: Tensor) -> None:
    """Raise UserError for a head with NaN or infinity."""
    rows = (~torch.isfinite(W_VD).all(dim=1)).nonzero()[:1].flatten().tolist()
    check(not rows, f"{cp.where}: its head holds NaN or infinity, first in row {rows[0] if rows else ''}")


def weight_files(backbone: BackboneConfig) -> list[Path]:
    """Its safetensors files, of a folder or of the Hub's cache; none if it has only other formats."""
    if backbone.gguf_file:
        return []
    index = _find(backbone, "model.safetensors.index.json")
    if index is None:
        single = _find(backbone, "model.safetensors")
        return [single] if single else []
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [path for path in (_find(backbone, name) for name in names) if path]


def _find(backbone: BackboneConfig, name: str) -> Optional[Path]:
    try:
        path = cached_file(
            backbone.path,
            name,
            revision=backbone.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:
        return None
    return Path(path) if path else None


def _read(cp: Checkpoint, names: tuple[str, ...], shape: tuple[int, int]) -> Optional[Tensor]:
    """The one stored tensor of such a name and shape, float32; None if there is none or several."""
    try:
        hits = []
        for file in weight_files(cp.backbone) if names else []:
            with safe_open(file, "pt") as f:
                named = [k for k in f.keys() if k.endswith(names)]
                hits += [(file, k) for k in named if tuple(f.get_slice(k).get_shape()) == shape]
        if len(hits) != 1:
            return None
        with safe_open(hits[0][0], "pt") as f:
            return f.get_tensor(hits[0][1]).float()
    except SafetensorError as error:
        raise UserError(f"{cp.where}: its weights cannot be read: {error}") from error

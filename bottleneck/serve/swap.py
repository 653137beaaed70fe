"""Put another head on a Transformers model, so that its logits are h Wᵀ, also after saving and loading.

Dims: D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from bottleneck.backbone import proof
from bottleneck.backbone.head import UnknownHeadError
from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import UserError, check

log = logging.getLogger(__name__)
SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)  # families' keys for a factor of the logits
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
NO_CAP = 2.0**20  # c · tanh(x / c) is x to 1e-9 for every logit: for families whose config must have a cap


@torch.no_grad()
def set_head(model: Any, W_VD: Tensor) -> float:
    """Make the logits of `model` h Wᵀ. Its original head is lost; the input embeddings stay.

    If no config key can set the scale of the logits to 1, W is divided by it. `prove` checks the result.

    Args: W_VD: rows that the family cuts off the logits are left out.
    Returns: the divisor of W.
    Raises: UserError as `replace_head`, or if the family does something unknown to its logits.
    """
    replace_head(model, W_VD)
    scale = _scale(model, model.config.model_type)
    model.get_output_embeddings().weight.div_(scale)
    return scale


@torch.no_grad()
def replace_head(model: Any, W_VD: Tensor) -> None:
    """Replace the head's weight by W and disable the config's other changes to the logits; nothing is run.

    The head is untied from the embeddings and its bias becomes zero. A soft cap (Gemma 2) is removed and a scale
    (Cohere, Granite) set to 1, both in the config, so that the saved model has them too, and in modules with copies.

    Raises: UserError if the dtype cannot hold W, or the family cannot have a head of its own.
    """
    lm_head, family = model.get_output_embeddings(), model.config.model_type
    check(isinstance(getattr(lm_head, "weight", None), Tensor), f"head: family {family} has no linear LM head")
    W = W_VD.to(device=lm_head.weight.device, dtype=lm_head.weight.dtype)
    check(
        bool(W.isfinite().all()),
        f"head: has values that {str(W.dtype).removeprefix('torch.')} cannot hold; use a wider dtype",
    )
    padded = W.new_zeros(lm_head.weight.shape)
    padded[: len(W)] = W
    lm_head.weight = nn.Parameter(padded, requires_grad=False)  # a new parameter: the old one may be the embeddings'
    if getattr(lm_head, "bias", None) is not None:
        lm_head.bias.zero_()
    for config in configs_of(model):
        _set(config, "tie_word_embeddings", False)
    for holder in [*model.modules(), *configs_of(model)]:
        for name in SCALES:
            if isinstance(getattr(holder, name, None), (int, float)):
                _set(holder, name, 1.0)
        for name in _caps(holder):
            if not _set(holder, name, None):
                _set(holder, name, NO_CAP)
    with contextlib.suppress(AttributeError):
        model.tie_weights()  # updates the model's own record of what is tied
    kept = torch.equal(model.get_output_embeddings().weight[: len(W)], W)
    check(
        kept,
        f"head: family {family} ties its head to its embeddings whatever its config says; it cannot have another head",
    )


def _scale(model: Any, family: str) -> float:
    """The remaining factor of h Wᵀ; 1 if there is a cap, which `prove` refuses."""
    try:
        left = proof.take_apart(model.eval()).map
    except UnknownHeadError as error:
        raise UserError(f"head: family {family} is not supported: {error}") from error
    return left.scale if left.softcap is None or left.softcap >= NO_CAP else 1.0


def configs_of(model: Any) -> list[Any]:
    """A model's config, and the one of its text part if that is another."""
    text = model.config.get_text_config()
    return [model.config] if text is model.config else [model.config, text]


def _caps(holder: Any) -> Iterator[str]:
    """Names under which a config or module keeps a soft cap of its logits (not those of attention or router scores)."""
    for name in CAPS:
        if isinstance(getattr(holder, name, None), (int, float)):
            yield name


def _set(holder: Any, name: str, value: Any) -> bool:
    """Whether an attribute could be set: configs check types, and some attributes are properties."""
    try:
        setattr(holder, name, value)
    except Exception:  # huggingface_hub's dataclasses raise their own kinds
        return False
    return getattr(holder, name) == value


def prove(model: Any, name: str) -> Backbone:
    """The model of `set_head` as a `Backbone` whose logits are h Wᵀ. Raises UserError if they are not."""
    backbone = Backbone(model, name)
    head = backbone.head
    no_bias = head.bias_V is None or not head.bias_V.any()
    no_cap = head.softcap is None or head.softcap >= NO_CAP
    check(
        no_bias and no_cap,
        f"backbone {name}: family {backbone.family} keeps a bias or cap on its logits, which a trained head has not",
    )
    return backbone

"""Check, when a backbone is loaded, that its hidden states and head give its logits, and what they depend on.

Both checks run the model as training does: in its dtype, on its device, without a cache or a mask.
Dims: N sequences, T sequence length, D hidden size, V vocabulary of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor, nn

from bottleneck.backbone.head import FullHead, HeadMap, find_head, head_input, measure, numbers_of, snapped
from bottleneck.backbone.weights import body_of

PROBE = (2, 16)  # sequences and tokens of the probe of logits
# Largest error of logits relative to the largest logit: both sides run the same product in the same dtype, so they
# differ by the order of summation, and in 16 bits by the rounding of a cap
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
LOGIT_TOLERANCE_16 = 8e-3
# Largest movement of an earlier hidden state relative to its length
MOVE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
MOVE_TOLERANCE_16 = 2e-2


def probe_ids(tokens: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Random token ids, the same in every process and run."""
    return torch.randint(0, tokens, shape, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass
class Parts:
    """A causal LM taken apart.

    Attributes:
        linear, map: its head, and how logits follow from the head's product.
        body: computes the head's input: the base model if its output is that input, else the whole model, stopped at
            its head (BERT-like decoders have a transform between the two).
        hidden [N, T, D], logits [N, T, V]: the head's input and the logits of the probe.
    """

    linear: nn.Module
    map: HeadMap
    body: nn.Module
    hidden: Tensor
    logits: Tensor


@torch.no_grad()
def take_apart(model: Any) -> Parts:
    """Find and measure the head of a causal LM, on a probe of 2 × 16 random tokens.

    Raises: UnknownHeadError if it has no linear head, or does something unknown to its product. If the model does not
        run on token ids alone, the model's own error.
    """
    ids = probe_ids(id_bound(model), PROBE, _device(model))

    def run() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    linear, hidden, logits = find_head(model, run)
    found = measure(run, linear, model.config)
    body = body_of(model)
    alone = None if body is model else _last_hidden(body, ids)
    if alone is not None and alone.shape == hidden.shape:
        alone = alone.to(hidden.dtype)
        if relative_error(alone, hidden) < 1e-6:
            return Parts(linear, found, body, alone, logits)
        # a family may divide its hidden states by a number, which is equivalent to a scale of the logits (MiniCPM)
        factor = float((alone.double() * hidden.double()).sum() / alone.double().square().sum().clamp(min=1e-30))
        near = 1e-5 if hidden.dtype == torch.float32 else 4e-3
        if found.of(linear).bias_V is None and factor and relative_error(alone * factor, hidden) < 2 * near:
            found.scale = snapped(factor * found.scale, numbers_of(model.config), near)
            return Parts(linear, found, body, alone, logits)
    return Parts(linear, found, model, hidden, logits)


def _last_hidden(body: nn.Module, ids_NT: Tensor) -> Optional[Tensor]:
    try:
        return body(input_ids=ids_NT, use_cache=False).last_hidden_state
    except (AttributeError, TypeError, ValueError):
        return None


def _device(model: Any) -> torch.device:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return weight.device if isinstance(weight, Tensor) else next(model.parameters()).device


def id_bound(model: Any) -> int:
    """Ids of the probe are below this: rows of the embeddings, or of the head if it has fewer."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # ZeRO-3 hides the weight of the embedding
    rows = getattr(embedding, "num_embeddings", None) or len(embedding.weight)
    weight = getattr(head, "weight", None)
    return min(rows, len(weight)) if isinstance(weight, Tensor) and weight.ndim == 2 else rows


def through(model: Any, linear: nn.Module, ids_NT: Tensor, **arguments: Tensor) -> Tensor:
    """The head's input from the whole model's forward pass, which ends there."""
    return head_input(lambda: model(input_ids=ids_NT, use_cache=False, **arguments), linear)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest number; NaN if either holds one."""
    got, wanted = got.float(), wanted.float()
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


def parity(head: FullHead, hidden: Tensor, logits: Tensor) -> Optional[str]:
    """None if hidden states × head are the logits; else what is wrong."""
    try:
        got = head.logits(hidden)
    except RuntimeError as fault:  # a head of several matrices, such as an exported one; a sharded weight has no shape
        if "cannot be multiplied" not in str(fault):
            raise
        return f"its head's weight does not fit hidden states of {hidden.shape[-1]} values"
    if got.shape != logits.shape:
        return f"shapes {list(got.shape)} and {list(logits.shape)}"
    # some families cap in float32 and some in the weights' dtype: either is the same head
    wide = head.float_logits(hidden.flatten(0, 1)).view(logits.shape)
    error = min(relative_error(got, logits), relative_error(wide, logits))
    return None if error < LOGIT_TOLERANCE.get(head.W_VD.dtype, LOGIT_TOLERANCE_16) else f"relative error {error:.2g}"


@dataclass
class Dependence:
    """How far hidden states move, relative to their length, for reasons that must not move them; None: not at all.

    Attributes:
        later: of earlier tokens when later tokens of their sequence change.
        others: of a sequence that stays as it is, in another pass or beside other sequences.
    """

    later: Optional[float] = None
    others: Optional[float] = None


@torch.no_grad()
def dependence(
    run: Callable[[Tensor], Tensor], tokens: int, block: int, device: torch.device, marks: Sequence[int] = ()
) -> Dependence:
    """What hidden states depend on besides the tokens before them.

    Three sequences of `block` tokens are read, and read twice more with later tokens of the first two replaced: in the
    middle of the block and at an odd position beyond it; then all but the first token, and the last token only, which
    reveals a model that looks ahead within a prefix or within chunks. The new tokens are random ones, random ones with
    marks at the end, and one repeated token, like the end of a run's padded last block. The third sequence stays as it
    is. If it moves a little (a mixture of experts sums another batch in another order), that is rounding, with which
    the other movements are compared; if most of it moves far, the model is random, keeps state, or mixes sequences.

    Args:
        run: ids [3, block] to hidden states [3, block, D]. It is called equally often whatever it returns, because
            sharded models must run in step.
        tokens: ids are below this.
        marks: ids that a family may treat in a way of their own: end of text and padding.
    """
    if block < 2 or tokens < 2:
        return Dependence()
    first = probe_ids(tokens, (3, block), device)
    before = run(first)
    tolerance = MOVE_TOLERANCE.get(before.dtype, MOVE_TOLERANCE_16)
    inside: list[Optional[int]] = [m for m in dict.fromkeys(marks) if 0 <= m < tokens] or [None]
    found = Dependence()
    for number, cuts in enumerate(((block // 2, min(block - 1, 5 * block // 8 | 1)), (1, block - 1))):
        after = run(_changed(first, cuts, tokens, inside[number % len(inside)]))
        moved = torch.cat([_movement(after[i, :cut], before[i, :cut]) for i, cut in enumerate(cuts)])
        noise = _movement(after[2], before[2])
        if float(noise.median()) > tolerance:
            found.others = max(found.others or 0, float(noise.max()))
        elif bool(moved.any()):
            found.later = found.later or _beyond_rounding(moved, noise, tolerance)
    return found


def _changed(first: Tensor, cuts: tuple[int, int], tokens: int, mark: Optional[int]) -> Tensor:
    """Ids [3, block] with the tokens of the first two sequences from `cuts` on changed.

    They become other random tokens that end in `mark`, and one token repeated.
    """
    out = first.clone()
    tail = out[0, cuts[0] :]
    out[0, cuts[0] :] = (tail + 1 + probe_ids(tokens - 1, (1, len(tail)), first.device)[0]) % tokens
    if mark is not None:
        out[0, cuts[0] + (len(tail) + 1) // 2 :] = mark
    other = out[1, 0]
    out[1, cuts[1] :] = (other + 1) % tokens if bool((out[1, cuts[1] :] == other).all()) else other
    return out


def _beyond_rounding(moved: Tensor, noise: Tensor, tolerance: float) -> Optional[float]:
    """The largest movement, where rounding does not explain the movements."""
    worst = float(moved.max())
    if float(noise.max()) > 0:
        return worst if float(moved.mean()) > 4 * float(noise.mean()) + tolerance / 10 else None
    # no rounding to blame: a leak moves far, or moves many positions
    many = float((moved > tolerance / 100).float().mean()) > 0.25
    return worst if many or worst > tolerance else None


def _movement(now: Tensor, before: Tensor) -> Tensor:
    """Length of the difference of hidden states [T, D], relative to that length: [T] float32; NaN counts as 1."""
    now, before = now.float(), before.float()
    moved = (now - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)
    return moved.nan_to_num(nan=1.0, posinf=1.0)

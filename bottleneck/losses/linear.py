"""The one entry to the losses: `linear_cross_entropy(h, A, B, y, impl=…)`, and `step`, which a bank of heads calls.

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from bottleneck.core.extensions import LOSSES
from bottleneck.losses import memory as loss_memory
from bottleneck.losses.choice import choose, loss_names, usable
from bottleneck.losses.impls.reference import reference
from bottleneck.losses.products import add_product


class Weights(NamedTuple):
    """A head in the form that the products read: A [V, R'] and B [R', D] in the dtype of the hidden states.

    R' is the rank, padded with zeros where the implementation asks for it.
    """

    A: Tensor
    B: Tensor
    rank: int
    impl: str  # a name in LOSSES
    memory: int  # bytes that a step may take on a GPU


def weights(A_VR: Tensor, B_RD: Tensor, dtype: torch.dtype, impl: str, memory: Optional[int] = None) -> Weights:
    """Cast and pad a head for `step`; copies only where the dtype or the padding asks for it.

    Args: memory: see `losses.memory`; default: what auto wants on the device.
    """
    A, B = A_VR.detach().to(dtype), B_RD.detach().to(dtype)
    rank = A.shape[1]
    extra = LOSSES[impl].padded_rank(rank) - rank
    if extra:
        A, B = torch.nn.functional.pad(A, (0, extra)), torch.nn.functional.pad(B, (0, 0, 0, extra))
    memory = loss_memory.of_card(A.device) if memory is None else memory
    return Weights(A.contiguous(), B.contiguous(), rank, impl, memory)


def targets(y_N: Tensor, ignore_index: int = -100, vocab: Optional[int] = None) -> Tensor:
    """Targets in the form that `step` reads: int32, -1 for ignored tokens.

    Args: vocab: give it where targets may be wrong: those become `vocab`, which every implementation reports.
    """
    ignored = y_N == ignore_index
    if vocab is not None:
        y_N = y_N.masked_fill((y_N < 0) | (y_N >= vocab), vocab)
    return y_N.masked_fill(ignored, -1).int()


def logit_step(
    z_NR: Tensor,
    A_VR: Tensor,
    y_N: Tensor,
    impl: str,
    dA_VR: Optional[Tensor] = None,
    scale: float = 1.0,
    memory: Optional[int] = None,
) -> tuple[Tensor, Optional[Tensor]]:
    """Return the loss [N] of the logits z Aᵀ and d loss / d z [N, R]; without dA the latter is None.

    scale · the gradient of A is added to dA. z and A have as many columns as `weights` gives them. With dA, z may be
    overwritten.
    """
    memory = loss_memory.of_card(z_NR.device) if memory is None else memory
    return LOSSES[impl].step(z_NR, A_VR, y_N, dA_VR, scale, memory)


def step(
    h_ND: Tensor,
    w: Weights,
    y_N: Tensor,
    dA_VR: Optional[Tensor] = None,
    dB_RD: Optional[Tensor] = None,
    scale: float = 1.0,
    dh_ND: Optional[Tensor] = None,
) -> Tensor:
    """Return the loss of every token under one head and add its gradient to dA, dB and dh, if given. No autograd.

    Args:
        y_N: from `targets`.
        dA_VR, dB_RD: float32, contiguous, both or none: += scale · gradient of the summed loss.
        dh_ND: float32, with the two others only: the same of the hidden states.
    Returns: loss [N] in nats, float32, 0 where a token does not count.
    """
    most = LOSSES[w.impl].most_tokens(w.A.shape[1])
    if len(h_ND) > most:
        parts = zip(h_ND.split(most), y_N.split(most), repeat(None) if dh_ND is None else dh_ND.split(most))
        return torch.cat([step(h, w, y, dA_VR, dB_RD, scale, dh) for h, y, dh in parts])
    loss_N, dz_NR = logit_step(h_ND @ w.B.T, w.A, y_N, w.impl, dA_VR, scale=scale, memory=w.memory)
    if dB_RD is not None and dz_NR is not None:
        add_product(dB_RD, dz_NR[:, : w.rank].T, h_ND, scale)
    if dh_ND is not None and dz_NR is not None:
        add_product(dh_ND, dz_NR, w.B, scale)
    return loss_N


class LinearCrossEntropy(torch.autograd.Function):
    """Mean or summed loss whose gradients are computed in the forward pass, while logits are in memory.

    Gradients stay in float32 until they are multiplied by the incoming gradient and divided by the number of tokens, so
    they are rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, A_VR: Tensor, B_RD: Tensor, y_N: Tensor, impl: str, ignore_index: int, mean: bool
    ) -> Tensor:
        w, y = weights(A_VR, B_RD, h_ND.dtype, impl), targets(y_N, ignore_index, len(A_VR))
        count = (y >= 0).sum()
        need_h, need_A, need_B = ctx.needs_input_grad[:3]
        dh = dA = dB = None
        if need_h or need_A or need_B:
            dA, dB = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (A_VR, B_RD))
            dh = torch.zeros(h_ND.shape, dtype=torch.float32, device=h_ND.device) if need_h else None
            ctx.gradients = (dh, dA if need_A else None, dB if need_B else None)
            ctx.dtypes, ctx.count = [t.dtype for t in (h_ND, A_VR, B_RD)], count.clamp(min=1) if mean else None
        # summed in float64, so the value does not depend on how N was split into calls
        loss = step(h_ND, w, y, dA, dB, 1.0, dh).sum(dtype=torch.float64)
        return (loss / count if mean else loss).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: an earlier backward() has taken its gradients; compute the loss again"
            )
        factor = grad if ctx.count is None else grad / ctx.count
        # in place if the dtype stays: a gradient of A is as large as A, and nobody else uses it
        out = (
            None if g is None else torch.mul(g, factor, out=g if d == g.dtype else torch.empty_like(g, dtype=d))
            for g, d in zip(gradients, ctx.dtypes)
        )
        return *out, None, None, None, None


def linear_cross_entropy(
    h: Tensor,
    A: Tensor,
    B: Tensor,
    y: Tensor,
    impl: str = "auto",
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of next-token targets under the head `W = A B` (Godey et al. 2024, Sec. 5.1).

    Args:
        h: hidden states [..., D]; products run in its dtype.
        A: [V, R]; B: [R, D]; in float32 (cast to the dtype of `h` for the products) or the dtype of `h`.
        y: targets [...], the shape of `h` without its last dim; entries equal to `ignore_index` do not count. A target
            outside the vocabulary raises an error, or (fused) makes the loss NaN.
        impl: "reference" (logits in full), "chunked" (one chunk of logits at a time, any device), "fused" (Triton, no
            logits in memory at low ranks; a GPU), another declared one, or "auto": the fastest in the measured table,
            see `choice.choose`.
        reduction: "mean" over the counted tokens or "sum"; in nats.

    Returns: a float32 scalar. Gradients flow to A, B and h where they require them; once (no retain_graph).
    Raises: ValueError for an unknown impl or reduction, shapes that do not fit, or an impl that cannot run there.
    """
    if impl not in loss_names():
        raise ValueError(f"impl={impl!r}: must be one of {', '.join(loss_names())}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: must be mean or sum")
    if h.shape[:-1] != y.shape or h.shape[-1] != B.shape[1] or A.shape[1] != B.shape[0]:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in (("h", h), ("A", A), ("B", B), ("y", y)))
        raise ValueError(f"shapes do not fit: {shapes}; expected h [..., D], A [V, R], B [R, D], y [...]")
    h, y = h.reshape(-1, h.shape[-1]), y.reshape(-1)
    if impl == "auto":
        impl = choose(h.device, h.dtype, len(h), *A.shape)
    refusal = LOSSES[impl].refuses(h.device.type, h.dtype)
    if refusal is not None:
        allowed = ", ".join(["auto", *usable(h.device.type, h.dtype)])
        raise ValueError(f"impl={impl!r}: {refusal}; allowed here are {allowed}")
    if impl == "reference":
        return reference(h, A, B, y, reduction, ignore_index)
    if not torch.is_grad_enabled():  # otherwise the forward pass would compute gradients that nobody needs
        h, A, B = h.detach(), A.detach(), B.detach()
    return LinearCrossEntropy.apply(h, A, B, y, impl, ignore_index, reduction == "mean")

"""The one entry to the losses: `linear_cross_entropy(h, A, B, y, impl=…)`."""

from __future__ import annotations

import torch
from torch import Tensor

from bottleneck.losses.chunked import ChunkedLinearCrossEntropy
from bottleneck.losses.reference import reference

IMPLS = ("reference", "chunked")


def linear_cross_entropy(
    h: Tensor,
    A: Tensor,
    B: Tensor,
    y: Tensor,
    impl: str = "chunked",
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of next-token targets under the head `W = A B` (Godey et al. 2024, Sec. 5.1).

    Args:
        h: hidden states [..., D]; products run in its dtype.
        A: [V, R]; B: [R, D]; kept in float32, cast to the dtype of `h` for the products.
        y: targets [...], the shape of `h` without its last dim; entries equal to `ignore_index` do not count.
        impl: "reference" (logits in full) or "chunked" (never holds N x V logits).
        reduction: "mean" over the counted tokens or "sum"; in nats.

    Returns: a float32 scalar. Gradients flow to A, B and, where it asks for them, h.
    Raises: ValueError for an unknown impl or reduction, or shapes that do not fit.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: must be one of {', '.join(IMPLS)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: must be mean or sum")
    if h.shape[:-1] != y.shape or h.shape[-1] != B.shape[1] or A.shape[1] != B.shape[0]:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in (("h", h), ("A", A), ("B", B), ("y", y)))
        raise ValueError(f"shapes do not fit: {shapes}; wanted h [..., D], A [V, R], B [R, D], y [...]")
    h, y = h.reshape(-1, h.shape[-1]), y.reshape(-1)
    if not torch.is_grad_enabled():  # the chunked loss takes gradients on the way: not here
        h, A, B = h.detach(), A.detach(), B.detach()
    if impl == "reference":
        return reference(h, A, B, y, reduction, ignore_index)
    total = ChunkedLinearCrossEntropy.apply(h, A, B, y, ignore_index)
    return total / (y != ignore_index).sum() if reduction == "mean" else total

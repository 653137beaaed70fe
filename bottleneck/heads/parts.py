"""Losses of kinds of heads from two numbers of each row of logits of their parts, see `losses.statistics`.

A part is a factorised block of logits z Aᵀ, or of f(z Aᵀ) with an increasing f, see `losses.pointwise`. Kernels compute
its numbers up to the rank `fused.FLASH_RANK` without its logits; above it, they are held.

Dims: n tokens of a chunk, R rank, V vocabulary of the part, K pieces.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Optional

from torch import Tensor

from bottleneck.losses.products import product

HELD_RANK = 256  # of `fused.FLASH_RANK`, which cannot be imported everywhere
HIDDEN = -1e5  # logit of an entry that a part leaves out; also in 16 bits


def held(A_VR: Tensor, extra: int = 0) -> int:
    """Number of entries of a part whose logits are held. Args: extra: columns that the part adds to A."""
    return 0 if A_VR.shape[1] + extra <= HELD_RANK else len(A_VR)


def statistics(z_nR: Tensor, A_VR: Tensor, y_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's logit [n] (0 where y is -1) and log Σ exp [n] of the logits z Aᵀ, differentiable, float32."""
    if not held(A_VR):
        own, lse = importlib.import_module("bottleneck.losses.statistics").statistics(z_nR, A_VR, y_n)
        return own, lse
    return _held_statistics(product(z_nR, A_VR).float(), y_n)


def pointwise(
    z_nR: Tensor,
    A_VR: Tensor,
    y_n: Tensor,
    f: Callable[[Tensor], Tensor],
    slopes_K: Optional[Tensor] = None,
    limit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`statistics` of the logits f(z Aᵀ).

    Args: f: an elementwise function; slopes_K, limit: the same one for the kernels, see `losses.pointwise.statistics`.
    """
    if not held(A_VR):
        kernels = importlib.import_module("bottleneck.losses.pointwise")
        own, lse = kernels.statistics(z_nR, A_VR, y_n, slopes_K, limit)
        return own, lse
    return _held_statistics(f(product(z_nR, A_VR)).float(), y_n)


def _held_statistics(logits: Tensor, y_n: Tensor) -> tuple[Tensor, Tensor]:
    own = logits.gather(1, y_n.clamp(min=0)[:, None]).squeeze(1)
    return own.masked_fill(y_n < 0, 0.0), logits.logsumexp(-1)

"""`plif`: one learned increasing piecewise linear function of all logits (LMS-PLIF, Ganea et al. 2019, Sec. 4).

Between K equally spaced knots in [−limit, limit] the slopes are softplus(v_k) > 0; the outer slopes
continue beyond the ends.

Dims: n tokens of a chunk, K pieces, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads.head import FUSIBLE, Pointwise

MOST = 65_536  # pieces
MOST_NATS = 1_000.0  # float32 adds the limit to a logit and takes it off again: 6e-5 of rounding at 1,000


class PiecewiseLinear(Pointwise):
    """logits = f(A B h) with A [V, R], B [R, D] and slopes v [K]; f is the identity at the start.

    Args: pieces: K; limit: the ends of the first and last piece, in nats of logit.
    """

    def __init__(self, vocab_size: int, rank: int, hidden_size: int, pieces: int, limit: float):
        super().__init__(vocab_size, rank, hidden_size)
        self.pieces, self.limit = pieces, float(limit)
        self.slopes = nn.Parameter(torch.full((pieces,), math.log(math.e - 1)))  # softplus of it is 1

    @property
    def flops_per_token(self) -> int:
        """Of the products; the slopes are in none."""
        return 2 * (self.A.numel() + self.B.numel())

    def piece_slopes(self) -> Tensor:
        """softplus(v) [K]."""
        return softplus(self.slopes)

    def f(self, s_nV: Tensor) -> Tensor:
        """f of each logit."""
        width = 2 * self.limit / self.pieces
        slopes = self.piece_slopes().to(s_nV.dtype)
        below = torch.cat([slopes.new_zeros(1), slopes.cumsum(0)[:-1]]) * width - self.limit  # f at each left knot
        with torch.no_grad():
            piece = ((s_nV + self.limit) / width).floor().clamp(0, self.pieces - 1).nan_to_num(0).long()
        return _entries(below, piece) + _entries(slopes, piece) * (s_nV + self.limit - piece * width)


class _Entries(torch.autograd.Function):
    """table[piece] with a gradient whose sums over all logits are float64, in one order."""

    @staticmethod
    def forward(ctx: Any, table_K: Tensor, piece_nV: Tensor) -> Tensor:
        ctx.save_for_backward(piece_nV)
        ctx.pieces = len(table_K)
        return table_K[piece_nV]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        (piece_nV,) = ctx.saved_tensors
        sums_K = torch.bincount(piece_nV.flatten(), grads[0].double().flatten(), minlength=ctx.pieces)
        return sums_K.to(grads[0].dtype), None


def _entries(table_K: Tensor, piece_nV: Tensor) -> Tensor:
    """table[piece], differentiable. On a CPU, indexing adds the gradient in float32, in an order that varies."""
    if table_K.is_cuda:  # here it is `bincount` whose order varies
        return table_K[piece_nV]
    found: Tensor = _Entries.apply(table_K, piece_nV)
    return found


def refuses(pieces: int, limit: float) -> Optional[str]:
    """Why an option is impossible."""
    if pieces < 1:
        return f"pieces={pieces}: must be at least 1"
    if pieces > MOST:
        return f"pieces={pieces}: must be at most {MOST:,}"
    return None if 0.01 <= limit <= MOST_NATS else f"limit={limit}: must be between 0.01 and {MOST_NATS:g}"


KIND = HEAD_KINDS.register(
    HeadKind(
        "plif",
        "a learned increasing piecewise linear function of the logits A B h (options pieces, limit)",
        PiecewiseLinear,
        options={"pieces": 64, "limit": 20.0},
        refuses=refuses,
        impls=FUSIBLE,
    )
)

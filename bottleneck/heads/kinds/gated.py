"""`gated`: a two-layer head whose hidden layer of width R is gated: logits = A ((B h) ⊙ (1 + GELU(G h))).

The form follows gated linear units (Shazeer 2020, Eq. 6); the 1 makes a head with G = 0 the low-rank head.

Dims: n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads.head import FUSIBLE, FactoredStates, product


class Gated(FactoredStates):
    """Parameters A [V, R], B and G [R, D]; G is zero at the start."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int):
        super().__init__(vocab_size, rank, hidden_size)
        self.G = nn.Parameter(torch.zeros(rank, hidden_size))

    def states(self, h_nD: Tensor) -> Tensor:
        """z = (B h) ⊙ (1 + GELU(G h)) [n, R]."""
        return (product(h_nD, self.B) * (1 + gelu(product(h_nD, self.G)))).to(h_nD.dtype)


KIND = HEAD_KINDS.register(
    HeadKind("gated", "two layers with a gate: A ((B h) ⊙ (1 + GELU(G h)))", Gated, impls=FUSIBLE)
)

"""`context_temperature`: logits of a low-rank head divided by a temperature that depends on the context.

    logits = exp(w · h) A B h

Dims: n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads.head import FUSIBLE, FactoredStates, product


class ContextTemperature(FactoredStates):
    """Parameters A [V, R], B [R, D], w [1, D]; w is zero at the start."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int):
        super().__init__(vocab_size, rank, hidden_size)
        self.w = nn.Parameter(torch.zeros(1, hidden_size))

    def states(self, h_nD: Tensor) -> Tensor:
        """z = exp(w · h) B h [n, R]."""
        return (product(h_nD, self.w).exp() * product(h_nD, self.B)).to(h_nD.dtype)


KIND = HEAD_KINDS.register(
    HeadKind(
        "context_temperature",
        "A B h divided by a learned temperature of the context",
        ContextTemperature,
        impls=FUSIBLE,
    )
)

"""`full`: one matrix W [V, D], without factors: the head of an ordinary language model, trained from the same start.

Dims: n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bottleneck.backbone.model import FullHead
from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.head import Head, product
from bottleneck.heads.key import HeadKey


class OneMatrix(Head):
    """Parameter W [V, D] in float32; logits = W h."""

    wide = 2

    def __init__(self, vocab_size: int, rank: int, hidden_size: int):
        super().__init__(vocab_size, start_rank=hidden_size)
        self.W = nn.Parameter(torch.zeros(vocab_size, hidden_size))

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V]."""
        return product(h_nD, self.W)

    @torch.no_grad()
    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """W is the product of the rank-d factors."""
        self.W.copy_(A_VR @ B_RD)

    def dense(self) -> Tensor:
        """W itself."""
        return self.W.detach()


KIND = HEAD_KINDS.register(HeadKind("full", "one matrix W [V, d] without factors, r = d", OneMatrix, full_rank=True))

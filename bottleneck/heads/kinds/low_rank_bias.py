"""`low_rank_bias`: W = A B and a bias for each token of the vocabulary.

It shows how much of a low rank's loss is the unigram distribution, which a bias alone can express.

Dims: n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bottleneck.backbone.model import FullHead
from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads import parts
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.head import FUSIBLE, Factored, product
from bottleneck.heads.key import HeadKey


class LowRankBias(Factored):
    """logits = A B h + b with A [V, R], B [R, D], b [V]."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int):
        super().__init__(vocab_size, rank, hidden_size)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    @property
    def flops_per_token(self) -> int:
        """Of the products; the bias is only added."""
        return 2 * (self.A.numel() + self.B.numel())

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V]."""
        return product(self.states(h_nD), self.A) + self.bias

    @property
    def held_entries(self) -> int:
        """The bias is two columns of the part."""
        return parts.held(self.A, extra=2)

    def fused_loss(self, h_nD: Tensor, y_n: Tensor) -> Tensor:
        """One part, whose last two columns are the bias in the dtype of h and what that rounds off."""
        coarse = self.bias.detach().to(h_nD.dtype).float()
        A = torch.cat([self.A, coarse[:, None], (self.bias - coarse)[:, None]], 1)
        z = torch.nn.functional.pad(self.states(h_nD), (0, 2), value=1.0)
        own, lse = parts.statistics(z, A, y_n)
        return lse - own

    @torch.no_grad()
    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """Set the factors, and the bias to that of the head that the start approximates (zero for most families)."""
        super().begin(key, A_VR, B_RD, head=head, moments=moments)
        if head.bias_V is not None:
            self.bias.copy_(head.bias_V.float() * head.scale)


KIND = HEAD_KINDS.register(HeadKind("low_rank_bias", "W = A B with a bias for each token", LowRankBias, impls=FUSIBLE))

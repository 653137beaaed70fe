"""`low_rank_sparse`: the most frequent tokens have full rows of W, the others share A B.

Dims: n tokens of a chunk, F full rows, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from bottleneck.backbone.model import FullHead
from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.head import Factored, product
from bottleneck.heads.key import HeadKey


class LowRankSparse(Factored):
    """logits = A B h, but U h [F] for F tokens, whose ids are stored in a buffer.

    Args: rows: F.
    """

    tokens_F: Tensor

    def __init__(self, vocab_size: int, rank: int, hidden_size: int, rows: int):
        super().__init__(vocab_size, rank, hidden_size)
        count = min(rows, vocab_size)
        self.U = nn.Parameter(torch.zeros(count, hidden_size))
        self.register_buffer("tokens_F", torch.arange(count))

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V]."""
        return product(self.states(h_nD), self.A).index_copy(1, self.tokens_F, product(h_nD, self.U))

    @torch.no_grad()
    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """Give the most likely tokens of the calibration text their rows of W, shifted as the start shifts the rest."""
        super().begin(key, A_VR, B_RD, head=head, moments=moments)
        self.tokens_F.copy_(moments.mean_V.topk(len(self.tokens_F)).indices.sort().values)
        W_VD, mean_V = head.W_VD.double() * head.scale, moments.mean_V
        A, B = A_VR.to(W_VD), B_RD.to(W_VD)
        shift_D = mean_V @ W_VD - (mean_V @ A) @ B
        self.U.copy_(W_VD[self.tokens_F.to(W_VD.device)] - shift_D)


def refuses(rows: int) -> Optional[str]:
    """Why an option is impossible."""
    return None if rows >= 1 else f"rows={rows}: must be at least 1"


KIND = HEAD_KINDS.register(
    HeadKind(
        "low_rank_sparse",
        "W = A B, with full rows for the most frequent tokens (option rows)",
        LowRankSparse,
        options={"rows": 1024},
        refuses=refuses,
    )
)

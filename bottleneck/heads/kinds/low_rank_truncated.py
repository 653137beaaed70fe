"""`low_rank_truncated`: W = A B with rows of A for the most frequent tokens only.

Dims: n tokens of a chunk, K kept rows, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bottleneck.backbone.model import FullHead
from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.head import Head, product
from bottleneck.heads.key import HeadKey
from bottleneck.heads.vocabulary import kept, most_frequent, over_vocabulary, refuses

ROWS = 4096


class LowRankTruncated(Head):
    """logits = A B h for K tokens, whose ids are stored in a buffer; see `heads.vocabulary` for the others.

    Args: rows: K.
    """

    tokens_K: Tensor

    def __init__(self, vocab_size: int, rank: int, hidden_size: int, rows: int):
        super().__init__(vocab_size, start_rank=rank)
        count = kept(rows, vocab_size, ROWS)
        self.A = nn.Parameter(torch.zeros(count, rank))
        self.B = nn.Parameter(torch.zeros(rank, hidden_size))
        self.register_buffer("tokens_K", torch.arange(count))

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V]."""
        kept = product(product(h_nD, self.B).to(h_nD.dtype), self.A)
        return over_vocabulary(kept, self.tokens_K, self.vocab_size)

    @torch.no_grad()
    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """The start's rows for the tokens that the original head expects most."""
        self.tokens_K.copy_(most_frequent(moments.mean_V, len(self.tokens_K)))
        self.A.copy_(A_VR[self.tokens_K.to(A_VR.device)])
        self.B.copy_(B_RD)


KIND = HEAD_KINDS.register(
    HeadKind(
        "low_rank_truncated",
        "W = A B with rows of A for the most frequent tokens only (option rows)",
        LowRankTruncated,
        options={"rows": ROWS},
        refuses=refuses,
    )
)

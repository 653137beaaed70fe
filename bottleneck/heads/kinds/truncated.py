"""`truncated`: full rows of W for the most frequent tokens, none for the others, as FR-Spec drafts (arXiv 2502.14856).

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


class Truncated(Head):
    """logits = W h for K tokens, whose ids are stored in a buffer; see `heads.vocabulary` for the others.

    Args: rows: K.
    """

    tokens_K: Tensor

    def __init__(self, vocab_size: int, rank: int, hidden_size: int, rows: int):
        super().__init__(vocab_size, start_rank=hidden_size)
        count = kept(rows, vocab_size, ROWS)
        self.W = nn.Parameter(torch.zeros(count, hidden_size))
        self.register_buffer("tokens_K", torch.arange(count))

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V]."""
        return over_vocabulary(product(h_nD, self.W), self.tokens_K, self.vocab_size)

    @torch.no_grad()
    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """The rows of the rank-d start for the tokens that the original head expects most."""
        self.tokens_K.copy_(most_frequent(moments.mean_V, len(self.tokens_K)))
        self.W.copy_(A_VR[self.tokens_K.to(A_VR.device)] @ B_RD)


KIND = HEAD_KINDS.register(
    HeadKind(
        "truncated",
        "full rows of W for the most frequent tokens only (option rows), r = d",
        Truncated,
        options={"rows": ROWS},
        refuses=refuses,
        full_rank=True,
    )
)

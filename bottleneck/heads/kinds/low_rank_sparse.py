"""`low_rank_sparse`: the most frequent tokens have full rows of W, the others share A B.

Dims: n tokens of a chunk, F full rows, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bottleneck.backbone.model import FullHead
from bottleneck.core.errors import check
from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads import parts
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.head import FUSIBLE, Factored, product
from bottleneck.heads.key import HeadKey
from bottleneck.heads.vocabulary import kept, refuses

ROWS = 1024


class LowRankSparse(Factored):
    """logits = A B h, but U h [F] for F tokens, whose ids are stored in a buffer.

    A has a row for every token; those of the F tokens are computed and replaced, so they are counted as parameters.

    Args: rows: F.
    """

    tokens_F: Tensor

    def __init__(self, vocab_size: int, rank: int, hidden_size: int, rows: int):
        super().__init__(vocab_size, rank, hidden_size)
        count = kept(rows, vocab_size, ROWS)
        left = f"must be below {vocab_size}, the vocabulary's size, so that tokens are left for A B"
        check(count < vocab_size, f"rows={rows}: {left}")
        self.U = nn.Parameter(torch.zeros(count, hidden_size))
        self.register_buffer("tokens_F", torch.arange(count))

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V]."""
        return product(self.states(h_nD), self.A).index_copy(1, self.tokens_F, product(h_nD, self.U))

    def dense(self) -> Tensor:
        """A B, with U in the rows of the F tokens."""
        return (self.A.detach() @ self.B.detach()).index_copy(0, self.tokens_F, self.U.detach())

    @property
    def held_entries(self) -> int:
        """The full rows, whose logits are few."""
        return len(self.U) + parts.held(self.A, extra=1)

    def fused_loss(self, h_nD: Tensor, y_n: Tensor) -> Tensor:
        """Two parts under one softmax: A B with a column that hides the F tokens, and U."""
        hidden_V1 = self.A.new_zeros(self.vocab_size, 1).index_fill(0, self.tokens_F, parts.HIDDEN)
        z = torch.nn.functional.pad(self.states(h_nD), (0, 1), value=1.0)
        place_V = y_n.new_full((self.vocab_size,), -1)
        place_V[self.tokens_F] = torch.arange(len(self.U), device=y_n.device, dtype=y_n.dtype)
        full = place_V[y_n]
        own, lse = parts.statistics(z, torch.cat([self.A, hidden_V1], 1), y_n.masked_fill(full >= 0, -1))
        logits_nF = product(h_nD, self.U).float()
        of_full = logits_nF.gather(1, full.clamp(min=0)[:, None]).squeeze(1)
        return torch.logaddexp(lse, logits_nF.logsumexp(-1)) - torch.where(full >= 0, of_full, own)

    @torch.no_grad()
    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """Give the most likely tokens of the calibration text their rows of W, shifted as the start shifts the rest."""
        super().begin(key, A_VR, B_RD, head=head, moments=moments)
        self.tokens_F.copy_(moments.mean_V.topk(len(self.tokens_F)).indices.sort().values)
        W_VD, mean_V = head.W_VD.double() * head.scale, moments.mean_V
        A, B = A_VR.to(W_VD), B_RD.to(W_VD)
        shift_D = mean_V @ W_VD - (mean_V @ A) @ B
        self.U.copy_(W_VD[self.tokens_F.to(W_VD.device)] - shift_D)


KIND = HEAD_KINDS.register(
    HeadKind(
        "low_rank_sparse",
        "W = A B, with full rows for the most frequent tokens (option rows)",
        LowRankSparse,
        impls=FUSIBLE,
        options={"rows": ROWS},
        refuses=refuses,
    )
)

"""`block`: a low-rank head for each frequency band of the vocabulary, wider for frequent tokens.

As in adaptive softmax (Grave et al. 2017) frequent tokens get more parameters; unlike there, all logits are in one
softmax.

Dims: n tokens of a chunk, D hidden size, R rank of the first band, V vocabulary, V_i tokens and R_i rank of band i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from bottleneck.backbone.model import FullHead
from bottleneck.core.errors import check
from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads import parts
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.head import FUSIBLE, Head, product
from bottleneck.heads.key import HeadKey

BANDS = [1_000, 10_000]


class Blocks(Head):
    """Parameters A_i [V_i, R_i] and B_i [R_i, D] of each band; a buffer holds each token's place.

    Args:
        bands: places in the order of frequency at which a new band begins, rising and below V; of `BANDS`, the usual
            ones, those beyond V are left out.
        shrink: R_i = R / shrink^i, at least 1.
    """

    place_V: Tensor

    def __init__(self, vocab_size: int, rank: int, hidden_size: int, bands: Sequence[int], shrink: int):
        super().__init__(vocab_size, start_rank=rank)
        fit = not bands or bands[-1] < vocab_size or list(bands) == BANDS
        check(fit, f"bands={list(bands)}: must be below {vocab_size}, the vocabulary's size")
        edges = [0, *(b for b in bands if 0 < b < vocab_size), vocab_size]
        self.sizes = [b - a for a, b in zip(edges, edges[1:])]
        ranks = [max(1, rank // shrink**i) for i in range(len(self.sizes))]
        self.A = nn.ParameterList(torch.zeros(size, r) for size, r in zip(self.sizes, ranks))
        self.B = nn.ParameterList(torch.zeros(r, hidden_size) for r in ranks)
        self.register_buffer("place_V", torch.arange(vocab_size))  # place of a token in the order of frequency

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V]."""
        blocks = [product(product(h_nD, B).to(h_nD.dtype), A) for A, B in zip(self.A, self.B)]
        return torch.cat(blocks, -1).index_select(1, self.place_V)

    def dense(self) -> Tensor:
        """A_i B_i of each band, in the order of ids."""
        bands = [A.detach() @ B.detach() for A, B in zip(self.A, self.B)]
        return torch.cat(bands).index_select(0, self.place_V)

    @property
    def held_entries(self) -> int:
        """The first bands, if their ranks are above that of the kernels."""
        return sum(parts.held(A) for A in self.A)

    def fused_loss(self, h_nD: Tensor, y_n: Tensor) -> Tensor:
        """A part for each band, under one softmax."""
        place_n, start, found = self.place_V[y_n], 0, []
        for A, B in zip(self.A, self.B):
            inside = (place_n >= start) & (place_n < start + len(A))
            z = product(h_nD, B).to(h_nD.dtype)
            found.append(parts.statistics(z, A, (place_n - start).masked_fill(~inside, -1)))
            start += len(A)
        owns, lses = zip(*found)
        return torch.stack(lses).logsumexp(0) - torch.stack(owns).sum(0)

    @torch.no_grad()
    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """Each band keeps the best rank-R_i part of the start's factors, in the norm that `fisher` minimises."""
        order_V = moments.mean_V.argsort(descending=True, stable=True)
        self.place_V[order_V.to(self.place_V.device)] = torch.arange(self.vocab_size, device=self.place_V.device)
        A, B, q = A_VR.double(), B_RD.double(), moments.fisher_V.to(A_VR.device)
        for tokens, A_i, B_i in zip(order_V.to(A.device).split(self.sizes), self.A, self.B):
            part = A[tokens]
            gram = part.T @ (q[tokens, None] * part)
            vectors = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)[:, : A_i.shape[1]]
            A_i.copy_(part @ vectors)
            B_i.copy_(vectors.T @ B)


def refuses(bands: Sequence[int], shrink: int) -> Optional[str]:
    """Why an option is impossible."""
    if shrink < 1:
        return f"shrink={shrink}: must be at least 1"
    if not all(type(b) is int for b in bands):
        return f"bands={list(bands)}: must be rising whole numbers above 0"
    rising = all(a < b for a, b in zip([0, *bands], bands))
    return None if rising else f"bands={list(bands)}: must be rising whole numbers above 0"


KIND = HEAD_KINDS.register(
    HeadKind(
        "block",
        "a low-rank block for each frequency band (options bands, shrink)",
        Blocks,
        impls=FUSIBLE,
        options={"bands": BANDS, "shrink": 2},
        refuses=refuses,
    )
)

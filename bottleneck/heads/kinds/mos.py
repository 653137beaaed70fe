"""`mos`: a mixture of softmaxes (Yang et al. 2018, Sec. 2.4), whose log-probabilities are not of rank R.

    p = Σ_k π_k softmax(A B_k h)        π = softmax(G h)

The K components share A. The paper's tanh in front of A is left out, so that one component is `low_rank`.

Dims: n tokens of a chunk, K components, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from bottleneck.backbone.model import FullHead
from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads import parts
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.head import FUSIBLE, Head, product
from bottleneck.heads.key import HeadKey, generator
from bottleneck.heads.kinds.low_rank import LowRankHead

MOST = 1024  # components
SPREAD = 0.3  # size of the noise that makes the components differ at the start, relative to an entry of B


class MixtureOfSoftmaxes(Head):
    """Parameters A [V, R], B [K, R, D], G [K, D]; `logits` are log-probabilities.

    Args: components: K.
    """

    def __init__(self, vocab_size: int, rank: int, hidden_size: int, components: int):
        super().__init__(vocab_size, start_rank=rank)
        self.wide = 2 * components + 2
        self.A = nn.Parameter(torch.zeros(vocab_size, rank))
        self.B = nn.Parameter(torch.zeros(components, rank, hidden_size))
        self.G = nn.Parameter(torch.zeros(components, hidden_size))

    @property
    def flops_per_token(self) -> int:
        """A is used by every component."""
        return 2 * (len(self.B) * self.A.numel() + self.B.numel() + self.G.numel())

    def logits(self, h_nD: Tensor) -> Tensor:
        """log p [n, V]."""
        log_prior_nK = torch.log_softmax(product(h_nD, self.G), -1)
        total = None
        for k, B in enumerate(self.B):
            log_p = torch.log_softmax(product(product(h_nD, B).to(h_nD.dtype), self.A), -1) + log_prior_nK[:, k, None]
            total = log_p if total is None else torch.logaddexp(total, log_p)
        assert total is not None
        return total

    @property
    def held_entries(self) -> int:
        """All of the vocabulary above the rank of the kernels."""
        return parts.held(self.A)

    def fused_loss(self, h_nD: Tensor, y_n: Tensor) -> Tensor:
        """−log Σ_k π_k exp(own_k − lse_k), a part for each component."""
        log_prior_nK = torch.log_softmax(product(h_nD, self.G), -1)
        found = [parts.statistics(product(h_nD, B).to(h_nD.dtype), self.A, y_n) for B in self.B]
        log_p_nK = torch.stack([own - lse for own, lse in found], -1)
        return -(log_prior_nK + log_p_nK).logsumexp(-1)

    @torch.no_grad()
    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """Set every component to the start's head, with equal shares and noise in B that depends on rank and seed."""
        self.A.copy_(A_VR)
        noise = torch.randn(self.B.shape, generator=generator(key)).to(B_RD)
        deviation_R1 = B_RD.square().mean(-1, keepdim=True).sqrt()
        self.B.copy_(B_RD + SPREAD * deviation_R1 * noise)
        self.G.zero_()


def build(vocab_size: int, rank: int, hidden_size: int, components: int) -> Head:
    """Build a mixture, or a plain low-rank head for one component."""
    if components == 1:
        return LowRankHead(vocab_size, rank, hidden_size)
    return MixtureOfSoftmaxes(vocab_size, rank, hidden_size, components)


def refuses(components: int) -> Optional[str]:
    """Why an option is impossible."""
    if components < 1:
        return f"components={components}: must be at least 1"
    return None if components <= MOST else f"components={components}: must be at most {MOST:,}"


KIND = HEAD_KINDS.register(
    HeadKind(
        "mos",
        "mixture of softmaxes (option components)",
        build,
        options={"components": 4},
        impls=FUSIBLE,
        refuses=refuses,
    )
)

"""`low_rank`: W = A B, the head of the paper (Godey et al. 2024, Sec. 5.1), trained by the hand-written losses.

Dims: N tokens, n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from bottleneck.backbone.model import FullHead
from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.head import Head
from bottleneck.heads.key import LOW_RANK, HeadKey
from bottleneck.losses import Weights, choose, objective, step, weights
from bottleneck.losses.objective import BoundObjective


class LowRankHead(Head):
    """Parameters A [V, R] and B [R, D] in float32; logits = A B h."""

    recordable = True

    def __init__(self, vocab_size: int, rank: int, hidden_size: int):
        super().__init__(vocab_size, start_rank=rank)
        self.A = nn.Parameter(torch.zeros(vocab_size, rank))
        self.B = nn.Parameter(torch.zeros(rank, hidden_size))

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V]; the readable form of what the losses compute."""
        return objective.head_logits(h_nD, weights(self.A, self.B, h_nD.dtype, "chunked"))

    @torch.no_grad()
    def set(self, A_VR: Tensor, B_RD: Tensor) -> None:
        """Copy the factors."""
        self.A.copy_(A_VR)
        self.B.copy_(B_RD)

    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """Set the factors to those of the start."""
        self.set(A_VR, B_RD)

    def factors(self, whiten_DD: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """A [V, R] and B [R, D] in coordinates of h."""
        return self.A.detach(), self.B.detach() if whiten_DD is None else self.B.detach() @ whiten_DD

    def dense(self) -> Tensor:
        """A B."""
        return self.A.detach() @ self.B.detach()

    def tensors(self, whiten_DD: Optional[Tensor] = None) -> dict[str, Tensor]:
        """The factors."""
        return dict(zip("AB", self.factors(whiten_DD)))

    @torch.no_grad()
    def use_coordinates(self, root_DD: Tensor) -> None:
        """B becomes C = B M."""
        self.B.copy_(self.B.double() @ root_DD.to(self.B.device))

    @torch.no_grad()
    def finish_gradients(self, whiten_DD: Tensor) -> None:
        """dC = dB M^-1, in place: the gradient may be a view into a bucket of DDP."""
        assert self.B.grad is not None
        self.B.grad.copy_(self.B.grad @ whiten_DD.T)

    def impl(self, dtype: torch.dtype, tokens: int, wanted: str) -> str:
        """The loss implementation; never "auto"."""
        return choose(self.A.device, dtype, tokens, *self.A.shape) if wanted == "auto" else wanted

    def read(
        self, dtype: torch.dtype, impl: str, whiten_DD: Optional[Tensor] = None, *, memory: Optional[int] = None
    ) -> Weights:
        """The factors in the dtype of the hidden states."""
        return weights(*self.factors(whiten_DD), dtype, impl, memory)

    @torch.no_grad()
    def float_logits(self, h_nD: Tensor, read: Weights) -> Tensor:
        """Logits [n, V] in float32."""
        return objective.head_logits(h_nD, read)

    @torch.no_grad()
    def token_losses(self, h_ND: Tensor, y_N: Tensor, read: Weights) -> Tensor:
        """Cross-entropy [N]."""
        return step(h_ND, read, y_N)

    @torch.no_grad()
    def step(self, h_ND: Tensor, y_N: Tensor, read: Weights, scale: float) -> Tensor:
        """Cross-entropy [N]; gradients without autograd and without a copy."""
        return step(h_ND, read, y_N, self.A.grad, self.B.grad, scale)

    @classmethod
    @torch.no_grad()
    def taught_steps(
        cls, heads: Sequence[Any], h_ND: Tensor, y_N: Tensor, reads: Sequence[Weights], scale: float, o: BoundObjective
    ) -> list[Tensor]:
        """One step of all heads, which share the teacher's softmax."""
        gradients = [(head.A.grad, head.B.grad) for head in heads]
        return list(objective.steps(h_ND, list(reads), y_N, gradients, scale, o))


KIND = HEAD_KINDS.register(
    HeadKind(LOW_RANK, "W = A B of rank r, as in the paper", LowRankHead, impls=None, coordinates=True)
)

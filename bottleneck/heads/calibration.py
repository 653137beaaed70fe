"""Moments of the hidden states and of the original head's distribution over a few thousand training tokens.

Dims: D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bottleneck.backbone.model import FullHead
from bottleneck.core.errors import check
from bottleneck.losses.chunked import chunk_rows

RIDGE = 1e-6  # relative to the mean eigenvalue; keeps the covariance of few tokens invertible


@dataclass
class Calibration:
    """Means over the calibration tokens, float64.

    Attributes:
        cov_DD: E[h hᵀ], not centred.
        mean_V: E[p_v].
        fisher_V: E[p_v (1 − p_v)], the diagonal of the expected Fisher matrix E[diag(p) − p pᵀ] of the logits.
    """

    cov_DD: Tensor
    mean_V: Tensor
    fisher_V: Tensor

    @property
    def mean_square(self) -> float:
        """E[h_i²], averaged over the entries i of h."""
        return (self.cov_DD.diagonal().mean()).item()


@torch.no_grad()
def calibrate(hidden: Iterable[Tensor], head: FullHead) -> Calibration:
    """Moments of batches of hidden states [..., D] under a head; one chunk of logits is held at a time."""
    D, V = head.W_VD.shape[1], head.W_VD.shape[0]
    device = head.W_VD.device
    cov = torch.zeros(D, D, dtype=torch.float64, device=device)
    mean, square = (torch.zeros(V, dtype=torch.float64, device=device) for _ in range(2))
    tokens = 0
    for h in hidden:
        for part in h.reshape(-1, D).split(chunk_rows(V, device.type)):
            p = torch.softmax(head.float_logits(part), dim=-1)
            mean += p.sum(0)
            square += p.square_().sum(0)
            wide = part.double()
            cov.addmm_(wide.T, wide)
            tokens += len(part)
    check(
        bool(cov.isfinite().all()) and bool(mean.isfinite().all()),
        "backbone: hidden states or logits of the calibration tokens are not finite; its weights are damaged, or "
        "backbone.dtype cannot hold them",
    )
    return Calibration(cov / tokens, mean / tokens, (mean - square) / tokens)


def roots(cov_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and inverse square root [D, D] of a covariance, with a small ridge."""
    cov = cov_DD + RIDGE * cov_DD.diagonal().mean() * torch.eye(len(cov_DD), dtype=cov_DD.dtype, device=cov_DD.device)
    values, vectors = torch.linalg.eigh(cov)
    root = values.clamp(min=RIDGE * values.max()).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T

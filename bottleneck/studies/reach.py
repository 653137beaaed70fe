"""What of the logit gradient a head lets through to the hidden state (Godey & Artzi 2026, arXiv 2603.10145).

With logits s = W h and g = ∂loss/∂s = softmax(s) − onehot(y) [V], the hidden state receives Wᵀ g, which depends on P_W g alone, the
projection of g on the column space of W. The share that reaches it is ‖P_W g‖ / ‖g‖. With Wᵀ W = Q Λ Qᵀ,

    ‖P_W g‖ = ‖Λ^-½ Qᵀ Wᵀ g‖

so that no V x V matrix is made. For a direction g that knows nothing of W, the mean of the squared share is rank(W) / V.

Dims: N tokens, n tokens of a chunk, D hidden size (or rank), V vocabulary, K bands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bottleneck.studies.singular import summary

TINY = 1e-10  # of the largest eigenvalue of WᵀW: below it a direction is not in the column space
BINS = 50  # of the histogram of shares, from 0 to 1


def whitener(W_VD: Tensor) -> Tensor:
    """T [D, k] with ‖P_W g‖ = ‖Tᵀ Wᵀ g‖ for every g; k is the rank of W. Float64."""
    values, vectors = torch.linalg.eigh((W_VD.double().T @ W_VD.double()))
    keep = values > TINY * values.max()
    return vectors[:, keep] / values[keep].sqrt()


def shares(g_nV: Tensor, W_VD: Tensor, T_Dk: Tensor) -> tuple[Tensor, Tensor]:
    """‖P_W g‖ / ‖g‖ of each token [n], 0 where g is 0; and Wᵀ g [n, D], which is what the hidden state receives."""
    back_nD = g_nV @ W_VD
    reached = (back_nD.double() @ T_Dk).norm(dim=-1)
    whole = g_nV.norm(dim=-1, dtype=torch.float64)
    return torch.where(whole > 0, reached / whole.clamp(min=1e-300), 0.0).clamp(max=1.0), back_nD


@dataclass
class Reach:
    """Sums over tokens for one head, W [V, D] as its logits see it; `add` any number of chunks, then read `result`."""

    W_VD: Tensor
    bands: int
    T_Dk: Tensor = field(init=False)
    total: float = 0.0
    squares: float = 0.0
    tokens: int = 0

    def __post_init__(self):
        device, D = self.W_VD.device, self.W_VD.shape[1]
        self.T_Dk = whitener(self.W_VD)
        self.histogram = torch.zeros(BINS, dtype=torch.float64, device=device)
        self.by_band = torch.zeros(2, self.bands, dtype=torch.float64, device=device)  # sums of shares, tokens
        self.outer_DD = torch.zeros(D, D, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, probabilities_nV: Tensor, y_n: Tensor, band_n: Tensor) -> None:
        """Take in the head's softmax, which is overwritten, and the targets."""
        g = probabilities_nV.scatter_add_(1, y_n[:, None], probabilities_nV.new_full((len(y_n), 1), -1.0))
        share_n, back = shares(g, self.W_VD, self.T_Dk)
        self.total += share_n.sum().item()
        self.squares += share_n.square().sum().item()
        self.tokens += len(y_n)
        self.histogram += torch.bincount((share_n * BINS).long().clamp(max=BINS - 1), minlength=BINS)
        self.by_band[0].index_add_(0, band_n, share_n)
        self.by_band[1] += torch.bincount(band_n, minlength=self.bands)
        self.outer_DD.addmm_(back.double().T, back.double())

    @property
    def result(self) -> dict[str, Any]:
        """share: mean over tokens; lost: 1 − share; rms; histogram of shares; share by band; rank of W; effective and stable
        rank of what comes back, from the singular values of the gradients Wᵀ g of all tokens."""
        sums, counts = self.by_band.tolist()
        sigma = torch.linalg.eigvalsh(self.outer_DD).clamp(min=0).flip(0).sqrt()
        spread = summary(sigma)
        return {
            "share": self.total / self.tokens, "lost": 1 - self.total / self.tokens, "rms": (self.squares / self.tokens) ** 0.5, "rank": self.T_Dk.shape[1],
            "update_effective_rank": spread["effective_rank"], "update_stable_rank": spread["stable_rank"],
            "bands": [{"share": s / n if n else None, "tokens": int(n)} for s, n in zip(sums, counts)],
            "histogram": [int(x) for x in self.histogram.tolist()],
        }  # fmt: skip

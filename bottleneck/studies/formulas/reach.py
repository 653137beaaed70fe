"""The share of the logit gradient that a head passes on to the hidden state (Godey & Artzi 2026, arXiv 2603.10145).

With logits s = W h and g = ∂loss/∂s = softmax(s) − onehot(y) [V], the hidden state receives Wᵀ g. It depends only on
P_W g, the projection of g on the column space of W. The share that arrives is ‖P_W g‖ / ‖g‖. With W = Q C, the columns
of Q orthonormal,

    ‖P_W g‖ = ‖Qᵀ g‖   and   Wᵀ g = Cᵀ (Qᵀ g)

so that no V x V matrix is needed. For a direction g independent of W, the mean squared share is rank(W) / V.

Dims: N tokens, n tokens of a chunk, D hidden size (or rank), k rank of W, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from bottleneck.studies.formulas.singular import ROWS, singular_values, square_root, summary, triangle

TINY = 2.0**-23  # of the largest singular value; below it float32 weights hold rounding errors, not directions
BINS = 50  # of the histogram of shares, from 0 to 1


def column_space(W_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Q [V, k] float32 and C [k, D] float64 with W = Q C and QᵀQ = 1; k is the rank of W. Q is unique up to a rotation.

    Computed through the triangle of a QR: directions down to TINY of the largest are exact, which WᵀW would lose.
    """
    values, turn = torch.linalg.svd(triangle(W_VD))[1:]
    keep = values > TINY * values.max()
    T_Dk = turn[keep].T / values[keep]
    Q = torch.cat([(piece.double() @ T_Dk).float() for piece in W_VD.split(ROWS)])
    return Q, values[keep, None] * turn[keep]


def shares(g_nV: Tensor, Q_Vk: Tensor) -> tuple[Tensor, Tensor]:
    """‖P_W g‖ / ‖g‖ of each token [n], 0 where g is 0; and Qᵀ g [n, k], float64."""
    inside_nk = (g_nV @ Q_Vk).double()
    whole = g_nV.norm(dim=-1, dtype=torch.float64)
    return torch.where(whole > 0, inside_nk.norm(dim=-1) / whole.clamp(min=1e-300), 0.0).clamp(max=1.0), inside_nk


class Reach:
    """Sums over tokens for one head; `add` any number of chunks, then read `result`.

    Args:
        W_VD: the last matrix before the logits: W, or A [V, R] of a low-rank head.
        bands: number of frequency bands of the targets.
        B_RD: of a low-rank head; it carries the gradient on to the hidden state.
    """

    def __init__(self, W_VD: Tensor, bands: int, B_RD: Optional[Tensor] = None):
        device = W_VD.device
        self.Q_Vk, C_kD = column_space(W_VD)
        self.back_kD = C_kD if B_RD is None else C_kD @ B_RD.double()
        self.shares: list[Tensor] = []
        self.by_band = torch.zeros(2, bands, dtype=torch.float64, device=device)  # sums of shares, tokens
        self.outer_kk = torch.zeros(len(C_kD), len(C_kD), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, probabilities_nV: Tensor, y_n: Tensor, band_n: Tensor) -> None:
        """Add the head's softmax [n, V], which is overwritten, with the targets [n] and their bands [n]."""
        g = probabilities_nV.scatter_add_(1, y_n[:, None], probabilities_nV.new_full((len(y_n), 1), -1.0))
        share_n, inside = shares(g, self.Q_Vk)
        self.shares.append(share_n)
        self.by_band[0].index_add_(0, band_n, share_n)
        self.by_band[1] += torch.bincount(band_n, minlength=self.by_band.shape[1])
        self.outer_kk.addmm_(inside.T, inside)

    @property
    def result(self) -> dict[str, Any]:
        """Means over all tokens added so far.

        share: mean; lost: 1 − share; rms: root mean square; rank of W; update_effective_rank and update_stable_rank of
            the gradients that the hidden states receive, from their singular values over all tokens; bands: share by
            band; histogram of shares; tokens: the share of each token, in order.
        """
        sums, counts = self.by_band.tolist()
        share_N = torch.cat(self.shares)
        places = (share_N * BINS).long().clamp(max=BINS - 1)
        spread = summary(singular_values(square_root(self.outer_kk) @ self.back_kD))
        mean = share_N.mean().item()
        return {
            "share": mean,
            "lost": 1 - mean,
            "rms": share_N.square().mean().sqrt().item(),
            "rank": self.Q_Vk.shape[1],
            "update_effective_rank": spread["effective_rank"],
            "update_stable_rank": spread["stable_rank"],
            "bands": [{"share": s / n if n else None, "tokens": int(n)} for s, n in zip(sums, counts)],
            "histogram": torch.bincount(places, minlength=BINS).tolist(),
            "tokens": [round(x, 6) for x in share_N.tolist()],
        }

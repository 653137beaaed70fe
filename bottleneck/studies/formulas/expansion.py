"""The loss that a head of rank r costs, from the original head's spectrum and from the expansion of the KL.

For logits z = W h and z + δ of a low-rank head, with p = softmax(z):

    KL(p ‖ p') = LSE(z + δ) − LSE(z) − p·δ  ≤  ¼ |δ|²

because the Hessian F(p) = diag(p) − p pᵀ of the log-sum-exp has no eigenvalue above ½ (a unit vector's variance under
any p is at most (√2/2)² = ½). In the mean over tokens |δ|² is ‖(A B − W) Σ^½‖²_F with Σ = E[h hᵀ], and least for the
truncated SVD of W Σ^½ (Eckart–Young–Mirsky). The softmax ignores a shift of all logits, so W may first lose its mean
row, W_c. Hence

    KL(r)  ≤  ¼ Σ_{i>r} σ_i(W_c Σ^½)²  ≤  ¼ λ_max(Σ) Σ_{i>r} σ_i(W_c)²            bound; the tail of Godey et al. 2024
    KL(r)  ≤  log V − E[H(p)]                                                    trivial bound: the uniform distribution
    KL     =  ½ E[δᵀ F(p) δ] + O(δ³)                                             second order, each context's own F(p)
    KL(r)  ~  ½ Σ_{i>r} σ_i(Q^½ W_c' Σ^½)²                                       surrogate, Q = E[diag F(p)]

The surrogate replaces F(p) of each context by the mean of its diagonal over all tokens. It has a closed form, and it
is what the `fisher` start minimises, but it is not the second-order term: dropping the dependence of δ on p lowers it
by a factor of two and more.

For the text's own labels the gap to an *ideal* head (one that no other head beats) has the same bound, since the term
linear in δ is then zero. The original head is ideal for its pretraining text only, so gaps of trained heads are
measured from the best full-rank head there is.

Dims: N tokens, n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from bottleneck.backbone.model import FullHead
from bottleneck.heads.calibration import Calibration, roots
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.singular import singular_values, tails, triangle


@dataclass
class Tails:
    """By rank r = 0 … D: [D + 1], float64, CPU. Energies in squared units of the logits, the others in nats."""

    head: Tensor  # Σ_{i>r} σ_i(W_c)²
    weighted: Tensor  # Σ_{i>r} σ_i(W_c Σ^½)²: mean squared error of the logits, summed over the vocabulary
    bound: Tensor  # ¼ weighted
    bound_head: Tensor  # ¼ λ_max(Σ) head
    surrogate: Tensor  # ½ Σ_{i>r} σ_i(Q^½ W_c' Σ^½)², W_c' without its mean under the model's own distribution


def theory_tails(W_VD: Tensor, c: Calibration) -> Tails:
    """The three spectra of a head. Memory: a piece of W in float64 at a time, and a few D × D matrices."""
    root = roots(c.cov_DD)[0].to(W_VD.device)
    W = W_VD.double()
    R = triangle(W - W.mean(dim=0))
    head, weighted = tails(singular_values(R)), tails(singular_values(R @ root))
    # the singular values of Q^½ W_c' Σ^½ without a second matrix as large as W
    centre = c.mean_V.to(W) @ W
    R = triangle(c.fisher_V.to(W).clamp(min=0).sqrt()[:, None] * (W - centre))
    top = torch.linalg.eigvalsh(c.cov_DD)[-1].item()
    return Tails(head, weighted, weighted / 4, head * top / 4, tails(singular_values(R @ root)) / 2)


def truncated(W_VD: Tensor, c: Calibration, ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The heads that the bound is about: A [V, R], B [R, D] float32, where A B Σ^½ is the truncated SVD of W_c Σ^½."""
    W = W_VD.double()
    root, inverse = (m.to(W.device) for m in roots(c.cov_DD))
    X = (W - W.mean(dim=0)) @ root
    vectors = torch.linalg.svd(triangle(X)).Vh.T  # right singular vectors of X
    A, B = (X @ vectors).float(), (vectors.T @ inverse).float()
    return [(A[:, :r], B[:r]) for r in ranks]


@dataclass
class Expansion:
    """Means over tokens of each head, nats: KL from the original head, and its true second-order term."""

    kl: list[float]
    second_order: list[float]
    entropy: float  # E[H(p)] of the original head


@torch.no_grad()
def expansion(heads: Sequence[tuple[Tensor, Tensor]], hidden_ND: Tensor, head: FullHead) -> Expansion:
    """KL and ½ E[δᵀ F(p) δ] of low-rank heads (A [V, R], B [R, D]) over hidden states.

    δᵀ F(p) δ is the variance of δ under p, so no V × V matrix is needed. Four chunks of logits are held at a time.
    """
    device, V = hidden_ND.device, len(head.W_VD)
    kl, second = (torch.zeros(len(heads), dtype=torch.float64, device=device) for _ in range(2))
    entropy = torch.zeros((), dtype=torch.float64, device=device)
    weights = [(A.to(device, torch.float32), B.to(device, torch.float32)) for A, B in heads]
    for h in hidden_ND.split(chunk_rows(V, device.type)):
        log_p = torch.log_softmax(head.float_logits(h), dim=-1)
        p = log_p.exp()
        entropy -= torch.where(p > 0, p * log_p, 0.0).sum(dtype=torch.float64)
        for i, (A, B) in enumerate(weights):
            log_q = torch.log_softmax((h.float() @ B.T) @ A.T, dim=-1)
            delta = log_q - log_p  # the difference of the logits up to a constant, which the variance ignores
            kl[i] -= (p * delta).sum(dtype=torch.float64)
            mean = (p * delta).sum(-1, keepdim=True)
            second[i] += 0.5 * (p * (delta - mean).square()).sum(dtype=torch.float64)
    n = len(hidden_ND)
    return Expansion((kl / n).tolist(), (second / n).tolist(), (entropy / n).item())


def slope(x: Sequence[float], y: Sequence[float], smallest: float = 1e-4) -> float | None:
    """Least-squares slope of log y against log x, over points above `smallest`; None for fewer than three of them."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y) if a > smallest and b > smallest]
    if len(points) < 3 or len({a for a, _ in points}) < 2:
        return None
    log_x, log_y = np.array(points).T
    return float(np.polyfit(log_x, log_y, 1)[0])

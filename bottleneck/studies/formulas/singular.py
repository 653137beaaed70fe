"""Singular values of tall matrices read in pieces, and numbers that summarise a spectrum.

Dims: D hidden size, V vocabulary. All in float64.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

ROWS = 16_384  # of W in float64 at a time


def triangle(W_VD: Tensor, rows: int = ROWS) -> Tensor:
    """R [D, D] (fewer rows if V < D) with W = Q R and QᵀQ = I.

    W has the singular values of R, and W M those of R M for any M [D, k].

    Householder QR over pieces of W is accurate to rounding times the largest value; WᵀW would square the condition
    number. Memory: (rows + D) · D numbers.
    """
    R = W_VD.new_zeros(0, W_VD.shape[1], dtype=torch.float64)
    for piece in W_VD.split(rows):
        R = torch.linalg.qr(torch.cat([R, piece.double()]), mode="r").R
    return R


def singular_values(M: Tensor) -> Tensor:
    """Singular values, falling, float64, on the CPU."""
    return torch.linalg.svdvals(M.double()).cpu()


def square_root(cov_DD: Tensor) -> Tensor:
    """Symmetric Σ^½ [D, D] of a covariance. No ridge: a direction that a LayerNorm leaves empty stays empty."""
    values, vectors = torch.linalg.eigh(cov_DD.double())
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def summary(sigma: Tensor) -> dict[str, Optional[float]]:
    """Summary of singular values σ_1 ≥ … ≥ σ_d ≥ 0, with shares p_i = σ_i / Σσ.

    entropy: KL(p ‖ uniform) = log d − H(p), nats; 0 for equal values, log d for a single one (Godey et al. 2024)
    effective_rank: exp(H(p)), 1 … d (Roy & Vetterli 2007; Kulkarni et al. 2026)
    stable_rank: Σσ² / σ_1², 1 … d: how many directions as strong as the first hold the energy
    participation_ratio: (Σσ²)² / Σσ⁴, 1 … d: how many directions share the energy
    condition: σ_1 / σ_d; None if σ_d is below rounding
    top_share: σ_1² / Σσ²: energy of the first direction

    Returns: these, and `largest`, `smallest`, `energy` = Σσ²; None throughout for a matrix of zeros.
    """
    s = sigma.double()
    energy = s.square().sum().item()
    if energy == 0:
        names = ("entropy", "effective_rank", "stable_rank", "participation_ratio", "condition", "top_share")
        return {**dict.fromkeys(names), "largest": 0.0, "smallest": 0.0, "energy": 0.0}
    p = s / s.sum()
    H = -(torch.special.xlogy(p, p)).sum().item()
    first, last = s[0].item(), s[-1].item()
    return {
        "entropy": max(0.0, math.log(len(s)) - H),
        "effective_rank": math.exp(H),
        "stable_rank": energy / first**2,
        "participation_ratio": energy**2 / s.pow(4).sum().item(),
        "condition": first / last if last > len(s) * torch.finfo(torch.float64).eps * first else None,
        "top_share": first**2 / energy,
        "largest": first,
        "smallest": last,
        "energy": energy,
    }


def tails(sigma: Tensor) -> Tensor:
    """Σ_{i>r} σ_i² for r = 0 … d: [d + 1], summed from the small end.

    Entry r is the least ‖M − M_r‖²_F over all M_r of rank r (Eckart–Young–Mirsky).
    """
    squares = sigma.double().square().flip(0)
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def padding(W_VD: Tensor, entries: Optional[int]) -> dict[str, Any]:
    """Rows of the head beyond the tokenizer's entries: how many, their mean norm, and the mean norm of the other rows.

    The first two are None if `entries` is unknown.
    """
    norms = torch.cat([piece.double().norm(dim=1) for piece in W_VD.split(ROWS)])
    if entries is None:
        return {"rows": None, "mean_norm": None, "mean_norm_tokens": norms.mean().item()}
    entries = min(entries, len(norms))
    rest = norms[entries:]
    return {
        "rows": len(rest),
        "mean_norm": rest.mean().item() if len(rest) else None,
        "mean_norm_tokens": norms[:entries].mean().item(),
    }

"""The empirical rank of log-probability matrices, and the loss without bands of singular directions.

A linear head of rank r gives log-probabilities that have rank r after centring over tokens and contexts; another kind
of head may exceed the rank of its parameters. The extended logit matrix of Golowich, Liu, Shetty (arXiv 2510.24966)
has a row for each history and a column for each pair of a future and a next token; its singular values fall like i^-α.

Dims: N contexts, m tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bottleneck.backbone.model import FullHead
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.singular import summary, tails

ROUNDING = 1e-5  # of the largest singular value: below it float32 log-probabilities hold rounding errors


def centred_spectrum(log_p_Nm: Tensor) -> Tensor:
    """Singular values of log-probabilities without their means over tokens and over contexts; float64, falling."""
    x = log_p_Nm.double()
    x = x - x.mean(1, keepdim=True)
    return torch.linalg.svdvals(x - x.mean(0, keepdim=True))


def output_rank(sigma: Tensor, hidden_size: int) -> dict[str, Any]:
    """Summary of a spectrum from `centred_spectrum`.

    Returns: `rank`, the number of singular values above ROUNDING of the first; `effective_rank`; `tail_energy`, the
        share of the energy beyond the hidden size (Σ_{i>d} σ_i² / Σ σ_i², Godey et al. 2024, Sec. 5.2); `exponent`,
        see the function of that name.
    """
    energy = tails(sigma)
    largest = sigma[0].item()
    return {
        "rank": int((sigma > ROUNDING * largest).sum()) if largest > 0 else 0,
        "effective_rank": summary(sigma)["effective_rank"],
        "tail_energy": (energy[min(hidden_size, len(sigma))] / energy[0]).item() if largest > 0 else None,
        "exponent": exponent(sigma),
    }


@torch.no_grad()
def centred_rank(W_VD: Tensor) -> int:
    """Rank of W without its mean row: of the log-probabilities over the whole vocabulary, if contexts enough are seen.

    Singular values count from ROUNDING of the first on, as in `output_rank`.
    """
    mean_D, D = W_VD.mean(0, dtype=torch.float64), W_VD.shape[1]
    gram_DD = torch.zeros(D, D, dtype=torch.float64, device=W_VD.device)
    for rows in W_VD.split(16_384):
        centred = rows.double() - mean_D
        gram_DD += centred.T @ centred
    sigma = torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt()
    return int((sigma > ROUNDING * sigma.max()).sum())


def exponent(sigma: Tensor) -> float | None:
    """α of the power law σ_i ~ i^-α, by least squares on logarithms; None for fewer than 8 values above rounding.

    The first two values, which are often outliers, and the last quarter, which a finite matrix bends down, are left
    out.
    """
    kept = sigma[sigma > ROUNDING * sigma[0]].tolist() if sigma[0] > 0 else []
    chosen = range(2, 3 * len(kept) // 4)
    if len(kept) < 8:
        return None
    x, y = [math.log(i + 1) for i in chosen], [math.log(kept[i]) for i in chosen]
    return -float(np.polyfit(x, y, 1)[0])


@torch.no_grad()
def losses_without_bands(hidden_ND: Tensor, y_N: Tensor, head: FullHead, bands: int) -> list[dict[str, Any]]:
    """Loss after removing bands of right singular directions of W from the hidden states (Cancedda, arXiv 2402.09221).

    Returns: for each of `bands` equal bands, the strongest first, `first` and `last` index from 1 and the mean `loss`,
        nats.
    """
    values, vectors_DD = torch.linalg.eigh(head.W_VD.double().T @ head.W_VD.double())
    directions = vectors_DD[:, values.argsort(descending=True)]
    edges = np.linspace(0, directions.shape[1], bands + 1).round().astype(int)
    out = []
    for first, last in zip(edges, edges[1:]):
        V_Dk = directions[:, first:last].to(hidden_ND.device, torch.float32)
        total = 0.0
        rows = chunk_rows(len(head.W_VD), hidden_ND.device.type)
        for h, y in zip(hidden_ND.float().split(rows), y_N.split(rows)):
            logits = head.float_logits((h - (h @ V_Dk) @ V_Dk.T).to(head.W_VD.dtype))
            total += torch.nn.functional.cross_entropy(logits, y, reduction="sum").item()
        out.append({"first": int(first) + 1, "last": int(last), "loss": total / len(y_N)})
    return out

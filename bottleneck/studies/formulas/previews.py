"""Where the original head's most likely token stands in the order of a low-rank preview of the logits.

A preview computes all logits with a head of rank r, and only its top k candidates exactly. It gives the original
head's arg-max if that is among the k. No certificate is attempted: the Cauchy–Schwarz bound |δ_v| ≤ |(W − A B)_v Σ^½|
|Σ^-½ h| of a logit's error is far above the gaps between logits at any useful rank.

Dims: N tokens, n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from bottleneck.backbone.model import FullHead
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.expansion import truncated

Factors = tuple[Tensor, Tensor]  # A [V, R], B [R, D]
whitened = truncated  # the truncated SVD of W Σ^½: weighted by the hidden states, all tokens alike


@torch.no_grad()
def positions(previews: Sequence[Factors], hidden_ND: Tensor, head: FullHead) -> Tensor:
    """Position of the original head's arg-max in each preview's order, from 1: int64 [previews, N].

    Tokens with an equal preview logit count as being before it, so a position is never too low. A bias is added to the
    previews as well, since it costs nothing; a soft cap does not change an order. Two chunks of logits are held at a
    time.
    """
    device = hidden_ND.device
    bias_V = 0.0 if head.bias_V is None else head.bias_V.float()
    weights = [(A.to(device, torch.float32), B.to(device, torch.float32)) for A, B in previews]
    found: list[list[Tensor]] = [[] for _ in weights]
    for h in hidden_ND.split(chunk_rows(len(head.W_VD), device.type)):
        best_n1 = head.float_logits(h).argmax(-1, keepdim=True)
        for (A, B), places in zip(weights, found):
            logits_nV = (h.float() @ B.T) @ A.T + bias_V
            places.append((logits_nV >= logits_nV.gather(1, best_n1)).sum(-1).cpu())
    return torch.stack([torch.cat(places) for places in found])


def summary(positions_N: Tensor, tops: Sequence[int], quantiles: Sequence[float]) -> dict[str, list[float]]:
    """How often the position is at most k, for each k of `tops`; and quantiles of the position (the higher of two)."""
    shares = [(positions_N <= k).double().mean().item() for k in tops]
    levels = torch.tensor(list(quantiles), dtype=torch.float64)
    found = torch.quantile(positions_N.double(), levels, interpolation="higher")
    return {"shares": shares, "quantiles": found.tolist()}

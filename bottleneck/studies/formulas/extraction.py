"""Recover the rank of a head from log-probabilities alone (Carlini et al., arXiv 2403.06634; Finlayson et al., arXiv
2403.09539).

Log-probabilities of one context are its logits minus a constant: log p = W h + b − LSE. Without their mean over tokens
and their mean over contexts, constant and bias are gone, and the matrix [contexts, tokens] has the rank of W: its
singular values drop to rounding errors after the r-th. Of a top-k interface only the k largest are known for each
context, so a block of contexts is needed whose top k share enough tokens.

Dims: N contexts, k known tokens of a context, m tokens of a block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLEAR = 10.0  # least ratio of neighbouring singular values that counts as the end of the spectrum


@dataclass
class Recovered:
    """What a block of log-probabilities says about the head's rank.

    Attributes:
        rank: None if no singular value is CLEAR times the next one: then the rank is at least `limit`, or noise
            hides it.
        gap: largest ratio of neighbouring singular values.
        limit: highest rank that a block of this size can show.
        sigma: singular values, falling.
    """

    rank: int | None
    gap: float
    limit: int
    sigma: Tensor


def recovered_rank(log_p_Nm: Tensor) -> Recovered:
    """The rank of a head from log-probabilities [N, m] of the same m tokens in N contexts."""
    x = log_p_Nm.double()
    x = x - x.mean(1, keepdim=True)
    x = x - x.mean(0, keepdim=True)
    sigma = torch.linalg.svdvals(x)
    limit = min(x.shape) - 2  # centring takes one direction, and one more must be left to show the noise
    if limit < 1 or sigma[0] == 0:
        return Recovered(None, 1.0, max(limit, 0), sigma)
    # singular values below rounding of float64 are zeros, and the first of them ends the spectrum
    floor = sigma[0] * torch.finfo(torch.float64).eps * max(x.shape)
    ratios = sigma[:limit] / sigma[1 : limit + 1].clamp(min=floor)
    best = int(ratios.argmax())
    gap = ratios[best].item()
    return Recovered(best + 1 if gap >= CLEAR else None, gap, limit, sigma)


def common_block(ids_Nk: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Contexts and tokens such that the top k of every context contain every token; the smaller of both numbers is
    maximised.

    Tokens are taken in the order of how many contexts have them, which is a heuristic: the exact problem is NP-hard.

    Args:
        ids_Nk: the k known tokens of each context.
    Returns: indices of contexts, ids of tokens.
    """
    counts = torch.bincount(ids_Nk.flatten(), minlength=vocab_size)
    tokens = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    known = torch.zeros(len(ids_Nk), vocab_size, dtype=torch.bool).scatter_(
        1, ids_Nk, torch.ones_like(ids_Nk, dtype=torch.bool)
    )
    # how many of the most frequent tokens each context has before it lacks one
    reach_N = known[:, tokens].int().cumprod(1).sum(1)
    sizes = reach_N.sort(descending=True).values
    both = torch.minimum(sizes, torch.arange(1, len(sizes) + 1))
    width = int(sizes[int(both.argmax())])
    return (reach_N >= width).nonzero().flatten(), tokens[:width]

"""Heads over the most frequent tokens only: which tokens they are, and what becomes of the others.

FR-Spec (Zhao et al. 2025, arXiv 2502.14856) drafts with the rows of the K most frequent tokens. Served, the other
tokens have probability 0. Here they share the probability `REST` evenly, whatever h is, so that the loss of a text that
holds them is finite; the gradients of the kept logits are those of a softmax over the K tokens, times 1 - REST where a
teacher is imitated.

Dims: n tokens, K kept rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from bottleneck.core.errors import check

REST = 1e-6  # probability of all tokens together that have no row


def most_frequent(mean_V: Tensor, rows: int) -> Tensor:
    """Ids [K] of the tokens of largest expected frequency, ascending. Args: mean_V: see `calibration.Calibration`."""
    return mean_V.topk(rows).indices.sort().values


def over_vocabulary(kept_nK: Tensor, tokens_K: Tensor, vocab_size: int) -> Tensor:
    """Logits [n, V] from those of the kept tokens; the others get the probability `REST` together."""
    others = vocab_size - len(tokens_K)
    if not others:
        return kept_nK
    level = math.log(REST / (1 - REST) / others)
    rest_n = torch.logsumexp(kept_nK, -1, keepdim=True) + level
    return rest_n.expand(-1, vocab_size).index_copy(1, tokens_K, kept_nK)


def refuses(rows: int) -> Optional[str]:
    """Why the option is impossible."""
    return None if rows >= 1 else f"rows={rows}: must be at least 1"


def kept(rows: int, vocab_size: int, usual: int) -> int:
    """Number of kept rows; a vocabulary smaller than the usual number keeps all. Raises UserError for any other number
    above the vocabulary's size.
    """
    check(rows <= vocab_size or rows == usual, f"rows={rows}: allowed are 1 to {vocab_size}, the vocabulary's size")
    return min(rows, vocab_size)


def draft_to_target(tokens_K: Tensor) -> Tensor:
    """vLLM's `d2t` [K], int64: what is added to a row's number to give the id of its token."""
    return tokens_K.long().cpu() - torch.arange(len(tokens_K))

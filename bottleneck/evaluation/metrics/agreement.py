"""Agreement of a head with the original head. p is the original head's distribution at a token, q the head's.

In a run with a target (`head.teacher=model:PATH`) p is the target's distribution.

Dims: n tokens of a chunk, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bottleneck.core.extensions import METRICS, Metric, Predictions


def kl(original: Predictions, head: Predictions) -> Tensor:
    """Σ_v p_v log(p_v / q_v) of each token [n], nats."""
    return (original.log_p_nV - head.log_p_nV).mul_(original.p_nV).sum(-1)


def top1_agreement(original: Predictions, head: Predictions) -> Tensor:
    """1 where both heads have the same most likely token, else 0: [n]."""
    return (original.top_nK[:, 0] == head.top_nK[:, 0]).float()


def top5_agreement(original: Predictions, head: Predictions) -> Tensor:
    """Share of the original head's five most likely tokens that are among the head's five: [n]."""
    return (original.top_nK[:, :, None] == head.top_nK[:, None, :]).any(-1).float().mean(-1)


def acceptance(original: Predictions, head: Predictions) -> Tensor:
    """Σ_v min(p_v, q_v) of each token [n] (Leviathan et al. 2023, Corollary 3.6)."""
    return torch.minimum(original.log_p_nV, head.log_p_nV).exp_().sum(-1)


METRICS.register(
    Metric(
        name="kl",
        summary="KL divergence of the head's distribution from the original head's, nats a token",
        measure=kl,
        title="KL",
        unit="KL from the original head or target, nats",
        better="lower",
        scale="log",
        order=0,
    )
)
METRICS.register(
    Metric(
        name="top1_agreement",
        summary="share of tokens at which both heads have the same most likely token",
        measure=top1_agreement,
        title="top-1",
        unit="share of tokens",
        better="higher",
        form=".1%",
        scale="share",
        line="dashed",
        order=1,
    )
)
METRICS.register(
    Metric(
        name="top5_agreement",
        summary="share of the original head's five most likely tokens that are among the head's five",
        measure=top5_agreement,
        title="top-5",
        unit="share of tokens",
        better="higher",
        form=".1%",
        scale="share",
        line="dotted",
        table=False,
        order=2,
    )
)
METRICS.register(
    Metric(
        name="acceptance",
        summary="how often a token drafted by the head would be accepted in speculative decoding",
        measure=acceptance,
        title="accept",
        unit="share of tokens",
        better="higher",
        form=".1%",
        scale="share",
        order=3,
    )
)

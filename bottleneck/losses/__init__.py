"""Cross-entropy of a low-rank head, without ever holding its N x V logits."""

from bottleneck.losses.choice import choose, loss_names, usable
from bottleneck.losses.linear import Weights, linear_cross_entropy, logit_step, step, targets, weights

__all__ = [
    "Weights",
    "choose",
    "linear_cross_entropy",
    "logit_step",
    "loss_names",
    "step",
    "targets",
    "usable",
    "weights",
]

"""Cross-entropy of a low-rank head, without ever holding its N x V logits."""

from bottleneck.losses.linear import IMPLS, linear_cross_entropy

__all__ = ["IMPLS", "linear_cross_entropy"]

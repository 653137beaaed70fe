"""`sigsoftmax`: p_v ∝ exp(s_v) σ(s_v) with s = A B h (Kanai et al. 2018, Sec. 3.4); log p exceeds rank R.

Dims: n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads.head import FUSIBLE, Pointwise


class Sigsoftmax(Pointwise):
    """Parameters A [V, R], B [R, D]; logits = s + log σ(s)."""

    def f(self, s_nV: Tensor) -> Tensor:
        """The logarithm of exp(s) σ(s)."""
        return s_nV + logsigmoid(s_nV)


KIND = HEAD_KINDS.register(HeadKind("sigsoftmax", "p ∝ exp(s) σ(s) with s = A B h", Sigsoftmax, impls=FUSIBLE))

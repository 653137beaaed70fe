"""`sigsoftmax`: p_v ∝ exp(s_v) σ(s_v) with s = A B h (Kanai et al. 2018, Sec. 3.4); log p exceeds rank R.

Dims: n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from bottleneck.core.extensions import HEAD_KINDS, HeadKind
from bottleneck.heads.head import Factored, product


class Sigsoftmax(Factored):
    """Parameters A [V, R], B [R, D]; logits = s + log σ(s)."""

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V]: the logarithm of exp(s) σ(s)."""
        s_nV = product(self.states(h_nD), self.A)
        return s_nV + logsigmoid(s_nV)


KIND = HEAD_KINDS.register(HeadKind("sigsoftmax", "p ∝ exp(s) σ(s) with s = A B h", Sigsoftmax))

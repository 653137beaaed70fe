"""`scaled`: random factors whose logits have unit variance.

B ~ N(0, 1/(D·s²)) with s² the mean square of an entry of h, and A ~ N(0, 1/R).

Dims: D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

from bottleneck.core.extensions import STARTS, Start
from bottleneck.heads.key import HeadKey
from bottleneck.heads.starting import Factors, StartInputs
from bottleneck.heads.starts.normal import draw


def make(inputs: StartInputs) -> Callable[[HeadKey], Factors]:
    """The draws of `normal`, scaled."""
    D = inputs.head.W_VD.shape[1]

    def start(key: HeadKey) -> Factors:
        A, B = draw(inputs, key)
        return A / key.rank**0.5, B / (D * inputs.moments.mean_square) ** 0.5

    return start


START = STARTS.register(Start("scaled", "random: logits of unit variance", make, closed_form=False))

"""`normal`: A and B from N(0, 1), as the paper states it, for comparison (Godey et al. 2024, Sec. 5.1).

Logits then have standard deviation √(R·D)·s for hidden states whose entries have mean square s².

Dims: D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bottleneck.core.extensions import STARTS, Start
from bottleneck.heads.key import HeadKey, generator
from bottleneck.heads.starting import Factors, StartInputs


def draw(inputs: StartInputs, key: HeadKey) -> Factors:
    """A [V, R] and B [R, D] from N(0, 1), a function of rank and seed only."""
    V, D = inputs.head.W_VD.shape
    g = generator(key)
    return torch.randn(V, key.rank, generator=g), torch.randn(key.rank, D, generator=g)


def make(inputs: StartInputs) -> Callable[[HeadKey], Factors]:
    """`draw` for each key."""
    return lambda key: draw(inputs, key)


START = STARTS.register(Start("normal", "random: A, B ~ N(0, 1), as in the paper", make, closed_form=False))

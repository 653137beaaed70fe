"""`ce`: cross-entropy of the next token in the data.

Dims: n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor
from torch.nn.functional import cross_entropy

from bottleneck.core.extensions import OBJECTIVES, Objective


def loss(logits_nV: Tensor, y_n: Tensor, log_teacher_nV: Optional[Tensor], options: Mapping[str, Any]) -> Tensor:
    """−log softmax(s)_y of every token [n], nats. Low-rank heads run `losses.step`, which computes the same faster."""
    return cross_entropy(logits_nV, y_n, reduction="none")


OBJECTIVE = OBJECTIVES.register(Objective("ce", "cross-entropy on the data", loss, impls=None))

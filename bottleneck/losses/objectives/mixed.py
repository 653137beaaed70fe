"""`mixed`: distillation and cross-entropy together: mix · T² · KL + (1 − mix) · cross-entropy (Hinton et al. 2015).

Dims: n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor
from torch.nn.functional import cross_entropy

from bottleneck.core.extensions import OBJECTIVES, Objective
from bottleneck.losses.objectives.distill import kl


def loss(logits_nV: Tensor, y_n: Tensor, log_teacher_nV: Optional[Tensor], options: Mapping[str, Any]) -> Tensor:
    """The weighted sum of both [n]; cross-entropy is taken at temperature 1."""
    assert log_teacher_nV is not None
    m = options["mix"]
    teacher = kl(logits_nV, log_teacher_nV, options["temperature"])
    return m * teacher + (1 - m) * cross_entropy(logits_nV, y_n, reduction="none")


OBJECTIVE = OBJECTIVES.register(
    Objective(
        "mixed",
        "mix · T² · KL from the teacher + (1 − mix) · cross-entropy on the data",
        loss,
        teacher=True,
        options={"temperature": 1.0, "mix": 0.5},
        fast=lambda options: {"temperature": options["temperature"], "mix": options["mix"]},
    )
)

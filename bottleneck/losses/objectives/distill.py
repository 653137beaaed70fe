"""`distill`: the KL divergence from a teacher, the original head or another one (Hinton et al. 2015).

Dims: n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from bottleneck.core.extensions import OBJECTIVES, Objective


def kl(logits_nV: Tensor, log_teacher_nV: Tensor, temperature: float) -> Tensor:
    """T² · KL(p ‖ softmax(s / T)) of every token [n], nats, with log p given at the temperature T.

    The factor T² keeps the gradient's size about independent of T, since softmaxes at T have gradients of order 1 / T².
    """
    log_q = torch.log_softmax(logits_nV / temperature, -1)
    return temperature**2 * (log_teacher_nV.exp() * (log_teacher_nV - log_q)).sum(-1)


def loss(logits_nV: Tensor, y_n: Tensor, log_teacher_nV: Optional[Tensor], options: Mapping[str, Any]) -> Tensor:
    """The KL alone; targets decide only which tokens count."""
    assert log_teacher_nV is not None
    return kl(logits_nV, log_teacher_nV, options["temperature"])


OBJECTIVE = OBJECTIVES.register(
    Objective(
        "distill",
        "T² · KL from the teacher's softmax, both at temperature T",
        loss,
        teacher=True,
        options={"temperature": 1.0},
        fast=lambda options: {"temperature": options["temperature"]},
    )
)

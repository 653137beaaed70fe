"""An objective bound to a run's options and teacher, and the training step of low-rank heads for it.

Objectives are declared in `losses/objectives`, one file each. Cross-entropy alone does not pass through here: see
`losses.step`.

Dims: N tokens, n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from bottleneck.core.extensions import Objective
from bottleneck.losses import distill
from bottleneck.losses.chunked import chunk_rows
from bottleneck.losses.distill import head_logits
from bottleneck.losses.linear import Weights
from bottleneck.losses.products import add_product, matmul_f32

__all__ = ["BoundObjective", "head_logits", "steps"]
Logits = Callable[[Tensor], Tensor]  # hidden states [n, D] -> logits [n, V], float32


@dataclass(frozen=True)
class BoundObjective:
    """An objective of one run.

    Attributes:
        options: the values of the declared options.
        teacher_logits: the teacher's logits; None if the objective has no teacher, or if the teacher is the bank's head
            of rank D, which learns from the data at the same time: see `heads.HeadBank`.
        whose: description of the teacher, for messages.
        states_ND: of a teacher that is another model: its hidden states of the tokens in hand, which `teacher_logits`
            then reads; their width is its own. None: the teacher reads the heads' hidden states.
    """

    declared: Objective
    options: Mapping[str, Any]
    teacher_logits: Optional[Logits] = None
    whose: str = "the original head"
    states_ND: Optional[Tensor] = None

    def read_by_teacher(self, h_ND: Tensor) -> Tensor:
        """What the teacher reads where the heads read h, row by row."""
        return h_ND if self.states_ND is None else self.states_ND

    def log_teacher(self, h_nD: Tensor) -> Optional[Tensor]:
        """Log-probabilities [n, V] of the teacher at the objective's temperature, float32; None without a teacher.

        Args: h_nD: rows of `read_by_teacher`.
        """
        if not self.declared.teacher:
            return None
        assert self.teacher_logits is not None
        with torch.no_grad():
            logits, T = self.teacher_logits(h_nD), self.options.get("temperature", 1.0)
            return torch.log_softmax(logits if T == 1 else logits / T, -1)

    def loss(self, logits_nV: Tensor, y_n: Tensor, log_teacher_nV: Optional[Tensor]) -> Tensor:
        """Loss [n] of the definition, differentiable."""
        return self.declared.loss(logits_nV, y_n, log_teacher_nV, self.options)


def steps(
    h_ND: Tensor,
    heads: list[Weights],
    y_N: Tensor,
    gradients: list[tuple[Tensor, Tensor]],
    scale: float,
    o: BoundObjective,
) -> Tensor:
    """Losses [H, N] of low-rank heads on the same tokens; adds scale · the gradient of each sum to its `gradients`.

    Args:
        y_N: from `linear.targets`; tokens with -1 contribute nothing.
        gradients: (dA [V, R], dB [R, D]) of each head.
    """
    if o.declared.fast is not None:
        assert o.teacher_logits is not None
        goal = distill.Distillation(o.teacher_logits, **o.declared.fast(o.options))
        if goal.overlap is None or all(w.impl == "fused" for w in heads):
            return distill.steps(h_ND, heads, y_N, gradients, scale, goal, o.read_by_teacher(h_ND))
    N, V = len(h_ND), len(heads[0].A)
    losses = torch.zeros(len(heads), N, dtype=torch.float32, device=h_ND.device)
    rows = max(1, chunk_rows(V, h_ND.device.type) // 2)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        h, y = h_ND[part], y_N[part]
        log_teacher, keep = o.log_teacher(o.read_by_teacher(h_ND)[part]), (y >= 0)[:, None]
        for w, (dA, dB), loss in zip(heads, gradients, losses[:, part]):
            z = h @ w.B.T
            found, G = logit_gradient(o, matmul_f32(z, w.A.T), y.clamp(min=0).long(), log_teacher)
            loss.copy_(found.masked_fill(~keep[:, 0], 0.0))
            G = G.to(z.dtype)
            add_product(dA, G.T, (z * keep)[:, : w.rank], scale)
            add_product(dB, ((G @ w.A) * keep)[:, : w.rank].T, h, scale)
    return losses


def logit_gradient(
    o: BoundObjective, logits_nV: Tensor, y_n: Tensor, log_teacher_nV: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """Loss [n] and its gradient at the logits [n, V], by autograd of the definition."""
    with torch.enable_grad():
        leaf = logits_nV.detach().requires_grad_()
        loss = o.loss(leaf, y_n, log_teacher_nV)
        (G,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), G

"""The readable definition that every other implementation is tested against: logits in full, gradients by autograd.

Dims: N tokens, D hidden size, R rank, V vocabulary. W_VD = A_VR @ B_RD.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from bottleneck.core.extensions import LOSSES, Loss


def reference(h_ND: Tensor, A_VR: Tensor, B_RD: Tensor, y_N: Tensor, reduction: str, ignore_index: int) -> Tensor:
    """PyTorch's cross-entropy in float32; the products run in the dtype of h."""
    z_NR = h_ND @ B_RD.to(h_ND.dtype).T
    logits_NV = z_NR @ A_VR.to(h_ND.dtype).T
    return F.cross_entropy(logits_NV.float(), y_N.long(), ignore_index=ignore_index, reduction=reduction)


def step(
    z_NR: Tensor, A_VR: Tensor, y_N: Tensor, dA_VR: Optional[Tensor], scale: float, memory: int
) -> tuple[Tensor, Optional[Tensor]]:
    """See `linear.logit_step`. Ignores `memory`: the logits are held in full."""
    grad = dA_VR is not None
    with torch.set_grad_enabled(grad):
        z, A = (t.detach().requires_grad_(grad) for t in (z_NR, A_VR))
        loss_N = F.cross_entropy((z @ A.T).float(), y_N.long(), ignore_index=-1, reduction="none")
        if dA_VR is None:
            return loss_N, None
        dz, dA = torch.autograd.grad(loss_N.sum(), (z, A))
    dA_VR.add_(dA, alpha=scale)
    return loss_N.detach(), dz


LOSSES.register(Loss("reference", "logits in full, on any device; for checking the others", step))

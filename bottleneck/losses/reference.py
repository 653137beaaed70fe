"""The readable definition that every other implementation is tested against.

Dims: N tokens, D hidden size, R rank, V vocabulary. W_VD = A_VR @ B_RD.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(h_ND: Tensor, A_VR: Tensor, B_RD: Tensor, y_N: Tensor, reduction: str, ignore_index: int) -> Tensor:
    """Logits in full, then PyTorch's cross-entropy in float32; gradients by autograd."""
    z_NR = h_ND @ B_RD.to(h_ND.dtype).T
    logits_NV = z_NR @ A_VR.to(h_ND.dtype).T
    return F.cross_entropy(logits_NV.float(), y_N, ignore_index=ignore_index, reduction=reduction)

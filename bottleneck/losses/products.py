"""Matrix products with float32 results, also for 16-bit operands (accumulated in float32, not rounded in between)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def matmul_f32(a: Tensor, b: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """a @ b in float32.

    Args: out: a float32 buffer that may be used for the result; saves a CPU the page faults of fresh memory.
    """
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """out += scale · a @ b, `out` in float32; no temporary of its size."""
    if a.is_cuda and a.element_size() == 2:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, alpha=scale, out=out)
    else:
        out.addmm_(a.float(), b.float(), alpha=scale)

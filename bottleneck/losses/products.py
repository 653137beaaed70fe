"""Matrix products with float32 results, also for 16-bit operands (accumulated in float32, not rounded in between)."""

from __future__ import annotations

from typing import Any, Optional

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


def product(x_nR: Tensor, W_VR: Tensor) -> Tensor:
    """x Wᵀ [n, V], differentiable, for use in `heads.Head.logits`.

    16-bit x are multiplied with W rounded to their dtype; sums, result and the gradient of W are float32, as in the
    other losses.
    """
    if x_nR.dtype in (torch.float32, torch.float64):
        return x_nR @ W_VR.to(x_nR.dtype).T
    result: Tensor = _Product.apply(x_nR, W_VR)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nR: Tensor, W_VR: Tensor) -> Tensor:
        ctx.save_for_backward(x_nR, W_VR)
        return matmul_f32(x_nR, W_VR.to(x_nR.dtype).T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
        x_nR, W_VR = ctx.saved_tensors
        G_nV = grads[0].to(x_nR.dtype)
        dx = G_nV @ W_VR.to(x_nR.dtype) if ctx.needs_input_grad[0] else None
        dW = None
        if ctx.needs_input_grad[1]:
            dW = torch.zeros_like(W_VR)
            add_product(dW, G_nV.T, x_nR, 1.0)
        return dx, dW

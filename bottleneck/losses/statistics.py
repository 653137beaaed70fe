"""Two numbers of a row of logits, without the row: the target's logit and log Σ exp, differentiable, by fused kernels.

A head whose probabilities are built of softmaxes (a mixture, a softmax over several blocks, a bias) can write its loss
in these numbers of each of its factorised parts, in plain PyTorch on tensors of N entries:

    own_n = z_n·a_y        lse_n = log Σ_v exp(z_n·a_v)

Autograd then asks for the gradient of both. With incoming gradients g_own and g_lse, and p the softmax of the part,

    dz_n = g_lse Σ_v p_v a_v + g_own a_y         dA_v = Σ_n (g_lse p_nv + g_own [y_n = v]) z_n

The forward pass is `kernels.scan`, the backward pass `statistic_kernels.spread`: the cost of a step of a low-rank head.

Dims: N tokens, R rank, V vocabulary of the part, S parts of V.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
from torch import Tensor

import bottleneck.losses.kernels as kernels
import bottleneck.losses.statistic_kernels as statistic_kernels
from bottleneck.losses import fused

LOG2E = 1.4426950408889634
# two weights a token take registers: at 128 tokens a tile `spread` of rank 128 keeps 76 bytes a thread in memory
SPREAD = {**fused.SPREAD, 128: fused.Tile(64, 64, 4, 3)}


def statistics(z_NR: Tensor, A_VR: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return own [N] and lse [N] of the logits z Aᵀ in float32, differentiable in z and A.

    Args:
        z_NR: states; products run in their dtype.
        A_VR: rows of the part's entries; rank at most `fused.FLASH_RANK`.
        y_N: int32, places in the part; -1: the target is elsewhere, and own is 0.
    """
    own, lse = _Statistics.apply(z_NR, A_VR, y_N)
    return own, lse


def padded(z_NR: Tensor, A_VR: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of z, with zeros up to the rank that the kernels take."""
    # Triton's interpreter gets products of bfloat16 wrong
    dtype = torch.float32 if fused.INTERPRETED else z_NR.dtype
    extra = fused.padded_rank(A_VR.shape[1]) - A_VR.shape[1]
    z, A = (torch.nn.functional.pad(t.to(z_NR.dtype).to(dtype), (0, extra)).contiguous() for t in (z_NR, A_VR))
    return z, A


def merged(
    m_SN: Tensor, l_SN: Tensor, acc_SNR: Optional[Tensor], own_N: Tensor, here_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Join the parts of a scan, which leaves the target out, with the target.

    Args: own_N: logits of the targets, where `here_N`; acc_SNR: Σ exp(s − m) · a row.
    Returns: lse [N], Σ_{v≠y} p_v [N], and Σ_{v≠y} p_v · a row [N, R] (`own_N` without acc).
    """
    top = torch.where(here_N, own_N, float("-inf")).maximum(m_SN.amax(0))
    shares = (m_SN - top).exp()
    others = (shares * l_SN).sum(0)
    total = others + torch.where(here_N, (own_N - top).exp(), 0.0)
    rest = own_N if acc_SNR is None else ((shares / total)[..., None] * acc_SNR).sum(0)
    return top + total.log(), others / total, rest


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_NR: Tensor, A_VR: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        grad = any(ctx.needs_input_grad)
        z, A = padded(z_NR, A_VR)
        with torch.cuda.device_of(z):
            own, lse, rest = _scan(z, A, y_N, grad)
        if grad:
            ctx.save_for_backward(z, A, y_N, own, lse, rest)
            ctx.rank, ctx.dtypes = A_VR.shape[1], (z_NR.dtype, A_VR.dtype)
        return own, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Optional[Tensor], Optional[Tensor], None]:
        z, A, y, own, lse, rest = ctx.saved_tensors
        g_own, g_lse = (g.float().contiguous() for g in gradients)
        here = y >= 0
        dz = dA = None
        if ctx.needs_input_grad[0]:
            # the target's own terms stay in float32: they nearly cancel where the head is certain
            share = torch.where(here, g_lse * (own - lse).exp() + g_own, 0.0)
            target_NR = A[y.clamp(min=0).long()].float()
            dz = (g_lse[:, None] * rest + share[:, None] * target_NR)[:, : ctx.rank].to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dA = torch.empty(len(A), ctx.rank, dtype=torch.float32, device=A.device)
            with torch.cuda.device_of(z):
                _spread(z, A, y, lse, g_own, g_lse, dA)
            dA = dA.to(ctx.dtypes[1])
        return dz, dA, None


def _scan(z: Tensor, A: Tensor, y: Tensor, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """own [N], lse [N] and, with `grad`, Σ_{v≠y} p_v a_v [N, R]; float32."""
    (N, R), V = z.shape, len(A)
    t = fused.tile(fused.SCAN, R, z)
    blocks, S, part = fused.parts(N, V, t, z.device)
    m, l = torch.empty(2, S, N, dtype=torch.float32, device=z.device)
    acc = torch.empty(S, N, R, dtype=torch.float32, device=z.device) if grad else m
    kernels.scan[(blocks, S)](
        z, A, y, m, l, acc, N, V, part, R=R, BN=t.tokens, BV=t.entries, GRAD=grad, PRECISE=z.dtype == torch.float32,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    here = y >= 0
    own = torch.where(here, (z.float() * A[y.clamp(min=0).long()].float()).sum(-1), 0.0)
    lse, _, rest = merged(m, l, acc if grad else None, own, here)
    return own, lse, rest


def _spread(z: Tensor, A: Tensor, y: Tensor, lse: Tensor, g_own: Tensor, g_lse: Tensor, dA: Tensor) -> None:
    (N, R), V = z.shape, len(A)
    t = fused.tile(SPREAD, R, z)
    statistic_kernels.spread[(triton.cdiv(V, t.entries),)](
        z, A, y, lse * LOG2E, g_own, g_lse, dA, N, V, dA.shape[1], R=R, BN=t.tokens, BV=t.entries,
        PRECISE=z.dtype == torch.float32, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip

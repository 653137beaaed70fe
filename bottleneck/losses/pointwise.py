"""`losses.statistics` of a softmax of f(s), s = z Aᵀ, for an increasing function f of one number, by fused kernels.

    own_n = f(s_ny)        lse_n = log Σ_v exp f(s_nv)

With incoming gradients g_own and g_lse, p the softmax, and c_nv = g_lse p_nv + g_own [y_n = v],

    dz_n = Σ_v c_nv f'(s_nv) a_v        dA_v = Σ_n c_nv f'(s_nv) z_n        dθ = Σ_nv c_nv ∂f(s_nv)/∂θ

for a parameter θ of f. Two functions are known: s + log σ(s), without parameters, and a piecewise linear one. The
gradient of its slopes takes one more pass, over chunks of logits in memory: a sum over all logits for each piece.

Dims: N tokens, n tokens of a chunk, R rank, V vocabulary, K pieces, S parts of V.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import triton
from torch import Tensor
from torch.nn.functional import logsigmoid

import bottleneck.losses.pointwise_kernels as kernels
from bottleneck.losses import fused
from bottleneck.losses.products import matmul_f32
from bottleneck.losses.statistics import LOG2E, merged, padded

CHUNK_BYTES = 96 << 20  # of float32 logits, for the gradient of slopes
STEP = 256  # entries that a program of `bend` adds at a time: two a thread
MOST_PIECES = 64  # of a program of `bend`: registers of a thread
PROGRAMS = 2048  # of `bend`, at least: they fill any card a few times
# f and f' of a tile take registers: with the tiles of a plain softmax, up to 512 bytes a thread are in memory
SCAN = {**fused.SCAN, 128: fused.Tile(64, 64, 4, 3, 2)}
SPREAD = {**fused.SPREAD, 64: fused.Tile(64, 64, 4, 3), 128: fused.Tile(64, 64, 4, 3)}


class _Map(NamedTuple):
    """f as the kernels read it: K pieces from `low`, each `width` long; tables of f at the left knots, and of slopes.

    Without pieces (width 0): s + log σ(s); the tables are not read.
    """

    below: Tensor
    slopes: Tensor
    low: float
    width: float

    @property
    def scalars(self) -> tuple[float, float, float, float]:
        return self.low, 1 / self.width if self.width else 0.0, self.width, float(len(self.slopes) - 1)

    def __call__(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """f(s) and f'(s), elementwise."""
        if not self.width:
            return s + logsigmoid(s), 1 + torch.sigmoid(-s)
        piece = ((s - self.low) / self.width).floor().clamp(0, len(self.slopes) - 1).nan_to_num(0).long()
        slope = self.slopes[piece]
        return self.below[piece] + slope * (s - self.low - piece * self.width), slope


def statistics(
    z_NR: Tensor, A_VR: Tensor, y_N: Tensor, slopes_K: Optional[Tensor] = None, limit: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return own [N] and lse [N] of f(z Aᵀ) in float32, differentiable in z, A and the slopes.

    Args:
        z_NR: states; products run in their dtype.
        A_VR: rows of the entries; rank at most `fused.FLASH_RANK`.
        y_N: targets; -1: own is 0.
        slopes_K: positive slopes of equal pieces of [-limit, limit]; f(-limit) = -limit, and the outer slopes continue
            beyond the ends. None: f(s) = s + log σ(s).
    """
    own, lse = _Pointwise.apply(z_NR, A_VR, y_N, slopes_K, limit)
    return own, lse


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_NR: Tensor, A_VR: Tensor, y_N: Tensor, slopes_K: Optional[Tensor], limit: float
    ) -> tuple[Tensor, Tensor]:
        grad = any(ctx.needs_input_grad)
        z, A = padded(z_NR, A_VR)
        if slopes_K is None:
            f = _Map(z, z, 0.0, 0.0)
        else:
            slopes, width = slopes_K.float().contiguous(), 2 * limit / len(slopes_K)
            below = torch.cat([slopes.new_zeros(1), slopes.cumsum(0)[:-1]]) * width - limit
            f = _Map(below, slopes, -limit, width)
        with torch.cuda.device_of(z):
            own, lse, miss, rest, s_own = _scan(z, A, y_N, f, grad)
        if grad:
            ctx.save_for_backward(z, A, y_N, lse, miss, rest, s_own, f.below, f.slopes)
            ctx.map, ctx.rank, ctx.dtypes = (f.low, f.width), A_VR.shape[1], (z_NR.dtype, A_VR.dtype)
        return own, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Optional[Tensor], ...]:
        z, A, y, lse, miss, rest, s_own, below, slopes = ctx.saved_tensors
        f = _Map(below, slopes, *ctx.map)
        g_own, g_lse = (g.float().contiguous() for g in gradients)
        # c of the target, exact where the head is certain: g_own and g_lse p_y nearly cancel there, 1 − p_y is known
        share = torch.where(y >= 0, (g_own + g_lse) - g_lse * miss, 0.0)
        dz = dA = d_slopes = None
        if ctx.needs_input_grad[0]:
            target_NR = A[y.clamp(min=0).long()].float()
            dz = g_lse[:, None] * rest + (share * f(s_own)[1])[:, None] * target_NR
            dz = dz[:, : ctx.rank].to(ctx.dtypes[0])
        with torch.cuda.device_of(z):
            if ctx.needs_input_grad[1]:
                dA = _spread(z, A, y, f, lse, share, g_lse, ctx.rank).to(ctx.dtypes[1])
            if ctx.needs_input_grad[3]:
                d_slopes = _bend(z, A, y, f, lse, g_lse) + _own_bend(s_own, share, f)
        return dz, dA, None, d_slopes, None


def _scan(z: Tensor, A: Tensor, y: Tensor, f: _Map, grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """own, lse, Σ_{v≠y} p_v [N], with `grad` Σ_{v≠y} p_v f'(s_v) a_v [N, R], and the target's s [N]; float32."""
    (N, R), V = z.shape, len(A)
    t = fused.tile(SCAN, R, z)
    blocks, S, part = fused.parts(N, V, t, z.device)
    m, l = torch.empty(2, S, N, dtype=torch.float32, device=z.device)
    acc = torch.empty(S, N, R, dtype=torch.float32, device=z.device) if grad else m
    kernels.scan[(blocks, S)](
        z, A, y, f.below, f.slopes, m, l, acc, *f.scalars, N, V, part, R=R, BN=t.tokens, BV=t.entries,
        PIECES=f.width > 0, GRAD=grad, PRECISE=z.dtype == torch.float32, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    here = y >= 0
    s_own = (z.float() * A[y.clamp(min=0).long()].float()).sum(-1)
    own = torch.where(here, f(s_own)[0], 0.0)
    return own, *merged(m, l, acc if grad else None, own, here), s_own


def _spread(
    z: Tensor, A: Tensor, y: Tensor, f: _Map, lse: Tensor, share: Tensor, g_lse: Tensor, columns: int
) -> Tensor:
    (N, R), V = z.shape, len(A)
    t = fused.tile(SPREAD, R, z)
    dA = torch.empty(V, columns, dtype=torch.float32, device=z.device)
    kernels.spread[(triton.cdiv(V, t.entries),)](
        z, A, y, f.below, f.slopes, lse * LOG2E, share, g_lse, dA, *f.scalars, N, V, columns, R=R, BN=t.tokens,
        BV=t.entries, PIECES=f.width > 0, PRECISE=z.dtype == torch.float32, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return dA


def _bend(z: Tensor, A: Tensor, y: Tensor, f: _Map, lse: Tensor, g_lse: Tensor) -> Tensor:
    """Σ_n Σ_{v≠y} g_lse p_nv ∂f(s_nv)/∂slope_k [K], a chunk of logits at a time."""
    N, V, K = len(z), len(A), len(f.slopes)
    rows = min(N, max(16, CHUNK_BYTES // (4 * V)))
    segment = triton.cdiv(triton.cdiv(V, triton.cdiv(PROGRAMS, rows)), STEP) * STEP
    segments = triton.cdiv(V, segment)
    BK = max(16, min(MOST_PIECES, triton.next_power_of_2(K)))
    base2 = lse * LOG2E
    total = torch.zeros(K, dtype=torch.float32, device=z.device)
    for start in range(0, N, rows):
        at = slice(start, start + rows)
        s = matmul_f32(z[at], A.T)
        out = torch.empty(len(s) * segments, K, dtype=torch.float32, device=z.device)
        kernels.bend[(len(s), segments, triton.cdiv(K, BK))](
            s, y[at], f.below, f.slopes, base2[at], g_lse[at], out, *f.scalars, V, segment, s.stride(0), K,
            BK=BK, T=STEP, num_warps=4,
        )  # fmt: skip
        total += out.sum(0)
    return total


def _own_bend(s: Tensor, share: Tensor, f: _Map) -> Tensor:
    """Σ_n share_n ∂f(s_n)/∂slope_k [K]."""
    left = f.low + f.width * torch.arange(len(f.slopes), device=s.device)
    least, most = torch.zeros_like(left), torch.full_like(left, f.width)
    least[0], most[-1] = float("-inf"), float("inf")
    return (share[:, None] * (s[:, None] - left).clamp(least, most)).sum(0)

"""Triton kernel of the backward pass of `losses.statistics`; its forward pass is `kernels.scan`.

No atomics: equal inputs give equal bits. Dims: N tokens, R rank padded with zeros to a power of two from 16, V
vocabulary, BN and BV rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bottleneck.losses.kernels import LOG2E, _add_product, _product


@triton.jit
def spread(
    z_ptr,
    A_ptr,
    y_ptr,
    lse_ptr,
    own_ptr,
    weight_ptr,
    dA_ptr,
    N,
    V,
    width,
    R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """dA [V, width] = Σ_n (weight_n p_nv + own_n [y_n = v]) z_n for a block of entries. lse: of base 2."""
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    ranks = tl.arange(0, R)
    a = tl.load(A_ptr + cols[:, None].to(tl.int64) * R + ranks[None, :], mask=cols[:, None] < V, other=0.0)
    acc = tl.zeros([BV, R], tl.float32)
    for n0 in range(0, N, BN):
        rows = n0 + tl.arange(0, BN)
        inside = rows < N
        z = tl.load(z_ptr + rows[:, None] * R + ranks[None, :], mask=inside[:, None], other=0.0)
        lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
        y = tl.load(y_ptr + rows, mask=inside, other=-1).to(tl.int32)
        own = tl.load(own_ptr + rows, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + rows, mask=inside, other=0.0)
        g = tl.exp2(_product(a, z, PRECISE) * LOG2E - lse[None, :]) * weight[None, :]
        g = tl.where(cols[:, None] == y[None, :], g + own[None, :], g)
        acc = _add_product(acc, g.to(z.dtype), z, PRECISE)
    at = dA_ptr + cols[:, None].to(tl.int64) * width + ranks[None, :]
    tl.store(at, acc, mask=(cols[:, None] < V) & (ranks[None, :] < width))

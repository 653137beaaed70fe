"""Triton kernels of `losses.pointwise`: a softmax of f(z Aᵀ) for an increasing function f of one number.

    scan     along V, for a block of tokens:    Σ_{v≠y} p_v,  Σ_{v≠y} p_v f'(s_v) a_v
    spread   along N, for a block of entries:   dA_v = Σ_n (v = y_n ? share_n : weight_n p_nv) f'(s_nv) z_n
    bend     along V, for one token:            Σ_{v≠y} weight p_v ∂f(s_v)/∂slope_k, from logits s in memory

No atomics: equal inputs give equal bits. Logarithms are of base 2 outside of f.

Dims: N tokens, R rank padded with zeros to a power of two from 16, V vocabulary, S parts of V, BN and BV rows of a
tile, K pieces, BK pieces of a block, T entries of a step.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from bottleneck.losses.kernels import LOG2E, _add_product, _product

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # knows no assembly


@triton.jit
def _lookup(ptr, index):
    """Entries of a small float32 table in the level-1 cache."""
    if INTERPRETED:
        return tl.load(ptr + index)
    # Triton pipelines a tl.load in a loop that holds a product, and fails where its address depends on another product
    return tl.inline_asm_elementwise(
        "ld.global.nc.f32 $0, [$1];",
        "=f,l",
        [ptr.to(tl.int64) + index.to(tl.int64) * 4],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _reciprocal(x):
    """1 / x of normal numbers, to 1 ulp; a division takes several times as many instructions."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _share_above(u, k):
    """clamp(u − k, 0, 1), one instruction."""
    if INTERPRETED:
        return tl.minimum(tl.maximum(u - k, 0.0), 1.0)
    return tl.inline_asm_elementwise(
        "sub.sat.f32 $0, $1, $2;", "=f,f,f", [u, k], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _mapped(s, below_ptr, slope_ptr, low, inverse, width, last, PIECES: tl.constexpr):
    """e, q and f'(s) with exp f(s) = q exp(e) and q in (½, 1], which saves a logarithm.

    PIECES: tables `below` and `slope` of pieces from `low`; else s + log σ(s), and the tables are not read.
    """
    if PIECES:
        # outside of the knots: the first and the last piece; the conversion truncates, which is floor from 0
        piece = tl.minimum(tl.maximum((s - low) * inverse, 0.0), last).to(tl.int32)
        slope = _lookup(slope_ptr, piece)
        e = _lookup(below_ptr, piece) + slope * (s - low - piece.to(tl.float32) * width)
        q = tl.full([1, 1], 1.0, tl.float32)
    else:
        small = tl.exp2(-tl.abs(s) * LOG2E)  # of −|s|: no overflow on either side
        q = _reciprocal(1.0 + small)
        e = s + tl.minimum(s, 0.0)
        slope = 1.0 + tl.where(s < 0.0, 1.0, small) * q  # 1 + σ(−s)
    return e, q, slope


@triton.jit
def _scan_tile(
    z,
    y,
    m,
    l,
    acc,
    A_ptr,
    below_ptr,
    slope_ptr,
    low,
    inverse,
    width,
    last,
    v0,
    V,
    R: tl.constexpr,
    BV: tl.constexpr,
    PIECES: tl.constexpr,
    GRAD: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One tile of `scan`: entries v0 … v0 + BV for a block of tokens."""
    cols = v0 + tl.arange(0, BV)
    at = A_ptr + cols[:, None].to(tl.int64) * R + tl.arange(0, R)[None, :]
    if TAIL:
        a = tl.load(at, mask=cols[:, None] < V, other=0.0)
    else:
        a = tl.load(at)
    e, q, slope = _mapped(_product(z, a, PRECISE), below_ptr, slope_ptr, low, inverse, width, last, PIECES)
    if TAIL:
        e = tl.where(cols[None, :] < V, e, float("-inf"))
    if tl.max(((y >= v0) & (y < v0 + BV)).to(tl.int32), 0) > 0:  # few tiles hold a target
        e = tl.where(cols[None, :] == y[:, None], float("-inf"), e)
    top = tl.maximum(m, tl.max(e, 1))
    base = tl.where(top == float("-inf"), 0.0, top * LOG2E)  # no entry so far but the target
    p = tl.exp2(e * LOG2E - base[:, None]) * q
    shrink = tl.exp2(m * LOG2E - base)
    l = l * shrink + tl.sum(p, 1)
    if GRAD:
        acc = _add_product(acc * shrink[:, None], (p * slope).to(a.dtype), a, PRECISE)
    return top, l, acc


@triton.jit
def scan(
    z_ptr,
    A_ptr,
    y_ptr,
    below_ptr,
    slope_ptr,
    m_ptr,
    l_ptr,
    acc_ptr,
    low,
    inverse,
    width,
    last,
    N,
    V,
    part,
    R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    PIECES: tl.constexpr,
    GRAD: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """As `kernels.scan` of f(s): m, l = Σ exp(f − m) [S, N]; with GRAD, acc = Σ exp(f − m) f'(s) a_v [S, N, R].

    m: within log 2 of the largest f.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    ranks = tl.arange(0, R)
    z = tl.load(z_ptr + rows[:, None] * R + ranks[None, :], mask=rows[:, None] < N, other=0.0)
    y = tl.load(y_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
    m = tl.full([BN], float("-inf"), tl.float32)
    l = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, R], tl.float32)
    first = split * part
    end = tl.minimum(first + part, V)
    whole = first + (end - first) // BV * BV
    for v0 in range(first, whole, BV):
        m, l, acc = _scan_tile(
            z, y, m, l, acc, A_ptr, below_ptr, slope_ptr, low, inverse, width, last, v0, V, R, BV, PIECES, GRAD, False,
            PRECISE,
        )  # fmt: skip
    if whole < end:
        m, l, acc = _scan_tile(
            z, y, m, l, acc, A_ptr, below_ptr, slope_ptr, low, inverse, width, last, whole, V, R, BV, PIECES, GRAD,
            True, PRECISE,
        )  # fmt: skip
    out = split.to(tl.int64) * N + rows
    tl.store(m_ptr + out, m, mask=rows < N)
    tl.store(l_ptr + out, l, mask=rows < N)
    if GRAD:
        tl.store(acc_ptr + out[:, None] * R + ranks[None, :], acc, mask=rows[:, None] < N)


@triton.jit
def spread(
    z_ptr,
    A_ptr,
    y_ptr,
    below_ptr,
    slope_ptr,
    lse_ptr,
    share_ptr,
    weight_ptr,
    dA_ptr,
    low,
    inverse,
    width,
    last,
    N,
    V,
    columns,
    R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """dA [V, columns] for a block of entries. lse: of base 2."""
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
        share = tl.load(share_ptr + rows, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + rows, mask=inside, other=0.0)
        e, q, slope = _mapped(_product(a, z, PRECISE), below_ptr, slope_ptr, low, inverse, width, last, PIECES)
        g = tl.exp2(e * LOG2E - lse[None, :]) * q * weight[None, :]
        g = tl.where(cols[:, None] == y[None, :], share[None, :], g) * slope
        acc = _add_product(acc, g.to(z.dtype), z, PRECISE)
    at = dA_ptr + cols[:, None].to(tl.int64) * columns + ranks[None, :]
    tl.store(at, acc, mask=(cols[:, None] < V) & (ranks[None, :] < columns))


@triton.jit
def _bend_step(s, cols, end, y, lse, weight, below_ptr, slope_ptr, low, inverse, width, last):
    """u and weight · p of some logits of a token; 0 for the target and beyond the end."""
    e, _, _ = _mapped(s, below_ptr, slope_ptr, low, inverse, width, last, True)
    p = tl.where((cols < end) & (cols != y), tl.exp2(e * LOG2E - lse) * weight, 0.0)
    return (s - low) * inverse, p


@triton.jit
def bend(
    s_ptr,
    y_ptr,
    below_ptr,
    slope_ptr,
    lse_ptr,
    weight_ptr,
    out_ptr,
    low,
    inverse,
    width,
    last,
    V,
    segment,
    stride,
    K,
    BK: tl.constexpr,
    T: tl.constexpr,
):
    """out [n, segments, K] of one token, a segment of its logits s and a block of pieces. lse: of base 2.

    ∂f(s)/∂slope_k is the length of piece k below s: width · clamp(u − k, 0, 1) with u = (s − low) / width; the first
    piece has no lower end, the last no upper one.
    """
    row = tl.program_id(0)
    k = tl.program_id(2) * BK + tl.arange(0, BK)[:, None]
    block = (tl.program_id(2) * BK).to(tl.float32)
    left = tl.arange(0, BK)[:, None].to(tl.float32)  # constants: in instructions, not in registers
    y = tl.load(y_ptr + row).to(tl.int32)
    lse = tl.load(lse_ptr + row)
    weight = tl.load(weight_ptr + row)
    at = s_ptr + row.to(tl.int64) * stride
    acc = tl.zeros([BK, T], tl.float32)
    before = tl.zeros([1, T], tl.float32)
    beyond = tl.zeros([1, T], tl.float32)
    first = tl.program_id(1) * segment
    end = tl.minimum(first + segment, V)
    lanes = tl.arange(0, T)[None, :]
    # memory and tables take longer than the sums of a step: each step adds one, prepares the next and loads the third
    s = tl.load(at + first + lanes, mask=first + lanes < end, other=0.0)
    ahead = tl.load(at + first + T + lanes, mask=first + T + lanes < end, other=0.0)
    u, p = _bend_step(s, first + lanes, end, y, lse, weight, below_ptr, slope_ptr, low, inverse, width, last)
    for v0 in range(first, end, T):
        s = ahead
        cols = v0 + 2 * T + lanes
        ahead = tl.load(at + cols, mask=cols < end, other=0.0)
        next_u, next_p = _bend_step(
            s, v0 + T + lanes, end, y, lse, weight, below_ptr, slope_ptr, low, inverse, width, last
        )
        acc += p * _share_above(u - block, left)
        before += p * tl.minimum(u, 0.0)
        beyond += p * tl.maximum(u - (last + 1.0), 0.0)
        u, p = next_u, next_p
    total = tl.sum(acc, 1)[:, None]
    total += tl.where(k == 0, tl.sum(before, 1)[:, None], 0.0)
    total += tl.where(k == K - 1, tl.sum(beyond, 1)[:, None], 0.0)
    place = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * K
    tl.store(out_ptr + place + k, total * width, mask=k < K)

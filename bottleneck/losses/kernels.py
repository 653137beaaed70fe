"""Triton kernels of the fused loss: logits of one tile at a time, never in memory.

With z = h Bᵀ [N, R], softmax p and lse its normaliser, cross-entropy needs two passes over the N x V logits. Each tile
is computed twice from z and A (Milakov & Gimelshein 2018 for the running softmax; Dao et al. 2022 for its use in a
matrix product):

    scan    along V, for a block of tokens:      Σ_{v≠y} p_v,  Σ_{v≠y} p_v a_v       (attention, A keys and values)
    merge   for each token, over parts of V:     loss = lse − z·a_y,  dz = Σ_v p_v a_v − a_y
    spread  along N, for a block of entries:     dA_v = Σ_n (p_nv − [y_n = v]) z_n

The target's own term is left out of the sums of `scan`; `merge` adds it in float32, to dz as (p_y − 1) a_y, which is
exact where the head is nearly certain. Products run in the dtype of z and A, everything else in float32. No atomics:
equal inputs give equal bits. Logarithms are of base 2 inside, since exp2 is what the hardware has.

Dims: N tokens, R rank padded with zeros to a power of two from 16, V vocabulary, S parts of V, BN and BV rows of a
tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _product(a, b, PRECISE: tl.constexpr):
    """a [M, K] times the transpose of b [N, K]; float32 operands in full precision, not in tf32."""
    if PRECISE:
        return tl.dot(a, tl.trans(b), input_precision="ieee")
    return tl.dot(a, tl.trans(b))


@triton.jit
def _add_product(acc, a, b, PRECISE: tl.constexpr):
    if PRECISE:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _scan_tile(
    z,
    y,
    m,
    l,
    acc,
    A_ptr,
    v0,
    V,
    R: tl.constexpr,
    BV: tl.constexpr,
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
    s = _product(z, a, PRECISE)
    if TAIL:
        s = tl.where(cols[None, :] < V, s, float("-inf"))
    # few tiles hold a target, and the comparisons take a third of the instructions of a tile
    if tl.max(((y >= v0) & (y < v0 + BV)).to(tl.int32), 0) > 0:
        s = tl.where(cols[None, :] == y[:, None], float("-inf"), s)
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top * LOG2E)  # no entry so far but the target
    p = tl.exp2(s * LOG2E - base[:, None])
    shrink = tl.exp2(m * LOG2E - base)
    l = l * shrink + tl.sum(p, 1)
    if GRAD:
        acc = _add_product(acc * shrink[:, None], p.to(a.dtype), a, PRECISE)
    return top, l, acc


@triton.jit
def scan(
    z_ptr,
    A_ptr,
    y_ptr,
    m_ptr,
    l_ptr,
    acc_ptr,
    N,
    V,
    part,
    R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    GRAD: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One part of V without the target: maximum m and l = Σ exp(s − m) [S, N]; with GRAD, acc = Σ exp(s − m) a_v."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    ranks = tl.arange(0, R)
    z = tl.load(z_ptr + rows[:, None] * R + ranks[None, :], mask=rows[:, None] < N, other=0.0)
    y = tl.load(y_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
    m = tl.full([BN], float("-inf"), tl.float32)
    l = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, R], tl.float32)
    first = split * part
    last = tl.minimum(first + part, V)
    whole = first + (last - first) // BV * BV
    for v0 in range(first, whole, BV):
        m, l, acc = _scan_tile(z, y, m, l, acc, A_ptr, v0, V, R, BV, GRAD, False, PRECISE)
    if whole < last:
        m, l, acc = _scan_tile(z, y, m, l, acc, A_ptr, whole, V, R, BV, GRAD, True, PRECISE)
    out = split.to(tl.int64) * N + rows
    tl.store(m_ptr + out, m, mask=rows < N)
    tl.store(l_ptr + out, l, mask=rows < N)
    if GRAD:
        tl.store(acc_ptr + out[:, None] * R + ranks[None, :], acc, mask=rows[:, None] < N)


@triton.jit
def merge(
    z_ptr,
    A_ptr,
    y_ptr,
    m_ptr,
    l_ptr,
    acc_ptr,
    lse_ptr,
    loss_ptr,
    dz_ptr,
    N,
    V,
    R: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    GRAD: tl.constexpr,
):
    """Parts of V to loss [N], base-2 lse [N] (inf where the token does not count, so that its p is 0) and dz [N, R]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    inside = rows < N
    y = tl.load(y_ptr + rows, mask=inside, other=-1)
    counts = inside & (y >= 0)
    at = rows[:, None] * R + ranks[None, :]
    z = tl.load(z_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    known = counts & (y < V)
    a = tl.load(A_ptr + y[:, None].to(tl.int64) * R + ranks[None, :], mask=known[:, None], other=0.0).to(tl.float32)
    # a target outside the vocabulary reads nothing and makes its loss NaN
    own = tl.where(counts & (y >= V), float("nan"), tl.sum(z * a, 1))
    top = tl.where(counts, own, float("-inf"))
    for s in tl.static_range(S):
        top = tl.maximum(top, tl.load(m_ptr + s * N + rows, mask=inside, other=0.0))
    l = tl.where(counts, tl.exp2((own - top) * LOG2E), 0.0)
    for s in tl.static_range(S):
        share = tl.exp2((tl.load(m_ptr + s * N + rows, mask=inside, other=0.0) - top) * LOG2E)
        l += share * tl.load(l_ptr + s * N + rows, mask=inside, other=1.0)
    # subtract the largest logit first: both may be large and nearly equal
    tl.store(loss_ptr + rows, tl.where(counts, (top - own) + tl.log2(l) * LN2, 0.0), mask=inside)
    if GRAD:
        tl.store(lse_ptr + rows, tl.where(counts, top * LOG2E + tl.log2(l), float("inf")), mask=inside)
        acc = tl.zeros([BN, R], tl.float32)
        for s in tl.static_range(S):
            share = tl.exp2((tl.load(m_ptr + s * N + rows, mask=inside, other=0.0) - top) * LOG2E) / l
            acc += share[:, None] * tl.load(acc_ptr + s * N * R + at, mask=inside[:, None], other=0.0)
        dz = acc + (tl.exp2((own - top) * LOG2E) / l - 1.0)[:, None] * a
        dz = tl.where(counts[:, None], dz, 0.0)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def spread(
    z_ptr,
    A_ptr,
    y_ptr,
    lse_ptr,
    dA_ptr,
    N,
    V,
    scale,
    width,
    R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    ADD: tl.constexpr,
    SEARCH: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """dA [V, width] = (with ADD +=) scale · Σ_n (p_nv − [y_n = v]) z_n for a block of entries; width ≤ R columns."""
    v0 = tl.program_id(0) * BV
    cols = v0 + tl.arange(0, BV)
    ranks = tl.arange(0, R)
    a = tl.load(A_ptr + cols[:, None].to(tl.int64) * R + ranks[None, :], mask=cols[:, None] < V, other=0.0)
    acc = tl.zeros([BV, R], tl.float32)
    for n0 in range(0, N, BN):
        rows = n0 + tl.arange(0, BN)
        z = tl.load(z_ptr + rows[:, None] * R + ranks[None, :], mask=rows[:, None] < N, other=0.0)
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=float("inf"))
        y = tl.load(y_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
        g = tl.exp2(_product(a, z, PRECISE) * LOG2E - lse[None, :])
        if SEARCH:
            if tl.max(((y >= v0) & (y < v0 + BV)).to(tl.int32), 0) > 0:  # few tiles hold a target
                g = tl.where(cols[:, None] == y[None, :], g - 1.0, g)
        else:
            g = tl.where(cols[:, None] == y[None, :], g - 1.0, g)
        acc = _add_product(acc, g.to(z.dtype), z, PRECISE)
    at = dA_ptr + cols[:, None].to(tl.int64) * width + ranks[None, :]
    inside = (cols[:, None] < V) & (ranks[None, :] < width)
    acc *= scale
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, acc.to(dA_ptr.dtype.element_ty), mask=inside)


@triton.jit
def soften(logits_ptr, y_ptr, loss_ptr, V, stride, BLOCK: tl.constexpr, GRAD: tl.constexpr):
    """One row of logits [n, V]: its loss and, with GRAD, p − onehot(y) in its place (0 where the token does not count).

    The row is read twice: it should stay in the level-2 cache until the second time, and no longer.
    """
    row = tl.program_id(0)
    at = logits_ptr + row.to(tl.int64) * stride
    y = tl.load(y_ptr + row)
    counts = y >= 0
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, V, BLOCK):
        cols = v0 + tl.arange(0, BLOCK)
        s = tl.load(at + cols, mask=cols < V, other=float("-inf"), eviction_policy="evict_last").to(tl.float32) * LOG2E
        top = tl.maximum(m, s)
        # each lane keeps its own maximum; a lane without entries has −inf
        base = tl.where(top == float("-inf"), 0.0, top)
        l = l * tl.exp2(m - base) + tl.exp2(s - base)
        m = top
    top = tl.max(m, 0)
    total = tl.log2(tl.sum(l * tl.exp2(m - top), 0))
    lse = top + total
    own = tl.load(at + tl.maximum(y, 0), mask=y < V, other=float("nan")).to(tl.float32) * LOG2E
    tl.store(loss_ptr + row, tl.where(counts, ((top - own) + total) * LN2, 0.0))
    if GRAD:
        weight = tl.where(counts, 1.0, 0.0)
        for v0 in range(0, V, BLOCK):
            cols = v0 + tl.arange(0, BLOCK)
            s = (
                tl.load(at + cols, mask=cols < V, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
                * LOG2E
            )
            g = tl.exp2(s - lse)
            g = tl.where(cols == y, g - 1.0, g) * weight
            tl.store(at + cols, g.to(logits_ptr.dtype.element_ty), mask=cols < V)

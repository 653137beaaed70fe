"""Triton kernels of the loss at high ranks, see `losses.exponentials` for the algorithm.

Logarithms are of base 2 inside, since exp2 is what the hardware has. No atomics: equal inputs give equal bits.

Dims: M tokens of a chunk, R rank, V vocabulary, T = ⌈V / BV⌉ tiles of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A row's offset lies HEADROOM above the largest logit of a sample of the vocabulary, in powers of two. Sums up to
# LARGEST leave room in float32 and bfloat16 for the products that follow.
HEADROOM = tl.constexpr(56.0)
LARGEST = tl.constexpr(2.0**88)


@triton.jit
def _product(a, b, acc, PRECISE: tl.constexpr):
    """acc + a [M, K] times the transpose of b [N, K]; float32 operands in full precision, not in tf32."""
    if PRECISE:
        return tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return tl.dot(a, tl.trans(b), acc)


@triton.jit
def _pointer_tile(z_ptr, A_ptr, rows, cols, M, V, R, BK: tl.constexpr, PRECISE: tl.constexpr):
    """Logits of some rows and columns, operands read through pointers: for any card and any shape."""
    acc = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for r0 in range(0, R, BK):
        at = r0 + tl.arange(0, BK)
        z = tl.load(
            z_ptr + rows[:, None].to(tl.int64) * R + at[None, :],
            mask=(rows[:, None] < M) & (at[None, :] < R),
            other=0.0,
        )
        a = tl.load(
            A_ptr + cols[:, None].to(tl.int64) * R + at[None, :],
            mask=(cols[:, None] < V) & (at[None, :] < R),
            other=0.0,
        )
        acc = _product(z, a, acc, PRECISE)
    return acc


@triton.jit
def anchor(
    z_ptr,
    A_ptr,
    y_ptr,
    sample_ptr,
    offset_ptr,
    own_ptr,
    V,
    R,
    S,
    BS: tl.constexpr,
    BR: tl.constexpr,
):
    """Per row: its offset [M], an integer power of two, and the logit of its target own [M], base 2.

    sample [M, S]: logits of some entries of the vocabulary, float32.
    """
    row = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, BS)
    some = tl.load(sample_ptr + row * S + entries, mask=entries < S, other=float("-inf"))
    tl.store(offset_ptr + row, tl.ceil(tl.max(some, 0) * LOG2E) + HEADROOM)
    y = tl.load(y_ptr + row)
    width = tl.where((y >= 0) & (y < V), R, 0)
    own = tl.zeros([BR], tl.float32)
    for r0 in range(0, R, BR):
        at = r0 + tl.arange(0, BR)
        z = tl.load(z_ptr + row * R + at, mask=at < width, other=0.0).to(tl.float32)
        own += z * tl.load(A_ptr + y.to(tl.int64) * R + at, mask=at < width, other=0.0).to(tl.float32)
    # a target beyond the vocabulary reads nothing and makes its loss NaN
    tl.store(own_ptr + row, tl.where(y >= V, float("nan"), tl.sum(own, 0) * LOG2E))


@triton.jit
def exponentiate(
    z_ptr,
    A_ptr,
    E_ptr,
    offset_ptr,
    sums_ptr,
    M,
    V,
    R,
    stride,
    pitch,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One tile of E [M, V] = exp2(logits − offset), and its row sums [M, T], rows `pitch` apart."""
    blocks = tl.cdiv(M, BM)
    tile = tl.program_id(0) // blocks  # rows fastest: the tile of A stays in the level-2 cache, as does z
    rows = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    cols = tile * BV + tl.arange(0, BV)
    acc = _pointer_tile(z_ptr, A_ptr, rows, cols, M, V, R, BK, PRECISE)
    offset = tl.load(offset_ptr + rows, mask=rows < M, other=0.0)
    e = tl.where(cols[None, :] < V, tl.exp2(acc * LOG2E - offset[:, None]), 0.0)
    tl.store(sums_ptr + rows.to(tl.int64) * pitch + tile, tl.sum(e, 1), mask=rows < M)
    at = E_ptr + rows[:, None].to(tl.int64) * stride + cols[None, :]
    tl.store(at, e.to(E_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (cols[None, :] < V))


@triton.jit
def exponentiate_tma(
    z,
    A,
    E,
    offset_ptr,
    sums_ptr,
    M,
    V,
    R,
    T,
    pitch,
    programs,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """The same for Hopper: z, A and E are tensor descriptors, and a program takes many tiles.

    The loops over tiles and over R are flattened, so the next tile's operands are loaded during an epilogue.
    HALVES: the epilogue stores its columns in two halves, which takes less shared memory.
    """
    blocks = tl.cdiv(M, BM)
    for index in tl.range(tl.program_id(0), blocks * T, programs, flatten=True):
        tile = index // blocks
        row = index % blocks * BM
        acc = tl.zeros([BM, BV], tl.float32)
        for r0 in range(0, R, BK):
            acc = _product(z.load([row, r0]), A.load([tile * BV, r0]), acc, PRECISE)
        rows = row + tl.arange(0, BM)
        offset = tl.load(offset_ptr + rows, mask=rows < M, other=0.0)
        e = tl.exp2(acc * LOG2E - offset[:, None])
        if tile == T - 1:
            e = tl.where(tile * BV + tl.arange(0, BV)[None, :] < V, e, 0.0)
        tl.store(sums_ptr + rows.to(tl.int64) * pitch + tile, tl.sum(e, 1), mask=rows < M)
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(e, (BM, 2, BV // 2)), (0, 2, 1)))
            E.store([row, tile * BV], left.to(E.dtype))
            E.store([row, tile * BV + BV // 2], right.to(E.dtype))
        else:
            E.store([row, tile * BV], e.to(E.dtype))


@triton.jit
def repair(
    z_ptr,
    A_ptr,
    E_ptr,
    offset_ptr,
    sums_ptr,
    M,
    V,
    R,
    stride,
    T,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Blocks of rows whose sums are too large: E, offsets and sums again, with the true maximum as the offset."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros([BM], tl.float32)
    for t0 in range(0, T, BT):
        at = t0 + tl.arange(0, BT)
        mask = (rows[:, None] < M) & (at[None, :] < T)
        total += tl.sum(tl.load(sums_ptr + rows[:, None].to(tl.int64) * T + at[None, :], mask=mask, other=0.0), 1)
    if tl.sum((total <= LARGEST).to(tl.int32), 0) < BM:  # also where a sum is NaN
        top = tl.full([BM], float("-inf"), tl.float32)
        for v0 in range(0, V, BV):
            cols = v0 + tl.arange(0, BV)
            s = _pointer_tile(z_ptr, A_ptr, rows, cols, M, V, R, BK, PRECISE)
            top = tl.maximum(top, tl.max(tl.where(cols[None, :] < V, s, float("-inf")), 1))
        offset = tl.ceil(top * LOG2E)
        total = tl.zeros([BM], tl.float32)
        for v0 in range(0, V, BV):
            cols = v0 + tl.arange(0, BV)
            s = _pointer_tile(z_ptr, A_ptr, rows, cols, M, V, R, BK, PRECISE)
            e = tl.where(cols[None, :] < V, tl.exp2(s * LOG2E - offset[:, None]), 0.0)
            total += tl.sum(e, 1)
            at = E_ptr + rows[:, None].to(tl.int64) * stride + cols[None, :]
            tl.store(at, e.to(E_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (cols[None, :] < V))
        tl.store(offset_ptr + rows, offset, mask=rows < M)
        for t in range(0, T):
            at = sums_ptr + rows.to(tl.int64) * T + t
            tl.store(at, tl.where(t == 0, total, 0.0), mask=rows < M)


@triton.jit
def settle(
    z_ptr,
    E_ptr,
    y_ptr,
    offset_ptr,
    own_ptr,
    sums_ptr,
    loss_ptr,
    weight_ptr,
    excess_ptr,
    weighted_ptr,
    V,
    R,
    stride,
    T,
    BT: tl.constexpr,
    BR: tl.constexpr,
):
    """Per row: loss, weight 1 / Σ E, excess p_y − 1, weight · z, all 0 for an ignored token; E[y] becomes 0."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BT], tl.float32)
    for t0 in range(0, T, BT):
        at = t0 + tl.arange(0, BT)
        sums += tl.load(sums_ptr + row * T + at, mask=at < T, other=0.0)
    total = tl.sum(sums, 0)
    y = tl.load(y_ptr + row)
    counts = y >= 0
    offset = tl.load(offset_ptr + row)
    own = tl.load(own_ptr + row)
    # subtract the target's logit from the offset first: both may be large and nearly equal
    tl.store(loss_ptr + row, tl.where(counts, ((offset - own) + tl.log2(total)) * LN2, 0.0))
    weight = tl.where(counts, 1.0 / total, 0.0)
    tl.store(weight_ptr + row, weight)
    tl.store(excess_ptr + row, tl.where(counts, tl.exp2(own - offset) / total - 1.0, 0.0))
    tl.store(E_ptr + row * stride + y, 0.0, mask=counts & (y < V))
    for r0 in range(0, R, BR):
        at = r0 + tl.arange(0, BR)
        z = tl.load(z_ptr + row * R + at, mask=at < R, other=0.0).to(tl.float32)
        tl.store(weighted_ptr + row * R + at, (z * weight).to(weighted_ptr.dtype.element_ty), mask=at < R)


@triton.jit
def arrange(y_ptr, order_ptr, M, BM: tl.constexpr, BN: tl.constexpr):
    """order [M]: tokens sorted by target, stable. Each token finds its place by counting smaller targets."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    key = (tl.load(y_ptr + rows, mask=rows < M, other=0).to(tl.int64) << 32) + rows
    place = tl.zeros([BM], tl.int32)
    for n0 in range(0, M, BN):
        others = n0 + tl.arange(0, BN)
        other = (tl.load(y_ptr + others, mask=others < M, other=2147483647).to(tl.int64) << 32) + others
        place += tl.sum((other[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(order_ptr + place, rows, mask=rows < M)


@triton.jit
def add_targets(z_ptr, y_ptr, excess_ptr, order_ptr, dA_ptr, M, V, R, width, scale, BM: tl.constexpr, BR: tl.constexpr):
    """dA_v += scale · Σ_{n: y_n = v} excess_n z_n, in the order of the tokens.

    The program of the first token of a target takes all of its tokens. Most targets have one or few.
    """
    place = tl.program_id(0)
    row = tl.load(order_ptr + place).to(tl.int64)
    y = tl.load(y_ptr + row)
    before = tl.load(y_ptr + tl.load(order_ptr + tl.maximum(place - 1, 0)))
    if (y >= 0) & (y < V) & ((place == 0) | (before != y)):
        at = tl.program_id(1) * BR + tl.arange(0, BR)
        acc = tl.load(excess_ptr + row) * tl.load(z_ptr + row * R + at, mask=at < R, other=0.0).to(tl.float32)
        out = dA_ptr + y.to(tl.int64) * width + at
        sum_before = tl.load(out, mask=at < width, other=0.0)
        first = place + 1
        more = tl.load(y_ptr + tl.load(order_ptr + tl.minimum(first, M - 1))) == y
        while more & (first < M):
            places = first + tl.arange(0, BM)
            rows = tl.load(order_ptr + places, mask=places < M, other=0)
            same = (places < M) & (tl.load(y_ptr + rows) == y)
            excess = tl.load(excess_ptr + rows, mask=same, other=0.0)
            z = tl.load(
                z_ptr + rows[:, None].to(tl.int64) * R + at[None, :], mask=same[:, None] & (at[None, :] < R), other=0.0
            )
            acc += tl.sum(excess[:, None] * z.to(tl.float32), 0)
            more = tl.sum(same.to(tl.int32), 0) == BM
            first += BM
        tl.store(out, sum_before + scale * acc, mask=at < width)


@triton.jit
def finish(dz32_ptr, A_ptr, y_ptr, weight_ptr, excess_ptr, dz_ptr, V, R, BR: tl.constexpr):
    """dz = weight · Σ_{v≠y} E_v a_v + excess · a_y, from the sum in float32; 0 where the token does not count."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row)
    weight, excess = tl.load(weight_ptr + row), tl.load(excess_ptr + row)
    for r0 in range(0, R, BR):
        at = r0 + tl.arange(0, BR)
        width = tl.where((y >= 0) & (y < V), R, 0)
        a = tl.load(A_ptr + y.to(tl.int64) * R + at, mask=at < width, other=0.0).to(tl.float32)
        dz = weight * tl.load(dz32_ptr + row * R + at, mask=at < R, other=0.0) + excess * a
        dz = tl.where(y >= 0, dz, 0.0)
        tl.store(dz_ptr + row * R + at, dz.to(dz_ptr.dtype.element_ty), mask=at < R)

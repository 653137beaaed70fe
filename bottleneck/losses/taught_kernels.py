"""Triton kernels of a head that learns from a teacher's distribution, see `losses.taught` for the algorithm.

They follow those of cross-entropy: `scan` along the vocabulary, `spread` along the tokens, with a tile of the targets
t read beside each tile of logits. A row's largest target is kept apart in float32 (`top`, `share`), and is 0 in t.
Logarithms are of base 2 inside; heat is log2(e) / temperature. No atomics: equal inputs give equal bits.

Dims: N tokens, R rank padded with zeros, V vocabulary, S parts of V, BN and BV rows of a tile. Rows of t are `pitch`
apart, a multiple of 64, and zero beyond V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bottleneck.losses.kernels import _add_product, _product

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)  # least normal number
C0, C1, C2 = tl.constexpr(0.43872437), tl.constexpr(-0.23905283), tl.constexpr(0.08212626)  # minimax, of `_log2`
NEGLIGIBLE = tl.constexpr(1e-7)  # targets that sum to less do not move the loss, whatever their logits


@triton.jit
def teach(
    logits_ptr,
    y_ptr,
    t_ptr,
    top_ptr,
    share_ptr,
    least_ptr,
    V,
    stride,
    pitch,
    heat,
    mix,
    BLOCK: tl.constexpr,
):
    """One row of a teacher's logits [n, V]: the targets mix · softmax + (1 − mix) · onehot(y), 0 where y < 0.

    top, share: the largest target, whose entry of t is 0; all targets sum to 1 as they are stored.
    least: mix · Σ p log p in nats, for the softmax p.
    """
    row = tl.program_id(0).to(tl.int64)
    at = logits_ptr + row * stride
    y = tl.load(y_ptr + row)
    counts = y >= 0
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)  # Σ exp(s − m) s
    best = tl.zeros([BLOCK], tl.int32)
    for v0 in range(0, V, BLOCK):
        cols = v0 + tl.arange(0, BLOCK)
        s = tl.load(at + cols, mask=cols < V, other=float("-inf")).to(tl.float32) * heat
        best = tl.where(s > m, cols, best)
        highest = tl.maximum(m, s)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink, e = tl.exp2(m - base), tl.exp2(s - base)
        l = l * shrink + e
        mean = mean * shrink + e * tl.where(cols < V, s, 0.0)
        m = highest
    highest = tl.max(m, 0)
    weight = tl.exp2(m - highest)
    total = tl.sum(l * weight, 0)
    lse = highest + tl.log2(total)
    tl.store(least_ptr + row, tl.where(counts, mix * (tl.sum(mean * weight, 0) / total - lse) * LN2, 0.0))
    top = tl.min(tl.where(m == highest, best, V), 0)
    known = counts & (y < V)
    p_y = tl.exp2(tl.load(at + y, mask=known, other=float("-inf")).to(tl.float32) * heat - lse)
    top = tl.where(known & (mix * p_y + (1.0 - mix) > mix / total), y, top)
    rest = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, pitch, BLOCK):
        cols = v0 + tl.arange(0, BLOCK)
        s = tl.load(at + cols, mask=cols < V, other=float("-inf")).to(tl.float32) * heat
        t = mix * tl.exp2(s - lse) + tl.where(cols == y, 1.0 - mix, 0.0)
        t = tl.where((cols == top) | (cols >= V) | (y < 0), 0.0, t).to(t_ptr.dtype.element_ty)
        rest += t.to(tl.float32)
        tl.store(t_ptr + row * pitch + cols, t, mask=cols < pitch)
    tl.store(top_ptr + row, top)
    # a target outside the vocabulary makes the loss NaN, as it does without a teacher
    share = tl.where(y >= V, float("nan"), 1.0 - tl.sum(rest, 0))
    tl.store(share_ptr + row, tl.where(counts, share, 0.0))


@triton.jit
def _entries(A_ptr, cols, ranks, V, R: tl.constexpr, TAIL: tl.constexpr):
    at = A_ptr + cols[:, None].to(tl.int64) * R + ranks[None, :]
    if TAIL:
        return tl.load(at, mask=cols[:, None] < V, other=0.0)
    return tl.load(at)


@triton.jit
def _targets(t_ptr, rows, cols, N, pitch, TAIL: tl.constexpr):
    """A tile of t. Masks that hold for whole vectors of a row leave loads wide, also where V is odd."""
    at = t_ptr + rows.to(tl.int64) * pitch + cols
    if TAIL:
        return tl.load(at, mask=(rows < N) & (cols < pitch), other=0.0)
    return tl.load(at, mask=rows < N, other=0.0)


@triton.jit
def _scan_tile(
    z,
    m,
    l,
    own,
    taught,
    A_ptr,
    t_ptr,
    rows,
    v0,
    N,
    V,
    pitch,
    heat,
    R: tl.constexpr,
    BV: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One tile of `scan`: entries v0 … v0 + BV for a block of tokens."""
    cols = v0 + tl.arange(0, BV)
    a = _entries(A_ptr, cols, tl.arange(0, R), V, R, TAIL)
    t = _targets(t_ptr, rows[:, None], cols[None, :], N, pitch, TAIL)
    s = _product(z, a, PRECISE)
    if TAIL:
        s = tl.where(cols[None, :] < V, s, float("-inf"))
    highest = tl.maximum(m, tl.max(s, 1))
    base = highest * heat
    e = tl.exp2(s * heat - base[:, None])
    shrink = tl.exp2(m * heat - base)
    l = l * shrink + tl.sum(e, 1)
    own = _add_product(own * shrink[:, None], e.to(a.dtype), a, PRECISE)
    taught = _add_product(taught, t, a, PRECISE)
    return highest, l, own, taught


@triton.jit
def scan(
    z_ptr,
    A_ptr,
    t_ptr,
    m_ptr,
    l_ptr,
    own_ptr,
    taught_ptr,
    N,
    V,
    part,
    pitch,
    heat,
    R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One part of V: maximum m and l = Σ exp(s − m) [S, N]; own = Σ exp(s − m) a_v, taught = Σ t_v a_v [S, N, R]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    ranks = tl.arange(0, R)
    z = tl.load(z_ptr + rows[:, None] * R + ranks[None, :], mask=rows[:, None] < N, other=0.0)
    m = tl.full([BN], float("-inf"), tl.float32)
    l = tl.zeros([BN], tl.float32)
    own = tl.zeros([BN, R], tl.float32)
    taught = tl.zeros([BN, R], tl.float32)
    first = split * part
    last = tl.minimum(first + part, V)
    whole = first + (last - first) // BV * BV
    for v0 in range(first, whole, BV):
        m, l, own, taught = _scan_tile(
            z, m, l, own, taught, A_ptr, t_ptr, rows, v0, N, V, pitch, heat, R, BV, False, PRECISE
        )
    if whole < last:
        m, l, own, taught = _scan_tile(
            z, m, l, own, taught, A_ptr, t_ptr, rows, whole, N, V, pitch, heat, R, BV, True, PRECISE
        )
    out = split.to(tl.int64) * N + rows
    tl.store(m_ptr + out, m, mask=rows < N)
    tl.store(l_ptr + out, l, mask=rows < N)
    wide = out[:, None] * R + ranks[None, :]
    tl.store(own_ptr + wide, own, mask=rows[:, None] < N)
    tl.store(taught_ptr + wide, taught, mask=rows[:, None] < N)


@triton.jit
def merge(
    z_ptr,
    A_ptr,
    y_ptr,
    top_ptr,
    share_ptr,
    least_ptr,
    m_ptr,
    l_ptr,
    own_ptr,
    taught_ptr,
    lse_ptr,
    first_ptr,
    loss_ptr,
    dz_ptr,
    N,
    heat,
    temperature,
    R: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Parts of V to loss [N], base-2 lse [N] (inf where the token does not count) and dz [N, R].

    KEEP: instead of dz, write q of `top` to first [N], and Σ q a and Σ t a to the first parts of own and taught.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    inside = rows < N
    counts = inside & (tl.load(y_ptr + rows, mask=inside, other=-1) >= 0)
    top = tl.load(top_ptr + rows, mask=inside, other=0)
    at = rows[:, None] * R + ranks[None, :]
    z = tl.load(z_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    a = tl.load(A_ptr + top[:, None].to(tl.int64) * R + ranks[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    highest = tl.full([BN], float("-inf"), tl.float32)
    for s in tl.static_range(S):
        highest = tl.maximum(highest, tl.load(m_ptr + s * N + rows, mask=inside, other=0.0) * heat)
    l = tl.zeros([BN], tl.float32)
    own = tl.zeros([BN, R], tl.float32)
    taught = tl.load(share_ptr + rows, mask=inside, other=0.0)[:, None] * a
    for s in tl.static_range(S):
        part = tl.exp2(tl.load(m_ptr + s * N + rows, mask=inside, other=0.0) * heat - highest)
        l += part * tl.load(l_ptr + s * N + rows, mask=inside, other=1.0)
        own += part[:, None] * tl.load(own_ptr + s * N * R + at, mask=inside[:, None], other=0.0)
        taught += tl.load(taught_ptr + s * N * R + at, mask=inside[:, None], other=0.0)
    own /= l[:, None]
    # subtract the mean logit from the largest first: both may be large and nearly equal
    loss = ((highest - tl.sum(z * taught, 1) * heat) + tl.log2(l)) * LN2
    loss += tl.load(least_ptr + rows, mask=inside, other=0.0)
    tl.store(loss_ptr + rows, tl.where(counts, temperature * temperature * loss, 0.0), mask=inside)
    tl.store(lse_ptr + rows, tl.where(counts, highest + tl.log2(l), float("inf")), mask=inside)
    if KEEP:
        first = tl.where(counts, tl.exp2(tl.sum(z * a, 1) * heat - highest) / l, 0.0)
        tl.store(first_ptr + rows, first, mask=inside)
        tl.store(own_ptr + at, own, mask=inside[:, None])
        tl.store(taught_ptr + at, taught, mask=inside[:, None])
    else:
        dz = tl.where(counts[:, None], temperature * (own - taught), 0.0)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _overlap_tile(
    z,
    lse,
    both,
    below,
    short,
    A_ptr,
    t_ptr,
    top,
    rows,
    v0,
    N,
    V,
    pitch,
    heat,
    R: tl.constexpr,
    BV: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One tile of `scan_overlap`."""
    cols = v0 + tl.arange(0, BV)
    a = _entries(A_ptr, cols, tl.arange(0, R), V, R, TAIL)
    t = _targets(t_ptr, rows[:, None], cols[None, :], N, pitch, TAIL).to(tl.float32)
    q = tl.exp2(_product(z, a, PRECISE) * heat - lse[:, None])
    # `top` is added by `merge_overlap`: near 1, its q and t may differ by less than products round
    if tl.max(((top >= v0) & (top < v0 + BV)).to(tl.int32), 0) > 0:
        q = tl.where(cols[None, :] == top[:, None], 0.0, q)
    both += tl.sum(tl.minimum(q, t), 1)
    q = tl.where(q < t, q, 0.0)
    below += tl.sum(q, 1)
    short = _add_product(short, q.to(a.dtype), a, PRECISE)
    return both, below, short


@triton.jit
def scan_overlap(
    z_ptr,
    A_ptr,
    t_ptr,
    top_ptr,
    lse_ptr,
    both_ptr,
    below_ptr,
    short_ptr,
    N,
    V,
    part,
    pitch,
    heat,
    R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One part of V without `top`: both = Σ min(t, q), below = Σ_{q<t} q [S, N], and short = Σ_{q<t} q a [S, N, R]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    ranks = tl.arange(0, R)
    z = tl.load(z_ptr + rows[:, None] * R + ranks[None, :], mask=rows[:, None] < N, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=float("inf"))
    top = tl.load(top_ptr + rows, mask=rows < N, other=-1)
    both = tl.zeros([BN], tl.float32)
    below = tl.zeros([BN], tl.float32)
    short = tl.zeros([BN, R], tl.float32)
    start = split * part
    last = tl.minimum(start + part, V)
    whole = start + (last - start) // BV * BV
    for v0 in range(start, whole, BV):
        both, below, short = _overlap_tile(
            z, lse, both, below, short, A_ptr, t_ptr, top, rows, v0, N, V, pitch, heat, R, BV, False, PRECISE
        )
    if whole < last:
        both, below, short = _overlap_tile(
            z, lse, both, below, short, A_ptr, t_ptr, top, rows, whole, N, V, pitch, heat, R, BV, True, PRECISE
        )
    out = split.to(tl.int64) * N + rows
    tl.store(both_ptr + out, both, mask=rows < N)
    tl.store(below_ptr + out, below, mask=rows < N)
    tl.store(short_ptr + out[:, None] * R + ranks[None, :], short, mask=rows[:, None] < N)


@triton.jit
def _lk(both, below, divergence, eta, LOG: tl.constexpr):
    """Loss, and the gradient's coefficients: G = q (whole − part · [q < t]) − pull · t. See `objectives.lk`."""
    if LOG:
        both = tl.maximum(both, TINY)
        return -tl.log2(both) * LN2, below / both, 1.0 / both, 0.0 * both
    pull = tl.exp2(-eta * both * LOG2E)
    return pull * divergence + (1.0 - pull) * (1.0 - both), pull + (1.0 - pull) * below, 1.0 - pull, pull


@triton.jit
def merge_overlap(
    A_ptr,
    y_ptr,
    top_ptr,
    share_ptr,
    first_ptr,
    own_ptr,
    taught_ptr,
    both_ptr,
    below_ptr,
    short_ptr,
    whole_ptr,
    part_ptr,
    pull_ptr,
    loss_ptr,
    dz_ptr,
    N,
    eta,
    R: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    LOG: tl.constexpr,
):
    """Parts of V to loss [N], which holds the KL before, the coefficients of `_lk` [N] and dz [N, R]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    inside = rows < N
    counts = inside & (tl.load(y_ptr + rows, mask=inside, other=-1) >= 0)
    at = rows[:, None] * R + ranks[None, :]
    top = tl.load(top_ptr + rows, mask=inside, other=0)
    share = tl.load(share_ptr + rows, mask=inside, other=0.0)
    a = tl.load(A_ptr + top[:, None].to(tl.int64) * R + ranks[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    q = tl.load(first_ptr + rows, mask=inside, other=0.0)
    both = tl.minimum(q, share)
    below = tl.where(q < share, q, 0.0)
    short = below[:, None] * a
    for s in tl.static_range(S):
        both += tl.load(both_ptr + s * N + rows, mask=inside, other=0.0)
        below += tl.load(below_ptr + s * N + rows, mask=inside, other=0.0)
        short += tl.load(short_ptr + s * N * R + at, mask=inside[:, None], other=0.0)
    divergence = tl.load(loss_ptr + rows, mask=inside, other=0.0)
    loss, whole, part, pull = _lk(both, below, divergence, eta, LOG)
    tl.store(loss_ptr + rows, tl.where(counts, loss, 0.0), mask=inside)
    tl.store(whole_ptr + rows, tl.where(counts, whole, 0.0), mask=inside)
    tl.store(part_ptr + rows, tl.where(counts, part, 0.0), mask=inside)
    tl.store(pull_ptr + rows, tl.where(counts, pull, 0.0), mask=inside)
    own = tl.load(own_ptr + at, mask=inside[:, None], other=0.0)
    taught = tl.load(taught_ptr + at, mask=inside[:, None], other=0.0)
    dz = whole[:, None] * own - part[:, None] * short - pull[:, None] * taught
    tl.store(dz_ptr + at, tl.where(counts[:, None], dz, 0.0).to(dz_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def spread(
    z_ptr,
    A_ptr,
    t_ptr,
    top_ptr,
    share_ptr,
    lse_ptr,
    first_ptr,
    whole_ptr,
    part_ptr,
    pull_ptr,
    dA_ptr,
    N,
    V,
    scale,
    width,
    pitch,
    heat,
    R: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """dA [V, width] += scale · Σ_n G_nv z_n for a block of entries; width ≤ R columns.

    G = q − t, or with OVERLAP that of `_lk`.
    """
    v0 = tl.program_id(0) * BV
    cols = v0 + tl.arange(0, BV)
    ranks = tl.arange(0, R)
    a = tl.load(A_ptr + cols[:, None].to(tl.int64) * R + ranks[None, :], mask=cols[:, None] < V, other=0.0)
    acc = tl.zeros([BV, R], tl.float32)
    for n0 in range(0, N, BN):
        rows = n0 + tl.arange(0, BN)
        z = tl.load(z_ptr + rows[:, None] * R + ranks[None, :], mask=rows[:, None] < N, other=0.0)
        # tokens are the rows of a tile, as they are in t: loads stay wide, and only g is turned
        t = _targets(t_ptr, rows[:, None], cols[None, :], N, pitch, True).to(tl.float32)
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=float("inf"))
        top = tl.load(top_ptr + rows, mask=rows < N, other=-1)
        share = tl.load(share_ptr + rows, mask=rows < N, other=0.0)
        q = tl.exp2(_product(z, a, PRECISE) * heat - lse[:, None])
        if tl.max(((top >= v0) & (top < v0 + BV)).to(tl.int32), 0) > 0:  # few tiles hold a largest target
            t = tl.where(cols[None, :] == top[:, None], share[:, None], t)
            if OVERLAP:
                first = tl.load(first_ptr + rows, mask=rows < N, other=0.0)
                q = tl.where(cols[None, :] == top[:, None], first[:, None], q)
        if OVERLAP:
            whole = tl.load(whole_ptr + rows, mask=rows < N, other=0.0)
            part = tl.load(part_ptr + rows, mask=rows < N, other=0.0)
            pull = tl.load(pull_ptr + rows, mask=rows < N, other=0.0)
            g = q * (whole[:, None] - tl.where(q < t, part[:, None], 0.0)) - pull[:, None] * t
        else:
            g = q - t
        acc = _add_product(acc, tl.trans(g.to(z.dtype)), z, PRECISE)
    at = dA_ptr + cols[:, None].to(tl.int64) * width + ranks[None, :]
    inside = (cols[:, None] < V) & (ranks[None, :] < width)
    tl.store(at, acc * scale + tl.load(at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _logits_row(at, top, V, width, heat, BLOCK: tl.constexpr):
    """Of a row of logits, base 2: lse, the logit of `top`, and the offset and factor that turn it into the softmax."""
    peak = tl.load(at + top).to(tl.float32) * heat  # before the reductions' barriers: the row is overwritten later
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, V, BLOCK):
        cols = v0 + tl.arange(0, BLOCK)
        s = tl.load(at + cols, mask=cols < width, other=0.0).to(tl.float32) * heat
        s = tl.where(cols < V, s, float("-inf"))
        highest = tl.maximum(m, s)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        l = l * tl.exp2(m - base) + tl.exp2(s - base)
        m = highest
    highest = tl.max(m, 0)
    lse = highest + tl.log2(tl.sum(l * tl.exp2(m - highest), 0))
    return lse, peak, lse, 1.0


@triton.jit
def _sum(sums_ptr, T, BT: tl.constexpr):
    sums = tl.zeros([BT], tl.float32)
    for t0 in range(0, T, BT):
        at = t0 + tl.arange(0, BT)
        sums += tl.load(sums_ptr + at, mask=at < T, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _log2(x):
    """log2 of normal numbers to 1.2e-4, far below what 16 bits round x to; Triton's own takes 80 instructions."""
    bits = x.to(tl.int32, bitcast=True)
    f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    return bits.to(tl.float32) * (1.0 / 8388608.0) - 127.0 + f * (1.0 - f) * (C0 + f * (C1 + f * C2))


@triton.jit
def _block(at, t_at, cols, V, stride, pitch, offset, factor, heat, top, first, share, LOGITS: tl.constexpr):
    """q and t of some columns of a row, and the logits (base 2) without the offset; those of exponentials at 0 are not.

    Also t where an exponential is 0, and so its logit lost.
    """
    x = tl.load(at + cols, mask=cols < stride, other=0.0).to(tl.float32)
    t = tl.load(t_at + cols, mask=cols < pitch, other=0.0).to(tl.float32)
    x = tl.where(cols < V, x, 0.0)
    if LOGITS:
        s = x * heat - offset
        q, lost = tl.where(cols < V, tl.exp2(s), 0.0), tl.zeros_like(t)
    else:
        s = _log2(tl.maximum(x, TINY))
        q, lost = x * factor, tl.where(x <= TINY, t, 0.0)
    return tl.where(cols == top, first, q), tl.where(cols == top, share, t), t * s, lost


@triton.jit
def _mean_logit(t_at, z_at, A_ptr, V, R, offset, BLOCK: tl.constexpr):
    """Σ t (s − offset) from the logits themselves, for the few rows whose exponentials underflow where t matters."""
    mean = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, V, BLOCK):
        cols = v0 + tl.arange(0, BLOCK)
        s = tl.zeros([BLOCK], tl.float32)
        for r in range(0, R):
            a = tl.load(A_ptr + cols.to(tl.int64) * R + r, mask=cols < V, other=0.0).to(tl.float32)
            s += tl.load(z_at + r).to(tl.float32) * a
        mean += tl.load(t_at + cols, mask=cols < V, other=0.0).to(tl.float32) * (s * LOG2E - offset)
    return tl.sum(mean, 0)


@triton.jit
def shape(
    x_ptr,
    z_ptr,
    A_ptr,
    t_ptr,
    top_ptr,
    share_ptr,
    least_ptr,
    offset_ptr,
    peak_ptr,
    sums_ptr,
    loss_ptr,
    V,
    R,
    stride,
    pitch,
    T,
    heat,
    eta,
    BLOCK: tl.constexpr,
    LOGITS: tl.constexpr,
    OVERLAP: tl.constexpr,
    LOG: tl.constexpr,
):
    """One row: loss and gradient G at the logits, in the place of x [M, V]; 0 where the token does not count.

    x: exponentials exp2(log2(e) logit − offset), which sum to Σ sums [M, T], or logits; peak: logits of `top`, base 2.
    """
    row = tl.program_id(0).to(tl.int64)
    at, t_at, z_at = x_ptr + row * stride, t_ptr + row * pitch, z_ptr + row * R
    top, share = tl.load(top_ptr + row), tl.load(share_ptr + row)
    if LOGITS:
        lse, peak, offset, factor = _logits_row(at, top, V, stride, heat, BLOCK)
    else:
        total = _sum(sums_ptr + row * T, T, 256)
        offset, peak, factor = tl.load(offset_ptr + row), tl.load(peak_ptr + row), 1.0 / total
        lse = offset + tl.log2(total)
    first = tl.exp2(peak - lse)  # q of `top`, not rounded to 16 bits
    zeros = tl.zeros([BLOCK], tl.float32)
    mean, lost, both, below = zeros, zeros, zeros, zeros
    for v0 in range(0, V, BLOCK):
        cols = v0 + tl.arange(0, BLOCK)
        q, t, term, gone = _block(at, t_at, cols, V, stride, pitch, offset, factor, heat, top, first, share, LOGITS)
        mean, lost = mean + term, lost + gone
        if OVERLAP:
            both, below = both + tl.minimum(q, t), below + tl.where(q < t, q, 0.0)
        else:
            tl.store(at + cols, tl.where(share == 0.0, 0.0, q - t).to(x_ptr.dtype.element_ty), mask=cols < stride)
    total_mean = tl.sum(mean, 0)
    if tl.sum(lost, 0) > NEGLIGIBLE:
        total_mean = _mean_logit(t_at, z_at, A_ptr, V, R, offset, BLOCK)
    loss = tl.load(least_ptr + row) + (lse - offset - total_mean - share * (peak - offset)) * LN2
    if OVERLAP:
        loss, whole, part, pull = _lk(tl.sum(both, 0), tl.sum(below, 0), loss, eta, LOG)
        for v0 in range(0, V, BLOCK):
            cols = v0 + tl.arange(0, BLOCK)
            q, t, _, _ = _block(at, t_at, cols, V, stride, pitch, offset, factor, heat, top, first, share, LOGITS)
            g = q * (whole - tl.where(q < t, part, 0.0)) - pull * t
            tl.store(at + cols, tl.where(share == 0.0, 0.0, g).to(x_ptr.dtype.element_ty), mask=cols < stride)
    tl.store(loss_ptr + row, tl.where(share == 0.0, 0.0, loss * (LOG2E / heat) * (LOG2E / heat)))

"""Steps of low-rank heads that learn from a teacher's distribution, by Triton kernels.

All heads of a bank learn from the same targets t [n, V], which `prepare` makes once: the teacher's softmax, mixed with
the text where the objective says so. With a head's softmax q at the same temperature T,

    KL          loss = T² KL(t ‖ q)                   G = T² / T (q − t)
    overlap     loss and G of `objectives.lk`         G = q (whole − part · [q < t]) − pull · t

where whole, part and pull are one number a token. The gradients are dA = Gᵀ z and dz = G A.

At low ranks logits are computed where they are used, as for cross-entropy, and Σ_v t_v s_v = z · Σ_v t_v a_v, so that
no logit is stored. At high ranks the first product stores exponentials, as in `losses.exponentials`, and one kernel a
row turns them into G in place; dtypes with fewer exponents store logits there.

t is held in the dtype of the head's products. Its largest entry of a row, which may be near 1 and would then dominate
the rounding errors of both gradients, is kept apart in float32.

Dims: n tokens of a chunk, R rank (padded), V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional

import torch
import triton
from torch import Tensor

import bottleneck.losses.taught_kernels as kernels
from bottleneck.losses import exponential_kernels, exponentials
from bottleneck.losses.exponentials import ALIGN, SAMPLE, hopper
from bottleneck.losses.fused import INTERPRETED, PLAIN, ROW, Tile, chunk_rows, parts
from bottleneck.losses.products import add_product, matmul_f32

LEAST_MEMORY = 240 << 20  # bytes of a chunk
MOST_TOKENS = 1 << 14  # of a chunk, so that z and its gradient stay small
EXPONENTS = torch.float32 if INTERPRETED else torch.bfloat16  # dtype with exponents for any exponential
FLASH_RANK = 128  # above, two sums of R columns no longer fit into registers

# By padded rank, from `benchmark tiles --taught`, likewise.
SCAN = {16: Tile(64, 128, 4, 3, 3), 32: Tile(64, 128, 4, 3, 2), 64: Tile(64, 128, 4, 3, 2), 128: Tile(64, 64, 4, 3, 2)}
SPREAD = {16: Tile(128, 64, 4, 3), 32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 4, 3), 128: Tile(64, 64, 4, 3)}


class Overlap(NamedTuple):
    """The loss of `objectives.lk`: its hybrid form with η, or −log α."""

    eta: float
    log: bool


class Targets(NamedTuple):
    """Targets of a chunk of tokens, the same for all heads.

    Attributes:
        t_nV: dtype of the products; 0 at `top_n` and in ignored rows. Padded with zeros to a multiple of 64 columns.
        top_n: the largest target, int32.
        share_n: its value, float32; 0 where the token does not count.
        least_n: the least value of the cross-entropy with the teacher's part of the targets, nats, float32.
    """

    t_nV: Tensor
    top_n: Tensor
    share_n: Tensor
    least_n: Tensor


def rows(N: int, V: int, itemsize: int, memory: int) -> int:
    """Tokens of a chunk: float32 logits of the teacher, or a head's; and the targets."""
    return min(MOST_TOKENS, chunk_rows(N, V * (4 + itemsize), max(memory, LEAST_MEMORY)))


def prepare(logits_nV: Tensor, y_n: Tensor, temperature: float, mix: float, dtype: torch.dtype) -> Targets:
    """Return mix · softmax(logits / T) + (1 − mix) · onehot(y) as targets for products of a dtype."""
    n, V = logits_nV.shape
    if INTERPRETED and dtype == torch.bfloat16:  # Triton's interpreter rounds it towards zero
        dtype = torch.float32
    t = torch.empty(n, triton.cdiv(V, ALIGN) * ALIGN, dtype=dtype, device=logits_nV.device)
    top = torch.empty(n, dtype=torch.int32, device=t.device)
    share, least = torch.empty(2, n, dtype=torch.float32, device=t.device)
    with torch.cuda.device_of(logits_nV):
        kernels.teach[(n,)](
            logits_nV,
            y_n,
            t,
            top,
            share,
            least,
            V,
            logits_nV.stride(0),
            t.stride(0),
            _heat(temperature),
            mix,
            BLOCK=ROW.entries,
            num_warps=ROW.warps,
        )
    return Targets(t, top, share, least)


def step(
    z: Tensor,
    A: Tensor,
    y: Tensor,
    targets: Targets,
    dA: Tensor,
    scale: float,
    temperature: float = 1.0,
    overlap: Optional[Overlap] = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss [n] and d loss / d z [n, R]; dA += scale · the gradient of A.

    Args:
        z, A: with `fused.padded_rank` columns.
        temperature: 1 with `overlap`.
    """
    if INTERPRETED and z.dtype == torch.bfloat16:  # Triton's interpreter gets products of bfloat16 wrong
        loss, dz = step(z.float(), A.float(), y, targets, dA, scale, temperature, overlap)
        return loss, dz.to(z.dtype)
    with torch.cuda.device_of(z):
        if z.shape[1] <= FLASH_RANK:
            return _flash(z, A, y, targets, dA, scale, temperature, overlap)
        return _rows(z, A, targets, dA, scale, temperature, overlap)


class _Sums(NamedTuple):
    """What the passes of `_flash` hand on, see `kernels.merge`.

    The last three are the coefficients of the gradient, see `kernels._lk`; without an overlap they are not read.
    """

    lse: Tensor
    loss: Tensor
    first: Tensor
    dz: Tensor
    own: Tensor
    taught: Tensor
    whole: Tensor
    part: Tensor
    pull: Tensor


def _flash(
    z: Tensor,
    A: Tensor,
    y: Tensor,
    targets: Targets,
    dA: Tensor,
    scale: float,
    temperature: float,
    overlap: Optional[Overlap],
    scan_tile: Optional[Tile] = None,
    spread_tile: Optional[Tile] = None,
) -> tuple[Tensor, Tensor]:
    fast = z.element_size() == 2 and hopper(z.device)
    tile = scan_tile or (SCAN[z.shape[1]] if fast else PLAIN)
    sums = _scan(z, A, y, targets, temperature, overlap is not None, tile)
    if overlap is not None:
        _overlap(z, A, y, targets, overlap, sums, tile)
    tile = spread_tile or (SPREAD[z.shape[1]] if fast else PLAIN)
    _spread(z, A, targets, dA, scale, temperature, overlap is not None, sums, tile)
    return sums.loss, sums.dz


def _how(z: Tensor, t: Tile) -> dict[str, Any]:
    """Compile-time arguments of a pass."""
    how = {"R": z.shape[1], "BN": t.tokens, "BV": t.entries, "PRECISE": z.dtype == torch.float32}
    return how | {"num_warps": t.warps, "num_stages": t.stages}


def _heat(temperature: float) -> float:
    return math.log2(math.e) / temperature


def _merging(N: int, R: int) -> tuple[tuple[int], int]:
    """Grid and tokens of a program that merges parts of V."""
    BN = max(1, 2048 // R)
    return (triton.cdiv(N, BN),), BN


def _scan(z: Tensor, A: Tensor, y: Tensor, targets: Targets, temperature: float, keep: bool, tile: Tile) -> _Sums:
    (N, R), V, device = z.shape, len(A), z.device
    t, top, share, least = targets
    blocks, S, part = parts(N, V, tile, device)
    m, l = torch.empty(2, S, N, dtype=torch.float32, device=device)
    own, taught = torch.empty(2, S, N, R, dtype=torch.float32, device=device)
    kernels.scan[(blocks, S)](z, A, t, m, l, own, taught, N, V, part, t.stride(0), _heat(temperature), **_how(z, tile))
    lse, loss, first = torch.empty(3, N, dtype=torch.float32, device=device)
    coefficients = torch.empty(3, N, dtype=torch.float32, device=device) if keep else lse.expand(3, N)
    sums = _Sums(lse, loss, first, torch.empty_like(z), own, taught, *coefficients)
    grid, BN = _merging(N, R)
    kernels.merge[grid](
        z,
        A,
        y,
        top,
        share,
        least,
        m,
        l,
        own,
        taught,
        lse,
        first,
        loss,
        sums.dz,
        N,
        _heat(temperature),
        temperature,
        R=R,
        S=S,
        BN=BN,
        KEEP=keep,
    )
    return sums


def _overlap(z: Tensor, A: Tensor, y: Tensor, targets: Targets, o: Overlap, sums: _Sums, tile: Tile) -> None:
    (N, R), V, device = z.shape, len(A), z.device
    t, top, share, _ = targets
    blocks, S, part = parts(N, V, tile, device)
    both, below = torch.empty(2, S, N, dtype=torch.float32, device=device)
    short = torch.empty(S, N, R, dtype=torch.float32, device=device)
    kernels.scan_overlap[(blocks, S)](
        z, A, t, top, sums.lse, both, below, short, N, V, part, t.stride(0), _heat(1.0), **_how(z, tile)
    )
    grid, BN = _merging(N, R)
    kernels.merge_overlap[grid](
        A,
        y,
        top,
        share,
        sums.first,
        sums.own,
        sums.taught,
        both,
        below,
        short,
        sums.whole,
        sums.part,
        sums.pull,
        sums.loss,
        sums.dz,
        N,
        o.eta,
        R=R,
        S=S,
        BN=BN,
        LOG=o.log,
    )


def _spread(
    z: Tensor,
    A: Tensor,
    targets: Targets,
    dA: Tensor,
    scale: float,
    temperature: float,
    overlap: bool,
    sums: _Sums,
    tile: Tile,
) -> None:
    t, top, share, _ = targets
    kernels.spread[(triton.cdiv(len(A), tile.entries),)](
        z,
        A,
        t,
        top,
        share,
        sums.lse,
        sums.first,
        sums.whole,
        sums.part,
        sums.pull,
        dA,
        len(z),
        len(A),
        scale * temperature,
        dA.shape[1],
        t.stride(0),
        _heat(temperature),
        OVERLAP=overlap,
        **_how(z, tile),
    )


def _rows(
    z: Tensor,
    A: Tensor,
    targets: Targets,
    dA: Tensor,
    scale: float,
    temperature: float,
    overlap: Optional[Overlap],
) -> tuple[Tensor, Tensor]:
    (M, R), V, device = z.shape, len(A), z.device
    t, top, share, least = targets
    logits = temperature != 1 or z.dtype != EXPONENTS
    x = torch.empty(M, triton.cdiv(V, ALIGN) * ALIGN, dtype=z.dtype, device=device)
    offset = peak = sums = least  # not read with logits
    if logits:
        torch.mm(z, A.T, out=x[:, :V])
    else:
        offset, peak, sums = _exponentials(z, A, x, top)
    loss = torch.empty(M, dtype=torch.float32, device=device)
    kernels.shape[(M,)](
        x,
        z,
        A,
        t,
        top,
        share,
        least,
        offset,
        peak,
        sums,
        loss,
        V,
        R,
        x.stride(0),
        t.stride(0),
        1 if logits else sums.shape[1],
        _heat(temperature),
        overlap.eta if overlap is not None else 0.0,
        BLOCK=ROW.entries,
        LOGITS=logits,
        OVERLAP=overlap is not None,
        LOG=overlap is not None and overlap.log,
        num_warps=ROW.warps,
    )
    for part in exponentials.aligned(V):
        add_product(dA[part], x[:, part].T, z[:, : dA.shape[1]], scale * temperature)
    whole, *rest = exponentials.aligned(V)
    dz = matmul_f32(x[:, whole], A[whole])
    for part in rest:
        add_product(dz, x[:, part], A[part], 1.0)
    return loss, (dz if temperature == 1 else dz.mul_(temperature)).to(z.dtype)


def _exponentials(z: Tensor, A: Tensor, E: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write E of `losses.exponentials`; return offsets [M], logits of `top` [M] (base 2), and sums [M, T]."""
    (M, R), V, device = z.shape, len(A), z.device
    offset, peak = torch.empty(2, M, dtype=torch.float32, device=device)
    sample = matmul_f32(z, A[:: max(1, V // SAMPLE)][:SAMPLE].T)
    BR = min(1024, triton.next_power_of_2(R))
    exponential_kernels.anchor[(M,)](
        z, A, top, sample, offset, peak, V, R, sample.shape[1], BS=SAMPLE, BR=BR, num_warps=4
    )
    return offset, peak, exponentials.repaired(z, A, E, offset, hopper(device))

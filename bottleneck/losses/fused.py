"""Fused loss: Triton kernels that hold no N x V logits; at high ranks, matrix products on chunks of exponentials.

At low ranks the two passes of `kernels.scan` and `kernels.spread` compute every tile of logits where it is used:
8·N·V·R operations and almost no memory traffic. At high ranks the tensor cores are the limit, and three products with
6·N·V·R operations are faster although a chunk of V-wide rows is written and read, see `losses.exponentials`. Other
dtypes than bfloat16 keep logits in the chunk; one kernel (`kernels.soften`) turns them into their gradient in place.

Needs a GPU; with TRITON_INTERPRET=1 it runs on a CPU, slowly, for tests.
Dims: N tokens, R rank (padded, see `padded_rank`), V vocabulary.
"""

from __future__ import annotations

import os
from typing import NamedTuple, Optional

import torch
import triton
from torch import Tensor

import bottleneck.losses.kernels as kernels
from bottleneck.losses import exponentials
from bottleneck.losses.exponentials import hopper, multiprocessors
from bottleneck.losses.products import add_product, matmul_f32

FLASH_RANK = 256  # without QuACK; with it, gradients of ranks above QUACK_RANK are faster through `losses.exponentials`
QUACK_RANK = 128
MOST_PARTS = 8  # of the vocabulary, in a scan of few tokens
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tile(NamedTuple):
    """Tokens and entries of the vocabulary in a tile, warps, pipeline stages, programs on a multiprocessor.

    search: look whether a tile of `spread` holds a target before comparing all of it; small tiles are compared sooner.
    """

    tokens: int
    entries: int
    warps: int
    stages: int
    resident: int = 1
    search: bool = True


# By padded rank, from `benchmark tiles` with bfloat16, N = 8,192, V = 50,304 (docs/log.md).
SCAN = {
    16: Tile(64, 128, 4, 3, 3),
    32: Tile(64, 64, 4, 3, 4),
    64: Tile(64, 64, 4, 3, 4),
    128: Tile(64, 128, 4, 2, 2),
    256: Tile(128, 64, 8, 3),
}
SPREAD = {
    16: Tile(32, 128, 4, 3, search=False),
    32: Tile(32, 128, 4, 3, search=False),
    64: Tile(128, 64, 4, 3),
    128: Tile(128, 64, 4, 2),
    256: Tile(64, 64, 4, 2),
}
# One program a row of logits.
ROW = Tile(1, 8192, 32, 1)
# Float32 operands and older cards: small enough for any. The interpreter's time grows with the number of tiles.
PLAIN = Tile(128, 512, 4, 2) if INTERPRETED else Tile(32, 32, 4, 2)


def padded_rank(rank: int) -> int:
    """Columns that the kernels need: a power of two from 16 to FLASH_RANK, multiples of 16 beyond."""
    return triton.cdiv(rank, 16) * 16 if rank > FLASH_RANK else max(16, triton.next_power_of_2(rank))


def most_tokens(rank: int) -> int:
    """Tokens of one step at a padded rank: z [N, R] and its gradient stay small, however many tokens there are."""
    return 1 << 16 if rank <= FLASH_RANK else 1 << 14


def tile(table: dict[int, Tile], rank: int, like: Tensor) -> Tile:
    return table[rank] if like.element_size() == 2 and hopper(like.device) else PLAIN


def step(
    z_NR: Tensor, A_VR: Tensor, y_N: Tensor, dA_VR: Optional[Tensor], scale: float, memory: int
) -> tuple[Tensor, Optional[Tensor]]:
    """See `linear.logit_step`. z and A have `padded_rank` columns, zeros beyond the rank of dA."""
    if not len(z_NR):
        return z_NR.new_empty(0, dtype=torch.float32), None if dA_VR is None else z_NR
    if INTERPRETED and z_NR.dtype == torch.bfloat16:  # Triton's interpreter gets products of bfloat16 wrong
        loss, dz = step(z_NR.float(), A_VR.float(), y_N, dA_VR, scale, memory)
        return loss, None if dz is None else dz.to(z_NR.dtype)
    with torch.cuda.device_of(z_NR):  # a kernel runs on the current device
        rank = z_NR.shape[1]
        wide = z_NR.dtype == (torch.float32 if INTERPRETED else torch.bfloat16)  # exponents for any exponential
        if dA_VR is not None and wide and rank > (QUACK_RANK if exponentials.quack(z_NR) else FLASH_RANK):
            rows = chunk_rows(len(z_NR), exponentials.row_bytes(*A_VR.shape), memory)
            return exponentials.step(z_NR, A_VR, y_N, dA_VR, scale, rows)
        if rank > FLASH_RANK:
            return _chunks(z_NR, A_VR, y_N, dA_VR, scale, memory)
        return _flash(z_NR, A_VR, y_N, dA_VR, scale)


def _flash(
    z: Tensor,
    A: Tensor,
    y: Tensor,
    dA: Optional[Tensor],
    scale: float,
    scan_tile: Optional[Tile] = None,
    spread_tile: Optional[Tile] = None,
) -> tuple[Tensor, Optional[Tensor]]:
    (N, R), V = z.shape, len(A)
    grad = dA is not None
    precise = z.dtype == torch.float32
    t = scan_tile or tile(SCAN, R, z)
    blocks, S, part = parts(N, V, t, z.device)
    m, l = torch.empty(2, S, N, dtype=torch.float32, device=z.device)
    acc = torch.empty(S, N, R, dtype=torch.float32, device=z.device) if grad else m
    kernels.scan[(blocks, S)](
        z,
        A,
        y,
        m,
        l,
        acc,
        N,
        V,
        part,
        R=R,
        BN=t.tokens,
        BV=t.entries,
        GRAD=grad,
        PRECISE=precise,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    lse, loss = torch.empty(2, N, dtype=torch.float32, device=z.device)
    dz = torch.empty_like(z) if grad else z
    BN = max(1, 2048 // R)
    kernels.merge[(triton.cdiv(N, BN),)](z, A, y, m, l, acc, lse, loss, dz, N, V, R=R, S=S, BN=BN, GRAD=grad)
    if dA is None:
        return loss, None
    _spread(z, A, y, lse, dA, scale, spread_tile or tile(SPREAD, R, z))
    return loss, dz


def parts(N: int, V: int, t: Tile, device: torch.device) -> tuple[int, int, int]:
    """Blocks of tokens, parts of V that with them fill the chip once, entries of a part: by shapes and card alone."""
    blocks = triton.cdiv(N, t.tokens)
    wanted = max(1, min(MOST_PARTS, multiprocessors(device) * t.resident // blocks))
    part = triton.cdiv(triton.cdiv(V, wanted), t.entries) * t.entries
    return blocks, triton.cdiv(V, part), part


def _spread(z: Tensor, A: Tensor, y: Tensor, lse: Tensor, dA: Tensor, scale: float, t: Tile) -> None:
    (N, R), V = z.shape, len(A)
    kernels.spread[(triton.cdiv(V, t.entries),)](
        z,
        A,
        y,
        lse,
        dA,
        N,
        V,
        scale,
        dA.shape[1],
        R=R,
        BN=t.tokens,
        BV=t.entries,
        ADD=True,
        SEARCH=t.search,
        PRECISE=z.dtype == torch.float32,
        num_warps=t.warps,
        num_stages=t.stages,
    )


def _chunks(
    z: Tensor, A: Tensor, y: Tensor, dA: Optional[Tensor], scale: float, memory: int
) -> tuple[Tensor, Optional[Tensor]]:
    N, V = len(z), len(A)
    loss = torch.empty(N, dtype=torch.float32, device=z.device)
    # a loss alone, as in validation, has the time and the memory for logits that are not rounded to 16 bits
    rows = chunk_rows(N, V * (4 if dA is None else z.element_size()), memory)
    buffer = None if dA is None else torch.empty(rows, V, dtype=z.dtype, device=z.device)
    for start in range(0, N, rows):
        part = z[start : start + rows]
        G = matmul_f32(part, A.T) if buffer is None else torch.mm(part, A.T, out=buffer[: len(part)])
        at = slice(start, start + rows)
        kernels.soften[(len(G),)](
            G, y[at], loss[at], V, G.stride(0), BLOCK=ROW.entries, GRAD=dA is not None, num_warps=ROW.warps
        )
        if dA is not None:
            add_product(dA, G.T, part[:, : dA.shape[1]], scale)
            torch.mm(G, A, out=part)  # dz in the place of z, which is not read again
    return loss, None if dA is None else z


def chunk_rows(N: int, row_bytes: int, memory: int) -> int:
    """Tokens of a chunk: as many rows as fit into memory, in chunks of equal size and whole tiles of 128."""
    most = max(128, memory // row_bytes // 128 * 128)
    chunks = max(1, triton.cdiv(N, most))
    return min(N, triton.cdiv(triton.cdiv(N, chunks), 128) * 128)

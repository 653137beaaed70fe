"""Fused loss: Triton kernels that never write N x V logits; at high rank, matrix products on chunks of logits.

Up to FLASH_RANK the two passes of `kernels.scan` and `kernels.spread` make every tile of logits where it is used: 8·N·V·R
operations and almost no memory traffic. Beyond it the tensor cores are the limit, so the fewer operations of three library products (6·N·V·R)
win although a chunk of logits is written and read: one kernel (`kernels.soften`) turns it into its gradient in place.

Needs a GPU; with TRITON_INTERPRET=1 it runs on a CPU, slowly, for tests.
Dims: N tokens, R rank (padded, see `padded_rank`), V vocabulary.
"""

from __future__ import annotations

import functools
import math
import os
from typing import NamedTuple, Optional

import torch
import triton
from torch import Tensor

import bottleneck.losses.kernels as kernels
from bottleneck.losses.products import add_product, matmul_f32

FLASH_RANK = 256
MEMORY = 240 << 20  # bytes at high rank, beyond inputs and gradients; what is not counted here keeps it under 256 MiB
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tile(NamedTuple):
    """How a kernel is cut: tokens and vocabulary entries in a tile, warps, pipeline stages, programs a multiprocessor holds."""

    tokens: int
    entries: int
    warps: int
    stages: int
    resident: int = 1


# Measured on an H100 with bfloat16, N = 8,192, V = 50,304 (launch/LOG.md), by padded rank.
SCAN = {
    16: Tile(64, 128, 4, 3, 2),
    32: Tile(64, 128, 4, 3, 2),
    64: Tile(64, 128, 4, 3, 2),
    128: Tile(64, 128, 4, 2, 2),
    256: Tile(128, 64, 8, 3),
}
SPREAD = {
    16: Tile(32, 128, 4, 3),
    32: Tile(32, 128, 4, 3),
    64: Tile(128, 64, 4, 3),
    128: Tile(128, 64, 4, 2),
    256: Tile(64, 64, 4, 2),
}
# A row of logits by one program.
ROW = Tile(1, 8192, 32, 1)
# Float32 operands, older cards: small enough for any. The interpreter's time goes by the number of tiles.
PLAIN = Tile(128, 512, 4, 2) if INTERPRETED else Tile(32, 32, 4, 2)


def padded_rank(rank: int) -> int:
    """Columns the kernels want: a power of two from 16 up to FLASH_RANK, beyond that the rank itself."""
    return rank if rank > FLASH_RANK else max(16, triton.next_power_of_2(rank))


def most_tokens(rank: int) -> int:
    """Tokens of one step, given the padded rank: z [N, R] and its gradient stay small beside MEMORY, however many tokens there are."""
    return 1 << 16 if rank <= FLASH_RANK else 1 << 13


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _tile(table: dict[int, Tile], rank: int, like: Tensor) -> Tile:
    return table[rank] if like.element_size() == 2 and _hopper(like.device) else PLAIN


def step(
    z_NR: Tensor, A_VR: Tensor, y_N: Tensor, dA_VR: Optional[Tensor], scale: float
) -> tuple[Tensor, Optional[Tensor]]:
    """See `linear.logit_step`. z and A have `padded_rank` columns, zeros beyond the rank of dA."""
    if not len(z_NR):
        return z_NR.new_empty(0, dtype=torch.float32), None if dA_VR is None else z_NR
    if INTERPRETED and z_NR.dtype == torch.bfloat16:  # whose products Triton's interpreter gets wrong
        loss, dz = step(z_NR.float(), A_VR.float(), y_N, dA_VR, scale)
        return loss, None if dz is None else dz.to(z_NR.dtype)
    with torch.cuda.device_of(z_NR):  # a kernel runs on the current one
        return (_chunks if z_NR.shape[1] > FLASH_RANK else _flash)(z_NR, A_VR, y_N, dA_VR, scale)


def _flash(
    z: Tensor,
    A: Tensor,
    y: Tensor,
    dA: Optional[Tensor],
    scale: float,
    scan_tile: Optional[Tile] = None,
    spread_tile: Optional[Tile] = None,
):
    (N, R), V, grad = z.shape, len(A), dA is not None
    precise = z.dtype == torch.float32
    t = scan_tile or _tile(SCAN, R, z)
    blocks = triton.cdiv(N, t.tokens)
    # as many parts of V as fill the chip once; a function of shapes and card alone
    wanted = max(1, min(8, _multiprocessors(z.device) * t.resident // blocks))
    part = triton.cdiv(triton.cdiv(V, wanted), t.entries) * t.entries
    S = triton.cdiv(V, part)
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
    if not grad:
        return loss, None
    t = spread_tile or _tile(SPREAD, R, z)
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
        PRECISE=precise,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return loss, dz


def _chunks(z: Tensor, A: Tensor, y: Tensor, dA: Optional[Tensor], scale: float):
    N, V, grad = len(z), len(A), dA is not None
    loss = torch.empty(N, dtype=torch.float32, device=z.device)
    # a loss alone, which is a validation, has the time and the memory for logits that are not rounded to 16 bits
    rows = chunk_rows(N, V, z.shape[1], z.element_size() if grad else 4)
    buffer = torch.empty(rows, V, dtype=z.dtype, device=z.device) if grad else None
    for start in range(0, N, rows):
        part = z[start : start + rows]
        G = torch.mm(part, A.T, out=buffer[: len(part)]) if grad else matmul_f32(part, A.T)
        at = slice(start, start + rows)
        kernels.soften[(len(G),)](G, y[at], loss[at], V, G.stride(0), BLOCK=ROW.entries, GRAD=grad, num_warps=ROW.warps)
        if grad:
            add_product(dA, G.T, part, scale)
            torch.mm(G, A, out=part)  # dz in the place of z, which is not read again
    return loss, z if grad else None


def chunk_rows(N: int, V: int, R: int, itemsize: int) -> int:
    """Tokens of a chunk of logits: with z [N, R] beside it under MEMORY, in chunks of equal size and whole tiles of 128."""
    return _equal(N, (MEMORY - N * R * itemsize) // (V * itemsize))


def goal_rows(N: int, V: int, itemsize: int) -> int:
    """Likewise where a full head teaches: its logits in float32 with its softmax beside them, then that and a head's logits."""
    return _equal(N, MEMORY // (V * (4 + itemsize)))


def _equal(N: int, most: int) -> int:
    most = max(128, most // 128 * 128)
    chunks = max(1, triton.cdiv(N, most))
    return min(N, triton.cdiv(triton.cdiv(N, chunks), 128) * 128)


def teach(logits_nV: Tensor, temperature: float, itemsize: int) -> tuple[Tensor, Tensor]:
    """Of a full head's logits: softmax at a temperature p [n, V], and Σ p log p [n], float32.

    Args: itemsize: bytes of an entry of p: 4, or 2, which are float16's: between 0 and 1 it has three bits more than bfloat16.
    """
    n, V = logits_nV.shape
    p = torch.empty(n, V, dtype=torch.float16 if itemsize == 2 else torch.float32, device=logits_nV.device)
    least = torch.empty(n, dtype=torch.float32, device=logits_nV.device)
    with torch.cuda.device_of(logits_nV):
        kernels.teach[(n,)](
            logits_nV,
            p,
            least,
            V,
            logits_nV.stride(0),
            math.log2(math.e) / temperature,
            BLOCK=ROW.entries,
            num_warps=ROW.warps,
        )
    return p, least


def follow(
    logits_nV: Tensor, p_nV: Tensor, least_n: Tensor, y_n: Tensor, temperature: float, mix: float, loss_n: Tensor
) -> None:
    """The loss of a head beside what `teach` gives, as `losses.distill` has it; d loss / d logits takes the place of the logits."""
    if INTERPRETED and logits_nV.dtype == torch.bfloat16:  # which Triton's interpreter rounds towards zero
        wide = logits_nV.float()
        follow(wide, p_nV, least_n, y_n, temperature, mix, loss_n)
        logits_nV.copy_(wide)
        return
    with torch.cuda.device_of(logits_nV):
        kernels.follow[(len(logits_nV),)](
            logits_nV,
            p_nV,
            least_n,
            y_n,
            loss_n,
            logits_nV.shape[1],
            logits_nV.stride(0),
            mix,
            temperature,
            BLOCK=ROW.entries,
            HOT=temperature != 1,
            num_warps=ROW.warps,
        )

"""The loss at high ranks: the first product stores exponentials, so no pass over logits stands between the products.

A step is three products of 2·N·V·R operations, and at high ranks they are its floor. A plain implementation also reads
and writes the logits between the products, to turn them into their gradient. Here the first product itself stores

    E_nv = exp2(log2(e) z_n·a_v − k_n)        with its row sums,     w_n = 1 / Σ_v E_nv

for an offset k_n that is known beforehand, and the normaliser is applied where it is one number a row:

    dz_n = w_n Σ_{v≠y} E_nv a_v + (p_y − 1) a_y         dA_v = Σ_{n: y≠v} E_nv (w_n z_n) + Σ_{n: y=v} (p_y − 1) z_n

The offset need not be the largest logit, since bfloat16 has the exponents of float32: a true maximum between 56 powers
of two below the offset and 88 above it loses nothing. So k_n is the largest logit of a sample of the vocabulary plus 56
powers of two. A block of rows whose sums are too large for that is computed again with the true maximum. The target's
own terms are left out of E and added in float32: they dominate both gradients, and so they stay exact where the head is
nearly certain.

QuACK (Dao 2025) has the exponential in the first product's epilogue too, with an offset per row and tile, which the
other two products then have to apply. One offset per row leaves those to the vendor's library. Where QuACK is
installed, its matrix product runs our epilogue: it overlaps a tile's epilogue with the next tile's product.

Dims: N tokens, M tokens of a chunk, R rank, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import NamedTuple, Optional

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import bottleneck.losses.exponential_kernels as kernels
from bottleneck.losses.products import add_product, matmul_f32

ALIGN = 64  # columns of a row of E
SAMPLE = 256  # entries of the vocabulary whose logits give a row's offset
QUACK_WIDTH = 192  # entries of a tile of QuACK's
log = logging.getLogger("bottleneck")


class ProductTile(NamedTuple):
    """How the first product is cut: a tile's rows and columns, columns of a step of the sum, warps, stages.

    resident: programs that a multiprocessor holds; halves: the epilogue goes in two halves, see the kernel.
    """

    tokens: int
    entries: int
    columns: int
    warps: int
    stages: int
    resident: int = 1
    halves: bool = False


# Measured on an H100 with bfloat16 (docs/log.md): ranks up to 256, and above.
HOPPER_NARROW = ProductTile(128, 128, 64, 4, 3, resident=2, halves=True)
HOPPER = ProductTile(128, 256, 64, 8, 4, halves=True)
PLAIN = ProductTile(64, 64, 32, 4, 3)


def row_bytes(V: int, R: int) -> int:
    """Memory of one token: its row of E with the sums of 64 entries at least, w z in 16 bits, dz in float32."""
    return 2 * triton.cdiv(V, ALIGN) * ALIGN + 4 * triton.cdiv(V, 64) + 6 * R


def step(
    z: Tensor, A: Tensor, y: Tensor, dA: Tensor, scale: float, rows: int, tma: Optional[bool] = None
) -> tuple[Tensor, Tensor]:
    """Return the loss [N] and dz [N, R], which replaces z; dA += scale · its gradient. In chunks of `rows` tokens.

    Args:
        z, A: bfloat16 (float32 in Triton's interpreter), contiguous, R a multiple of 8 where TMA is used.
        tma: read operands through the tensor memory accelerator; default: on cards that have it, Hopper and later.
    """
    N, V = len(z), len(A)
    tma = hopper(z.device) if tma is None else tma
    loss = torch.empty(N, dtype=torch.float32, device=z.device)
    buffer = torch.empty(min(rows, N), triton.cdiv(V, ALIGN) * ALIGN, dtype=z.dtype, device=z.device)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        _chunk(z[part], A, y[part], dA, scale, loss[part], buffer[: len(y[part])], tma)
    return loss, z


def _chunk(z: Tensor, A: Tensor, y: Tensor, dA: Tensor, scale: float, loss: Tensor, E: Tensor, tma: bool) -> None:
    (M, R), V, device = z.shape, len(A), z.device
    offset, own, weight, excess = (torch.empty(M, dtype=torch.float32, device=device) for _ in range(4))
    BR = min(1024, triton.next_power_of_2(R))
    sample = matmul_f32(z, A[:: max(1, V // SAMPLE)][:SAMPLE].T)
    kernels.anchor[(M,)](z, A, y, sample, offset, own, V, R, sample.shape[1], BS=SAMPLE, BR=BR, num_warps=4)
    sums = repaired(z, A, E, offset, tma)
    T = sums.shape[1]
    weighted = torch.empty_like(z)
    kernels.settle[(M,)](
        z, E, y, offset, own, sums, loss, weight, excess, weighted, V, R, E.stride(0), T, BT=256, BR=BR, num_warps=4
    )
    for part in aligned(V):
        add_product(dA[part], E[:, part].T, weighted[:, : dA.shape[1]], scale)
    del weighted
    order = torch.empty(M, dtype=torch.int32, device=device)
    kernels.arrange[(triton.cdiv(M, 16),)](y, order, M, BM=16, BN=512, num_warps=4)
    BR = min(512, BR)
    kernels.add_targets[(M, triton.cdiv(R, BR))](
        z, y, excess, order, dA, M, V, R, dA.shape[1], scale, BM=16, BR=BR, num_warps=4
    )
    whole, *rest = aligned(V)
    dz32 = matmul_f32(E[:, whole], A[whole])
    for part in rest:
        add_product(dz32, E[:, part], A[part], 1.0)
    kernels.finish[(M,)](dz32, A, y, weight, excess, z, V, R, BR=BR, num_warps=4)


def aligned(V: int) -> list[slice]:
    """Parts of the vocabulary for the products: a library product over an odd V takes twice as long or more."""
    whole = V // ALIGN * ALIGN
    return [slice(0, V)] if V % 8 == 0 or not whole else [slice(0, whole), slice(whole, V)]


def repaired(z: Tensor, A: Tensor, E: Tensor, offset: Tensor, tma: bool) -> Tensor:
    """Write E [M, V] and return the sums [M, T] of its tiles' rows; raises the offsets of rows that need it."""
    (M, R), V = z.shape, len(A)
    sums = exponentials(z, A, E, offset, tma)
    kernels.repair[(triton.cdiv(M, 64),)](
        z,
        A,
        E,
        offset,
        sums,
        M,
        V,
        R,
        E.stride(0),
        sums.shape[1],
        BM=64,
        BT=64,
        BV=128,
        BK=32,
        PRECISE=z.dtype == torch.float32,
        num_warps=4,
    )
    return sums


def exponentials(z: Tensor, A: Tensor, E: Tensor, offset: Tensor, tma: bool) -> Tensor:
    """Write E [M, V] and return the sums [M, T] of its tiles' rows in float32."""
    (M, R), V = z.shape, len(A)
    product = quack(z)
    whole = V // QUACK_WIDTH if product is not None else 0  # tiles that QuACK takes, which are never ragged
    start = whole * QUACK_WIDTH
    t = (HOPPER if R > 256 else HOPPER_NARROW) if tma else PLAIN
    sums = torch.empty(M, whole + triton.cdiv(V - start, t.entries), dtype=torch.float32, device=z.device)
    if product is not None and whole:
        product.exponentials(z, A[:start], E[:, :start], offset, sums[:, :whole], QUACK_WIDTH)
    if start < V:
        part = _by_tma if tma else _by_pointers
        part(z, A[start:], E[:, start:V], offset, sums[:, whole:], t)
    return sums


def _by_pointers(z: Tensor, A: Tensor, E: Tensor, offset: Tensor, sums: Tensor, t: ProductTile) -> None:
    (M, R), V = z.shape, len(A)
    kernels.exponentiate[(triton.cdiv(M, t.tokens) * sums.shape[1],)](
        z,
        A,
        E,
        offset,
        sums,
        M,
        V,
        R,
        E.stride(0),
        sums.stride(0),
        BM=t.tokens,
        BV=t.entries,
        BK=t.columns,
        PRECISE=z.dtype == torch.float32,
        num_warps=t.warps,
        num_stages=t.stages,
    )


def _by_tma(z: Tensor, A: Tensor, E: Tensor, offset: Tensor, sums: Tensor, t: ProductTile) -> None:
    (M, R), V, T = z.shape, len(A), sums.shape[1]
    programs = min(triton.cdiv(M, t.tokens) * T, multiprocessors(z.device) * t.resident)
    kernels.exponentiate_tma[(programs,)](
        TensorDescriptor.from_tensor(z, [t.tokens, t.columns]),
        TensorDescriptor.from_tensor(A, [t.entries, t.columns]),
        TensorDescriptor.from_tensor(E, [t.tokens, t.entries // (1 + t.halves)]),
        offset,
        sums,
        M,
        V,
        R,
        T,
        sums.stride(0),
        programs,
        BM=t.tokens,
        BV=t.entries,
        BK=t.columns,
        HALVES=t.halves,
        PRECISE=z.dtype == torch.float32,
        num_warps=t.warps,
        num_stages=t.stages,
    )


def quack(z: Tensor) -> Optional[ModuleType]:
    """Return QuACK's first product if it supports these operands (bfloat16 on Hopper, package installed), else None."""
    return _quack(z.device) if z.is_cuda and z.dtype == torch.bfloat16 else None


@functools.cache
def _quack(device: torch.device) -> Optional[ModuleType]:
    if torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        return importlib.import_module("bottleneck.losses.quack_epilogue")
    except Exception as error:  # a compiler package may raise anything on an unknown machine
        why = f"{type(error).__name__}: {error}"
        log.info("head steps at ranks above 128 run without QuACK, up to 20 %% slower (%s); see docs/speed.md", why)
        return None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

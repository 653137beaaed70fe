"""Chunked loss: the gradient of a chunk of tokens is computed while its logits are in memory.

For a chunk of n tokens with z = h Bᵀ and softmax p:

    loss = Σ log Σ_v exp(z·a_v) − z·a_y          G = p − onehot(y)    [n, V]
    dA += Gᵀ z         dz = G A        then once:   dB = dzᵀ h,  dh = dz B

A step costs three products of 2·N·V·R operations, and memory holds one chunk of logits, whatever N is.
Products run in the dtype of z (bfloat16 on a GPU), sums and softmax in float32. Any device.

Dims: N tokens, R rank, V vocabulary.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from bottleneck.losses.products import add_product, matmul_f32

# Bytes of float32 logits in one chunk. On a CPU a chunk stays near the caches, but has at least ROWS tokens: with
# fewer, the sum into dA costs more than the products (measured, see the log). On a GPU it bounds memory: logits and
# their softmax in 16 bits together stay under 256 MiB.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 96 << 20}
ROWS = {"cpu": 256, "cuda": 16}
MOST_BYTES = 96 << 20  # upper bound for the float32 logits of a chunk, also with ROWS tokens


def chunk_rows(vocab: int, device_type: str) -> int:
    """Return the tokens of one chunk, from vocabulary and device only: a head's bits do not depend on other heads."""
    rows = max(ROWS.get(device_type, 16), CHUNK_BYTES.get(device_type, 96 << 20) // (4 * vocab))
    return max(1, min(rows, MOST_BYTES // (4 * vocab)))


def token_losses(logits_nV: Tensor, y_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of one chunk and its softmax, which overwrites the logits.

    log Σ exp comes from the largest entry of the softmax (at least 1/V, so its logarithm is well conditioned): two
    cheap passes instead of a second exponential of every entry.

    Returns: loss [n] in nats, softmax [n, V]; float32.
    """
    picked_n = logits_nV.gather(1, y_n[:, None]).squeeze(1)
    top_n = logits_nV.amax(dim=-1)
    p_nV = torch.softmax(logits_nV, dim=-1, out=logits_nV)
    return (top_n - p_nV.amax(dim=-1).log()) - picked_n, p_nV


def step(
    z_NR: Tensor, A_VR: Tensor, y_N: Tensor, dA_VR: Optional[Tensor], scale: float, memory: int = 0
) -> tuple[Tensor, Optional[Tensor]]:
    """See `linear.logit_step`. Chunks depend on the vocabulary alone, not on `memory`."""
    N, V = len(z_NR), len(A_VR)
    keep_N, target_N = y_N >= 0, y_N.clamp(min=0).long()
    loss_N = torch.empty(N, dtype=torch.float32, device=z_NR.device)
    dz_NR = torch.empty_like(z_NR) if dA_VR is not None else None
    rows = chunk_rows(V, z_NR.device.type)
    if not z_NR.is_cuda and z_NR.dtype != torch.float32:
        # a CPU has no 16-bit products with 32-bit results; cast once here, not in every chunk
        z_NR, A_VR = z_NR.float(), A_VR.float()
    reuse = z_NR.dtype == torch.float32 or not z_NR.is_cuda  # otherwise the product allocates its own result
    buffer = torch.empty(min(rows, N), V, device=z_NR.device) if reuse else None
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        z, y, keep = z_NR[part], target_N[part], keep_N[part]
        loss, G = token_losses(matmul_f32(z, A_VR.T, out=None if buffer is None else buffer[: len(y)]), y)
        loss_N[part] = loss.masked_fill(~keep, 0.0)
        if dA_VR is None or dz_NR is None:
            continue
        G.scatter_add_(1, y[:, None], G.new_full((len(y), 1), -1.0))
        G = G.to(z.dtype)
        # masked rows are zeroed in z and dz, which are R wide; G is V wide
        add_product(dA_VR, G.T, z * keep[:, None], scale)
        dz_NR[part] = (G @ A_VR) * keep[:, None]
    return loss_N, dz_NR

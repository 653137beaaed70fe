"""Chunked loss: the gradient of a chunk of tokens is taken while its logits are at hand, so nothing is computed twice.

For a chunk of n tokens with z = h Bᵀ and softmax p:

    loss = Σ log Σ_v exp(z·a_v) − z·a_y          G = p − onehot(y)    [n, V]
    dA += Gᵀ z         dz = G A        then once:   dB = dzᵀ h,  dh = dz B

so a step costs three products of 2·n·V·R operations, and memory holds one chunk of logits, whatever N is.
Products run in the dtype of `h` (bfloat16 on a GPU), sums and softmax in float32. Any device.

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of float32 logits in one chunk. On a CPU a chunk stays near the caches, but not under ROWS tokens: below that the
# sum into dA costs more than the products (measured: launch/LOG.md). On a GPU it bounds memory: logits and their softmax
# in 16 bits together stay under 256 MiB.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 96 << 20}
ROWS = {"cpu": 256, "cuda": 16}


def chunk_rows(vocab: int, device_type: str) -> int:
    """Tokens in one chunk: depends on the vocabulary and device alone, so that a head's bits do not depend on company."""
    return max(ROWS.get(device_type, 16), CHUNK_BYTES.get(device_type, 96 << 20) // (4 * vocab))


def matmul_f32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with a float32 result, also for 16-bit inputs (accumulated in float32, not rounded in between).

    Args: out: a float32 buffer that may be used for the result; saves a CPU the page faults of fresh memory.
    """
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float(), out=out)


def token_losses(logits_nV: Tensor, y_n: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of one chunk and its softmax, which overwrites the logits.

    log Σ exp is read off the largest entry of the softmax (at least 1/V, so its logarithm is well conditioned), which
    costs two cheap passes instead of a second exponential of every entry.

    Returns: loss [n] in nats, softmax [n, V]; float32.
    """
    picked_n = logits_nV.gather(1, y_n[:, None]).squeeze(1)
    top_n = logits_nV.amax(dim=-1)
    p_nV = torch.softmax(logits_nV, dim=-1, out=logits_nV)
    return (top_n - p_nV.amax(dim=-1).log()) - picked_n, p_nV


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Summed loss over the tokens that are not masked. See the module's docstring."""

    @staticmethod
    def forward(ctx, h_ND: Tensor, A_VR: Tensor, B_RD: Tensor, y_N: Tensor, ignore_index: int) -> Tensor:
        dtype = h_ND.dtype
        A, B = A_VR.to(dtype), B_RD.to(dtype)
        need_h, need_A, need_B = ctx.needs_input_grad[:3]
        need_z = need_h or need_B
        z_NR = h_ND @ B.T
        keep_N = y_N != ignore_index
        target_N = y_N.clamp(min=0) if ignore_index < 0 else y_N.masked_fill(~keep_N, 0)
        loss_N = torch.empty(len(y_N), dtype=torch.float32, device=h_ND.device)
        dA = torch.zeros(A_VR.shape, dtype=torch.float32, device=h_ND.device) if need_A else None
        dz_NR = torch.empty_like(z_NR) if need_z else None
        rows = chunk_rows(len(A), h_ND.device.type)
        reuse = dtype == torch.float32 or not h_ND.is_cuda  # else the product allocates its own result
        buffer = torch.empty(min(rows, len(y_N)), len(A), device=h_ND.device) if reuse else None
        for start in range(0, len(y_N), rows):
            part = slice(start, start + rows)
            z, y, keep = z_NR[part], target_N[part], keep_N[part]
            loss, G = token_losses(matmul_f32(z, A.T, out=None if buffer is None else buffer[: len(y)]), y)
            loss_N[part] = loss.masked_fill(~keep, 0.0)
            if not (need_A or need_z):
                continue
            G.scatter_add_(1, y[:, None], G.new_full((len(y), 1), -1.0))
            G = G.to(dtype)
            if dA is not None:  # masked rows are zeroed in z and dz: they are R wide, G is V wide
                z = z * keep[:, None]
                dA.addmm_(G.T, z) if dtype == torch.float32 else dA.add_(matmul_f32(G.T, z))
            if dz_NR is not None:
                dz_NR[part] = (G @ A) * keep[:, None]
        dB = matmul_f32(dz_NR.T, h_ND).to(B_RD.dtype) if need_B else None
        dh = dz_NR @ B if need_h else None
        ctx.save_for_backward(dh, None if dA is None else dA.to(A_VR.dtype), dB)
        # a double-precision sum: the value does not depend on how N was cut into calls
        return loss_N.sum(dtype=torch.float64).float()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *(None if g is None else g * grad for g in ctx.saved_tensors), None, None

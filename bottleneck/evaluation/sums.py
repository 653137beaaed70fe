"""Validation losses as sums over tokens.

What is exact: every validation token is counted once, whatever the number of processes and the batch size, and losses
of tokens are summed in float64. What is not: logits and their softmax are float32, in training and in validation alike.
Compared with float64 throughout, losses are 8e-7 nats low at V = 8,192 and 8.4e-6 nats low at V = 49,152.

Dims: N tokens, D hidden size, V vocabulary, H heads.
"""

from __future__ import annotations

import math
from typing import Iterable, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from bottleneck.backbone.model import Backbone, FullHead
from bottleneck.heads.bank import HeadBank
from bottleneck.losses import logit_step, targets
from bottleneck.losses.chunked import chunk_rows, token_losses


@torch.no_grad()
def full_head_loss(h_ND: Tensor, head: FullHead, y_N: Tensor, ignore_index: int = -100) -> Tensor:
    """Summed cross-entropy of the original head (bias, scale and cap included): float64 scalar, nats."""
    W = head.W_VD
    if head.plain:
        return logit_step(h_ND, W, targets(y_N, ignore_index), "chunked")[0].sum(dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=h_ND.device)
    rows = chunk_rows(len(W), h_ND.device.type)
    for h, y in zip(h_ND.split(rows), y_N.split(rows)):
        keep = y != ignore_index
        loss, _ = token_losses(head.float_logits(h), y.masked_fill(~keep, 0))
        total += loss.masked_fill(~keep, 0.0).sum(dtype=torch.float64)
    return total


@torch.no_grad()
def validate(
    backbone: Backbone, bank: HeadBank, batches: Iterable[tuple[Tensor, Tensor]], ignore_index: int = -100
) -> tuple[list[float], float, int]:
    """Mean loss of every head and of the original head over all tokens of all processes.

    Args:
        batches: this process's (inputs [N, T], targets [N, T]). Together the processes hold every block once.
    Returns: losses of the heads (NaN or inf where a head diverged), loss of the original head, tokens counted; nats.
    """
    device = backbone.lm_head.weight.device
    cast = bank.cast(backbone.lm_head.weight.dtype)
    sums = torch.zeros(len(bank) + 2, dtype=torch.float64, device=device)
    for inputs, goals in batches:
        h = backbone(inputs.to(device, non_blocking=True)).flatten(0, 1)
        y = goals.to(device, non_blocking=True).flatten()
        sums[:-2] += bank.losses(h, y, cast)
        sums[-2] += full_head_loss(h, backbone.head, y, ignore_index)
        sums[-1] += (y != ignore_index).sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    *heads, full, tokens = sums.tolist()
    return [s / tokens for s in heads], full / tokens, int(tokens)


def finite(value: Optional[float]) -> Optional[float]:
    """The value, or None if JSON cannot represent it (NaN, infinity)."""
    return value if value is not None and math.isfinite(value) else None


def derived(loss: Optional[float], tokens: int, text_bytes: int) -> dict[str, Optional[float]]:
    """Loss in nats a token, perplexity exp(loss), bits per byte = loss · tokens / (ln 2 · bytes of the text).

    Perplexity is None from 700 nats on: float64 overflows at 709.
    """
    loss = finite(loss)
    if loss is None:
        return {"loss": None, "perplexity": None, "bits_per_byte": None}
    perplexity = math.exp(loss) if loss < 700 else None
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": loss * tokens / (math.log(2) * text_bytes)}

"""Training on what the full head says: KL from its softmax at a temperature, alone or mixed with cross-entropy on the data.

For a token with the full head's logits s* and a head's logits s = A z, z = B h (Hinton et al. 2015):

    loss = (1 − m) · CE(y, softmax(s)) + m · T² · KL(softmax(s*/T) ‖ softmax(s/T))
    d loss / d s = (1 − m) · (softmax(s) − onehot(y)) + m · T · (softmax(s/T) − softmax(s*/T))

A chunk of tokens at a time on any device; the full head's softmax is made once for all heads of a bank, which share nothing
else, so each head has the bits that it has alone.

Dims: n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import torch
from torch import Tensor

from bottleneck.losses.chunked import chunk_rows
from bottleneck.losses.linear import Weights
from bottleneck.losses.products import add_product, matmul_f32


class Objective(NamedTuple):
    """What heads are trained on: the full head's logits [n, V] of hidden states [n, D], T and the share m of the KL."""

    teacher: Callable[[Tensor], Tensor]
    temperature: float
    mix: float  # 0: cross-entropy alone, 1: KL alone


def steps(h_ND: Tensor, heads: list[Weights], y_N: Tensor, gradients: list[tuple[Tensor, Tensor]], scale: float, o: Objective) -> Tensor:
    """Losses [H, N] of heads on the same tokens; scale · the gradient of each summed loss is added to its (dA [V, R], dB [R, D]).

    Args: y_N: from `linear.targets`; tokens with -1 do not count, nor does their KL.
    """
    N, V, T = len(h_ND), len(heads[0].A), o.temperature
    losses = torch.zeros(len(heads), N, dtype=torch.float32, device=h_ND.device)
    rows = max(1, chunk_rows(V, h_ND.device.type) // 2)  # two chunks of V-wide numbers are held instead of one
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        h, keep = h_ND[part], y_N[part] >= 0
        y = y_N[part].clamp(min=0).long()[:, None]
        log_p = torch.log_softmax(o.teacher(h) / T, -1)
        p = log_p.exp()
        for i, (w, (dA, dB)) in enumerate(zip(heads, gradients)):
            z = h @ w.B.T
            logits = matmul_f32(z, w.A.T)
            log_q = torch.log_softmax(logits / T, -1)
            loss = o.mix * T * T * (p * (log_p - log_q)).sum(-1)
            G = log_q.exp_().sub_(p).mul_(o.mix * T)
            if o.mix < 1:
                log_1 = torch.log_softmax(logits, -1)
                loss -= (1 - o.mix) * log_1.gather(1, y).squeeze(1)
                G.add_(log_1.exp_().scatter_add_(1, y, log_1.new_full((len(y), 1), -1.0)), alpha=1 - o.mix)
            losses[i, part] = loss.masked_fill(~keep, 0.0)
            G, keep_z = G.to(z.dtype), keep[:, None]
            add_product(dA, G.T, (z * keep_z)[:, : w.rank], scale)
            add_product(dB, ((G @ w.A) * keep_z)[:, : w.rank].T, h, scale)
    return losses

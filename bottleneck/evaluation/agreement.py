"""What a head loses, beyond perplexity: how far its predictions are from the full head's, and which tokens pay.

With p the full head's distribution at a token and q the low-rank head's, means over validation tokens of

    kl               Σ_v p_v log(p_v / q_v), nats
    top1_agreement   1 where both have the same most likely token
    top5_agreement   share of the full head's five most likely tokens that are among the head's five
    acceptance       Σ_v min(p_v, q_v): how often a token drafted by the head is accepted (Leviathan et al. 2023, Cor. 3.6)

and the loss by how frequent the target token is in the training text. Sums over all tokens, a chunk of logits at a time.

Dims: N tokens, n tokens of a chunk, D hidden size, V vocabulary, H heads, K numbers of a head.
"""

from __future__ import annotations

from typing import Any, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.heads.bank import HeadBank
from bottleneck.losses.chunked import chunk_rows
from bottleneck.losses.products import matmul_f32

NUMBERS = ("kl", "top1_agreement", "top5_agreement", "acceptance")
TOP = 5
# Places in the order of frequency, from 1: the last band has the rest and what the training text lacks.
BANDS = ((1, 10), (11, 100), (101, 1_000), (1_001, 10_000), (10_001, None))
COUNTED = 200_000_000  # training tokens whose frequencies are counted, at most


def bands_of(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """The band of every token id, int64 [V], by its count in a text; among equal counts the smaller id is the more frequent."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, min(len(tokens), COUNTED), 1 << 24):
        counts += np.bincount(tokens[start : min(start + (1 << 24), COUNTED)], minlength=vocab_size)
    place = np.empty(vocab_size, np.int64)
    place[np.argsort(-counts, kind="stable")] = np.arange(1, vocab_size + 1)
    return torch.from_numpy(np.searchsorted([first for first, _ in BANDS[1:]], place, side="right"))


def band_names() -> list[str]:
    return [f"{first}–{last}" if last else f"{first}–" for first, last in BANDS]


def top(log_p_nV: Tensor) -> Tensor:
    """The most likely tokens, [n, TOP] (all of a smaller vocabulary), the likeliest first."""
    return log_p_nV.topk(min(TOP, log_p_nV.shape[1])).indices


def differences(log_p_nV: Tensor, top_p: Tensor, log_q_nV: Tensor) -> Tensor:
    """The four numbers of each token, [n, 4], from log-probabilities of the full head, its `top`, and those of another head."""
    kl = (log_p_nV.exp() * (log_p_nV - log_q_nV)).sum(-1)
    top_q = top(log_q_nV)
    shared = (top_p[:, :, None] == top_q[:, None, :]).any(-1).float().mean(-1)
    accepted = torch.minimum(log_p_nV, log_q_nV).exp().sum(-1)
    return torch.stack([kl, (top_p[:, 0] == top_q[:, 0]).float(), shared, accepted], -1)


def _by_band(log_p_nV: Tensor, y_n: Tensor, member_nK: Tensor) -> Tensor:
    """Summed losses of each band [K], float64, as a product: adding in any order, as GPUs do, would give other bits each time."""
    return -log_p_nV.gather(1, y_n[:, None]).squeeze(1).double() @ member_nK


@torch.no_grad()
def compare(
    backbone: Backbone,
    bank: HeadBank,
    batches: Iterable[tuple[Tensor, Tensor]],
    band_V: Tensor,
    ignore_index: int = -100,
) -> dict[str, Any]:
    """`NUMBERS` and losses by band of every head, over all tokens of all processes.

    Args:
        batches: this process's (inputs [N, T], targets [N, T]); together the processes hold every block once.
        band_V: from `bands_of`.
    Returns: heads: {name: {kl, …, bands: [{band, tokens, loss}]}}; reference: {bands} of the full head.
    """
    device = backbone.lm_head.weight.device
    V, H = len(band_V), len(bank)
    band_V = band_V.to(device)
    weights = [tuple(t.to(backbone.dtype) for t in bank.factors(key)) for key in bank.keys]
    numbers = torch.zeros(H, len(NUMBERS), dtype=torch.float64, device=device)
    losses = torch.zeros(H + 1, len(BANDS), dtype=torch.float64, device=device)  # the full head's last
    counts = torch.zeros(len(BANDS), dtype=torch.float64, device=device)
    rows = chunk_rows(V, device.type)
    for inputs, goals in batches:
        h = backbone(inputs.to(device, non_blocking=True)).flatten(0, 1)
        y = goals.to(device, non_blocking=True).flatten()
        keep = y != ignore_index
        h, y = h[keep], y[keep]
        for h_nD, y_n in zip(h.split(rows), y.split(rows)):
            member_nK = torch.nn.functional.one_hot(band_V[y_n], len(BANDS)).double()
            counts += member_nK.sum(0).to(counts.dtype)
            log_p = torch.log_softmax(backbone.head.float_logits(h_nD), -1)
            top_p = top(log_p)
            for i, (A, B) in enumerate(weights):
                log_q = torch.log_softmax(matmul_f32(h_nD @ B.T, A.T), -1)
                numbers[i] += differences(log_p, top_p, log_q).sum(0, dtype=torch.float64)
                losses[i] += _by_band(log_q, y_n, member_nK)
            losses[H] += _by_band(log_p, y_n, member_nK)
    if dist.is_available() and dist.is_initialized():
        for t in (numbers, losses, counts):
            dist.all_reduce(t)
    total = counts.sum()
    means, by_band, tokens = (numbers / total).tolist(), (losses / counts).tolist(), [int(c) for c in counts.tolist()]

    def table(row: list[float]) -> list[dict[str, Any]]:
        return [
            {"band": name, "tokens": t, "loss": x if x == x and abs(x) != float("inf") else None}
            for name, t, x in zip(band_names(), tokens, row)
        ]

    heads = {
        key.name: {n: (x if x == x else None) for n, x in zip(NUMBERS, row)} | {"bands": table(by_band[i])}
        for i, (key, row) in enumerate(zip(bank.keys, means))
    }
    return {"heads": heads, "reference": {"bands": table(by_band[H])}}

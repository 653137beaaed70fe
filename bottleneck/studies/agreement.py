"""How far low-rank heads are from the full one, on the same tokens: loss, KL, agreement, acceptance.

Dims: N tokens, D hidden size, R rank, V vocabulary, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Sequence

import torch
from torch import Tensor

from bottleneck.backbone import FullHead
from bottleneck.losses.chunked import chunk_rows

NAMES = ("loss", "kl", "agreement", "acceptance")


@dataclass
class Agreement:
    """Sums over tokens for H heads beside the full head; float64. `add` any number of batches, then read `means`.

    loss        cross-entropy, nats a token
    kl          KL(full head ‖ head), nats a token
    agreement   share of tokens whose most likely next token is the full head's
    acceptance  Σ_v min(p_v, q_v): share of drafts that speculative decoding would accept (SlimSpec, arXiv 2605.10453)
    """

    heads: Sequence[tuple[Tensor, Tensor]]  # A [V, R], B [R, D] float32, on the device of the hidden states
    sums_H4: Tensor = field(init=False)
    full: float = 0.0
    tokens: int = 0

    def __post_init__(self):
        self.sums_H4 = torch.zeros(len(self.heads), len(NAMES), dtype=torch.float64)

    @torch.no_grad()
    def add(self, h_ND: Tensor, y_N: Tensor, head: FullHead) -> None:
        """Take in hidden states and their targets, none of them to be ignored. Three chunks of logits are held at a time."""
        rows = chunk_rows(len(head.W_VD), h_ND.device.type)
        for h, y in zip(h_ND.split(rows), y_N.split(rows)):
            log_full = torch.log_softmax(head.logits(h).float(), dim=-1)
            full = log_full.exp()
            negative_entropy = (full * log_full).sum(dtype=torch.float64).item()
            self.full -= log_full.gather(1, y[:, None]).sum(dtype=torch.float64).item()
            top = log_full.argmax(dim=-1)
            del log_full
            self.tokens += len(y)
            for i, (A, B) in enumerate(self.heads):
                log_p = torch.log_softmax((h.float() @ B.T) @ A.T, dim=-1)
                loss = -log_p.gather(1, y[:, None]).sum(dtype=torch.float64).item()
                kl = negative_entropy - torch.einsum("nv,nv->n", full, log_p).sum(dtype=torch.float64).item()
                agree = (log_p.argmax(dim=-1) == top).sum().item()
                accept = torch.minimum(log_p.exp_(), full).sum(dtype=torch.float64).item()
                self.sums_H4[i] += torch.tensor([loss, kl, agree, accept], dtype=torch.float64)

    @property
    def means(self) -> list[dict[str, Any]]:
        """One dict a head with NAMES and `perplexity`; numbers that overflowed are None."""
        out = []
        for sums in (self.sums_H4 / self.tokens).tolist():
            numbers = {name: x if math.isfinite(x) else None for name, x in zip(NAMES, sums)}
            loss = numbers["loss"]
            out.append({**numbers, "perplexity": math.exp(loss) if loss is not None and loss < 700 else None})
        return out

    @property
    def full_loss(self) -> float:
        """Of the full head, nats a token."""
        return self.full / self.tokens

"""How far low-rank heads are from the original head on the same tokens: loss and the numbers of `evaluation.agreement`.

Dims: N tokens, n tokens of a chunk, D hidden size, R rank, V vocabulary, H heads, K numbers for each head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Sequence

import torch
from torch import Tensor

from bottleneck.backbone.model import FullHead
from bottleneck.core.extensions import METRICS, Predictions
from bottleneck.evaluation.agreement import metric_sums
from bottleneck.losses.chunked import chunk_rows

NUMBERS = ("kl", "top1_agreement", "top5_agreement", "acceptance")  # metrics that studies report
NAMES = ("loss", *NUMBERS)


def _loss(log_p_nV: Tensor, y_n: Tensor) -> float:
    return -log_p_nV.gather(1, y_n[:, None]).sum(dtype=torch.float64).item()


@dataclass
class Agreement:
    """Sums over tokens for H heads and the original head; float64. `add` any number of batches, then read `means`."""

    heads: Sequence[tuple[Tensor, Tensor]]  # A [V, R], B [R, D] float32, on the device of the hidden states
    sums_HK: Tensor = field(init=False)
    full: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.sums_HK = torch.zeros(len(self.heads), len(NAMES), dtype=torch.float64)

    @torch.no_grad()
    def add(self, h_ND: Tensor, y_N: Tensor, head: FullHead) -> None:
        """Add hidden states [N, D] and targets [N], none of them ignored. Six chunks of logits are held at a time."""
        rows = chunk_rows(len(head.W_VD), h_ND.device.type)
        wanted = [METRICS[name] for name in NUMBERS]
        for h, y in zip(h_ND.split(rows), y_N.split(rows)):
            original = Predictions(torch.log_softmax(head.float_logits(h), dim=-1), y)
            self.full += _loss(original.log_p_nV, y)
            self.tokens += len(y)
            for i, (A, B) in enumerate(self.heads):
                log_q = torch.log_softmax((h.float() @ B.T) @ A.T, dim=-1)
                numbers = metric_sums(original, Predictions(log_q, y), wanted).tolist()
                self.sums_HK[i] += torch.tensor([_loss(log_q, y), *numbers], dtype=torch.float64)

    @property
    def means(self) -> list[dict[str, Any]]:
        """For each head a dict with NAMES and `perplexity`; numbers that overflowed are None."""
        out = []
        for sums in (self.sums_HK / self.tokens).tolist():
            numbers = {name: x if math.isfinite(x) else None for name, x in zip(NAMES, sums)}
            loss = numbers["loss"]
            out.append({**numbers, "perplexity": math.exp(loss) if loss is not None and loss < 700 else None})
        return out

    @property
    def full_loss(self) -> float:
        """Loss of the original head, nats a token."""
        return self.full / self.tokens

"""`head.loss_impl=fused`, see `bottleneck.losses.fused`. Triton, which is not everywhere, is imported on first use."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Optional

import torch

from bottleneck.core.extensions import LOSSES, Loss


def _step(*args: Any) -> Any:
    from bottleneck.losses import fused

    return fused.step(*args)


def _padded_rank(rank: int) -> int:
    from bottleneck.losses import fused

    return fused.padded_rank(rank)


def _most_tokens(rank: int) -> int:
    from bottleneck.losses import fused

    return fused.most_tokens(rank)


def _refuses(device: str, dtype: Optional[torch.dtype]) -> Optional[str]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cuda" and not interpreted:
        return "needs a CUDA GPU (or, for tests, TRITON_INTERPRET=1 in the environment)"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    return "does not support float64" if dtype == torch.float64 else None


LOSSES.register(
    Loss(
        "fused",
        "Triton kernels, on a CUDA GPU; no logits in memory at low ranks",
        _step,
        padded_rank=_padded_rank,
        most_tokens=_most_tokens,
        refuses=_refuses,
    )
)

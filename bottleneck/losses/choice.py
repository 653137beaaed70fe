"""Choose the implementation of the loss: `auto` takes the fastest in a table of measurements.

`python -m bottleneck.benchmark heads --write-table` writes `measured.csv`: medians of forward and backward.
"""

from __future__ import annotations

import csv
import functools
import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bottleneck.core.extensions import LOSSES

TABLE = Path(__file__).with_name("measured.csv")


def fused() -> ModuleType:
    """Return the Triton implementation, imported on first use since Triton is not everywhere."""
    return importlib.import_module("bottleneck.losses.fused")


def loss_names() -> tuple[str, ...]:
    """Values of `head.loss_impl`: auto, and the declared implementations."""
    return ("auto", *LOSSES.names())


def usable(device: str, dtype: torch.dtype | None = None) -> list[str]:
    """Names of the implementations that run on a device of this type."""
    return [loss.name for loss in LOSSES if loss.refuses(device, dtype) is None]


@functools.cache
def table(path: Path = TABLE) -> list[dict[str, Any]]:
    """Rows of measurements: device (cpu, cuda), dtype, tokens, vocab, rank, impl, ms."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    return [{**r, **{k: int(r[k]) for k in ("tokens", "vocab", "rank")}, "ms": float(r["ms"])} for r in rows]


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, tokens: int, vocab: int, rank: int) -> str:
    """Return the fastest implementation at the nearest measured point, in octaves of tokens, vocabulary and rank.

    The choice depends on shapes only, so a head gets the same implementation alone and in a bank. Devices without
    measurements, and GPUs without Triton, run the chunked loss.
    """
    known = "bfloat16" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")
    rows = [r for r in table() if r["device"] == device.type and r["dtype"] == known]

    def distance(row: dict[str, Any]) -> float:
        return sum(
            abs(math.log2(row[k] / max(1, v))) for k, v in (("tokens", tokens), ("vocab", vocab), ("rank", rank))
        )

    if not rows:
        return "chunked"
    nearest = min(map(distance, rows))
    fastest = min((r for r in rows if distance(r) == nearest), key=lambda r: r["ms"])["impl"]
    return fastest if LOSSES[fastest].refuses(device.type, dtype) is None else "chunked"

"""Which implementation of the loss is the fastest here: read off a small table of measurements.

`measured.csv` is written by `python -m bottleneck.benchmark heads --write-table`; its rows are medians of forward and backward.
"""

from __future__ import annotations

import csv
import functools
import importlib
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import torch

IMPLS = ("auto", "reference", "chunked", "fused")
TABLE = Path(__file__).with_name("measured.csv")


def fused() -> ModuleType:
    """The Triton implementation; imported when it is asked for, since Triton is not everywhere."""
    return importlib.import_module("bottleneck.losses.fused")


@functools.cache
def table(path: Path = TABLE) -> list[dict]:
    """Rows of measurements: device (cpu, cuda), dtype, tokens, vocab, rank, impl, ms."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    return [{**r, **{k: int(r[k]) for k in ("tokens", "vocab", "rank")}, "ms": float(r["ms"])} for r in rows]


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, tokens: int, vocab: int, rank: int) -> str:
    """The fastest implementation at the measured point nearest to this one (in octaves of tokens, vocabulary and rank).

    A function of the shapes alone, so that a head gets the same one alone and in company. Devices other than CPUs and CUDA
    GPUs, and GPUs without Triton, run the chunked loss.
    """
    kind = device.type
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        return "chunked"
    known = "bfloat16" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")
    rows = [r for r in table() if r["device"] == kind and r["dtype"] == known]
    if not rows:
        return "chunked"

    def distance(row: dict) -> float:
        return sum(
            abs(math.log2(row[k] / max(1, v))) for k, v in (("tokens", tokens), ("vocab", vocab), ("rank", rank))
        )

    nearest = min(map(distance, rows))
    return min((r for r in rows if distance(r) == nearest), key=lambda r: r["ms"])["impl"]

"""The head's step in decoding: one matrix against two, as `--form serve` writes them.

    OMP_NUM_THREADS=1 python -m bottleneck.benchmark decode --shape pythia-160m

One hidden state per sequence goes in, its logits come out. Consecutive calls use other copies of the weights, so that
they come from memory, as between two tokens of a whole model, whose body fills the caches.

Dims: N sequences, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bottleneck.benchmark import clock, shapes
from bottleneck.benchmark.table import Row, row
from bottleneck.core.errors import check
from bottleneck.serve.low_rank_head import LowRankHead

NAME = "decode"
SWEPT = 256 << 20  # bytes of weights that one round of calls reads, more than the caches hold
WARM_UP = 20  # calls of each head: every copy has then been used


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--shape", default="pythia-160m", help=f"one of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: a quarter and an eighth of the hidden size")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="sequences decoded side by side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=40)


@torch.inference_mode()
def run(args: argparse.Namespace) -> list[Row]:
    """One row per batch and head; the note has the dense head's median time divided by this one's."""
    s = shapes.shape(args.shape)
    ranks = args.ranks or [s.hidden // 4, s.hidden // 8]
    check(all(0 < r <= s.hidden for r in ranks), f"--ranks: allowed are 1 to {s.hidden}, the hidden size")
    check(all(n > 0 for n in args.batch), "--batch: allowed are whole numbers from 1")
    check(args.repeats > 0, "--repeats: allowed are whole numbers from 1")
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    torch.manual_seed(0)
    rows = []
    for N in args.batch:
        h_ND = torch.randn(N, s.hidden, device=device, dtype=dtype)
        case = f"{args.shape} V={s.vocab} d={s.hidden} batch={N}"
        works = {"dense": _work(s, None, h_ND)} | {f"r={r}": _work(s, r, h_ND) for r in ranks}
        times = _times(works, device, args.repeats)
        dense = statistics.median(times["dense"])
        for name, seconds in times.items():
            note = "" if name == "dense" else f"{dense / statistics.median(seconds):.2f} x dense"
            rows.append(row(NAME, case, f"{name} {args.dtype}", seconds, device=device, note=note))
    return rows


def _work(s: shapes.Shape, rank: int | None, h_ND: Tensor) -> Callable[[], Tensor]:
    """A call that computes logits with the next of several copies of a head."""

    def head() -> nn.Module:
        with torch.device(h_ND.device):
            if rank is None:
                return nn.Linear(s.hidden, s.vocab, bias=False).to(h_ND.dtype)
            return LowRankHead(s.hidden, rank, s.vocab).to(h_ND.dtype).eval()

    first = head()
    size = sum(p.numel() * p.element_size() for p in first.parameters())
    heads = itertools.cycle([first, *(head() for _ in range(SWEPT // size))])
    return lambda: next(heads)(h_ND)


def _times(works: dict[str, Callable[[], Tensor]], device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call. On a CPU: CPU seconds, so that other processes do not count, of calls in turn."""
    if device == "cuda":
        return {name: clock.seconds(work, device, repeats) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        for _ in range(WARM_UP):
            work()
    for _ in range(repeats):
        for name, work in works.items():
            began = time.process_time()
            work()
            times[name].append(time.process_time() - began)
    return times

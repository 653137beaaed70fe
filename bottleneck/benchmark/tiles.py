"""Search for the best tiles of the low-rank kernels: those of `losses.fused` and `losses.taught`, by padded rank.

    python -m bottleneck.benchmark tiles --ranks 8,64 --vocab 50304
    python -m bottleneck.benchmark tiles --ranks 64 --taught

Each candidate of one pass runs beside the other pass's present tile, as a CUDA graph. Rows come fastest first.

Dims: N tokens, R rank, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from rich.console import Console

from bottleneck.benchmark.clock import seconds
from bottleneck.benchmark.heads import as_graph, random_case, whole_numbers
from bottleneck.benchmark.table import Row, row
from bottleneck.core.errors import check
from bottleneck.losses import targets, weights

NAME = "tiles"
# tokens, entries, warps, programs of a multiprocessor by which a scan's parts of V are chosen
SIZES = {
    "scan": [(64, 128, 4, 2), (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 2), (128, 64, 8, 2)],
    "spread": [(32, 64, 4, 1), (64, 64, 4, 1), (32, 128, 4, 1), (128, 64, 4, 1), (64, 128, 4, 1)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--stages", default="2,3", help="pipeline stages that are tried (default: 2,3)")
    parser.add_argument("--taught", action="store_true", help="the kernels of a head with a teacher")
    parser.add_argument("--repeats", type=int, default=20)


def run(args: argparse.Namespace) -> list[Row]:
    check(torch.cuda.is_available(), "benchmark tiles: needs a CUDA GPU")
    stages, found = whole_numbers("--stages", args.stages), []
    for R in whole_numbers("--ranks", args.ranks):
        for which in SIZES:
            rows = []
            for tile, step in _candidates(args, R, which, stages):
                case = f"{which}{', taught' if args.taught else ''} V={args.vocab} r={R}"
                try:
                    rows.append(row(NAME, case, str(tuple(tile)), seconds(as_graph(step), "cuda", args.repeats)))
                except Exception as error:  # too much shared memory, or too few registers
                    Console(stderr=True).print(f"{case} {tuple(tile)}: {type(error).__name__}", highlight=False)
            found += sorted(rows, key=lambda r: r.p50)[:4]
    return found


def _candidates(
    args: argparse.Namespace, R: int, which: str, stages: list[int]
) -> Iterator[tuple[tuple, Callable[[], tuple]]]:
    """Tiles of a pass, the present one first, and a step with each."""
    from bottleneck.losses import fused, taught

    c = random_case(args.tokens, 768, R, args.vocab, "cuda")
    w, y = weights(c.A, c.B, c.h.dtype, "fused"), targets(c.y)
    z, dA = c.h @ w.B.T, torch.zeros(args.vocab, R, device="cuda")
    table = getattr(taught if args.taught else fused, which.upper())
    now = table[w.A.shape[1]]
    given = taught.prepare(torch.randn(args.tokens, args.vocab, device="cuda"), y, 1.0, 1.0, c.h.dtype)
    tiles = [fused.Tile(n, v, warps, stage, resident) for n, v, warps, resident in SIZES[which] for stage in stages]
    for tile in [now, *(t for t in tiles if t != now)]:
        pair = {f"{which}_tile": tile}

        def step(pair: dict = pair) -> tuple:
            if args.taught:
                return *taught._flash(z, w.A, y, given, dA, 1.0, 1.0, None, **pair), dA
            return *fused._flash(z, w.A, y, dA, 1.0, **pair), dA

        yield tile, step

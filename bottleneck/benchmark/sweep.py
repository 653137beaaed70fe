"""One pass that trains every rank against one ordinary Lightning run per rank: same tokens, same batch, same machine.

Ours is `python train.py` in its own process; its speed is the one it logs. The backbone has random weights and the
tokens are random, since speed depends on shapes alone. A backbone that needs several GPUs:

    python -m bottleneck.benchmark sweep --shape neox-30b --ranks 64,512,2048 --stock-steps 0 \\
        trainer=fsdp trainer.devices=2
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch
from rich.console import Console

from bottleneck.benchmark import ours, shapes, stock
from bottleneck.benchmark.table import Row, row
from bottleneck.core.errors import check

NAME = "sweep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ours.add_arguments(parser, steps=9)
    parser.add_argument("--stock-steps", type=int, default=4, help="of each stock run, likewise; 0: none (default: 4)")


def run(args: argparse.Namespace) -> list[Row]:
    ranks = ours.read_ranks(args)
    check(args.steps > 1 and args.stock_steps != 1, "--steps, --stock-steps: the first step is warm-up, give 2 or more")
    check(
        args.batch % args.micro_batch == 0,
        f"--batch {args.batch}: must be a multiple of --micro-batch {args.micro_batch}",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said = Console(stderr=True)
    case = ours.Case(
        args.shape, ranks, args.rates, args.steps, args.batch, args.micro_batch, args.block, device, args.overrides
    )
    with ours.inputs(args.shape, max(args.steps, args.stock_steps) * case.tokens) as (backbone, tokens):
        said.print(f"ours: {len(ranks)} ranks x {args.rates} rates", highlight=False)
        found = ours.measure(case, backbone, tokens)
        rows = [
            row(
                NAME,
                case.name,
                "ours, one pass",
                found.seconds,
                case.tokens,
                "tokens",
                peak_mib=found.peak_mib,
                device=device,
            )
        ]
        _tell(said, rows[0])
        if args.stock_steps:
            rows += _stock(args, ranks, tokens, device, said)
    return rows


def _tell(said: Console, r: Row) -> None:
    said.print(f"{r.case}: {r.implementation}: {r.p50:.4g} s a step, {r.throughput:,.0f} tokens/s", highlight=False)


def _stock(args: argparse.Namespace, ranks: list[int], tokens: Path, device: str, said: Console) -> list[Row]:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    step, total, rows = args.batch * args.block, [0.0], []
    model = shapes.random_backbone(args.shape, device)
    for rank in ranks:
        said.print(f"stock: rank {rank}", highlight=False)
        times = stock.step_seconds(
            model, rank, str(tokens / "train.bin"), args.block, args.batch, args.micro_batch, args.stock_steps
        )
        rows.append(row(NAME, f"{args.shape}, r={rank}", "stock, one head", times, step, "tokens", device=device))
        _tell(said, rows[-1])
        total[0] += rows[-1].p50 * args.rates  # one run per rate; speed does not depend on the rate
    heads = len(ranks) * args.rates
    rows.append(row(NAME, f"{args.shape}, {heads} heads", f"stock, {heads} runs", total, step, "tokens", device=device))
    return rows

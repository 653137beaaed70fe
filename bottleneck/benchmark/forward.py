"""Hidden states per second: the frozen backbone without its head, eager and with its layers compiled."""

from __future__ import annotations

import argparse

import torch

from bottleneck.backbone.model import Backbone
from bottleneck.benchmark import shapes
from bottleneck.benchmark.clock import peak_mib, seconds
from bottleneck.benchmark.table import Row, row
from bottleneck.config.numbers import as_count

NAME = "forward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        default="pythia-160m",
        help=f"one of {', '.join(shapes.SHAPES)}, random weights (default: pythia-160m)",
    )
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences in one forward pass (default: 8)")
    parser.add_argument("--block", type=int, default=2048, help="tokens in a sequence (default: 2048)")
    parser.add_argument("--repeats", type=int, default=20)


def run(args: argparse.Namespace) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("micro_batch", "block", "repeats"):
        as_count("--" + name.replace("_", "-"), getattr(args, name))
    backbone = Backbone(shapes.random_backbone(args.shape, device), args.shape)
    batch = (args.micro_batch, args.block)
    ids = torch.randint(shapes.shape(args.shape).vocab, batch, device=device)
    case = f"{args.shape}, {args.micro_batch} x {args.block}"
    rows = []
    for label in ("eager", "layers compiled"):
        if label != "eager":
            backbone.compile_layers(batch)
            backbone(ids)
        rows.append(
            row(
                NAME,
                case,
                label,
                seconds(lambda: backbone(ids), device, args.repeats),
                ids.numel(),
                "tokens",
                peak_mib=peak_mib(lambda: backbone(ids), device),
                device=device,
            )
        )
    return rows

"""One sweep on 1, 2, 4 … GPUs of this machine with the same batch per GPU: tokens/s, parts of a step, memory.

python -m bottleneck.benchmark scale --shape pythia-1b --processes 1,2,4
python -m bottleneck.benchmark scale --shape neox-30b --processes 4 --ranks 64,512,2048 trainer=fsdp
"""

from __future__ import annotations

import argparse
import os

import torch
from rich.console import Console

from bottleneck.benchmark import ours
from bottleneck.benchmark.table import Row, row
from bottleneck.core.errors import UserError, check

NAME = "scale"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ours.add_arguments(parser, steps=22)
    parser.add_argument(
        "--processes", help="numbers of GPUs, 1,2,4; default: powers of two up to all (without a GPU: 1,2)"
    )


def read(args: argparse.Namespace) -> tuple[list[int], list[int], str]:
    """Return the numbers of processes, the ranks and the device. Raises UserError for settings that cannot be
    measured."""
    ranks = ours.read_ranks(args)
    check(args.steps > 2, "--steps: the first step is warm-up, give 3 or more")
    gpus = torch.cuda.device_count()
    most = gpus or min(2, os.cpu_count() or 1)
    given = args.processes or ",".join(str(2**i) for i in range(most.bit_length()) if 2**i <= most)
    check(
        all(w.isdigit() and int(w) > 0 for w in given.split(",")),
        f"--processes {given}: must be whole numbers with commas between",
    )
    counts = [int(w) for w in given.split(",")]
    check(not gpus or max(counts) <= gpus, f"--processes {given}: this machine has {gpus} GPUs")
    return counts, ranks, "cuda" if gpus else "cpu"


def run(args: argparse.Namespace) -> list[Row]:
    counts, ranks, device = read(args)
    said, first = Console(stderr=True), None
    rows: list[Row] = []
    with ours.inputs(args.shape, args.steps * max(counts) * args.batch * args.block) as (backbone, tokens):
        faults: list[str] = []
        for n in counts:
            case = ours.Case(
                args.shape,
                ranks,
                args.rates,
                args.steps,
                n * args.batch,
                args.micro_batch,
                args.block,
                device,
                [*args.overrides, f"trainer.devices={n}"],
            )
            said.print(f"{case.name} on {n}", highlight=False)
            try:
                found = ours.measure(case, backbone, tokens)
            except KeyboardInterrupt:  # or a time limit, see bottleneck/benchmark/gpus.sh: the measured rows are kept
                if not rows:
                    raise
                said.print(f"interrupted on {n}; the rows before are kept", highlight=False)
                break
            except UserError as error:  # for example too little memory on one GPU
                faults.append(f"on {n}: {error}")
                said.print(f"error: {faults[-1]}", highlight=False)
                continue
            rows.append(
                row(
                    NAME,
                    case.name,
                    f"{n} process{'es' * (n > 1)}",
                    found.seconds,
                    case.tokens,
                    "tokens",
                    peak_mib=found.peak_mib,
                    device=device,
                )
            )
            rate = rows[-1].throughput or 0.0
            parts = ", ".join(f"{p} {1e3 * s:.1f} ms" for p, s in found.parts.items())
            against = f"{rate / first[1]:.2f} x {first[0]}; " if first else ""
            first = first or (n, rate)
            rows[-1].note = f"{against}{parts}; 150M tokens in {150e6 / rate / 60:.1f} min"
            said.print(f"{n}: {rate:,.0f} tokens/s, {rows[-1].note}", highlight=False)
    check(bool(rows), f"benchmark scale: {'; '.join(faults)}")
    return rows

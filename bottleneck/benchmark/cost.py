"""Milliseconds of each head of finished runs on this machine: a training step, and one decoded token.

    python -m bottleneck.benchmark cost RUN_DIR…
    python -m bottleneck.curve RUN_DIR… --out FOLDER --x step_ms

A training step is the head's losses and gradients on N tokens, clipping and AdamW, without the backbone. A decoded
token is the head's logits for one hidden state and their largest. Times do not depend on the values, so heads have
random weights; heads that differ in rate or seed only are measured once. The medians are written into the heads' rows
of curve.json as `step_ms` and `decode_ms`, with `timing`: hardware, tokens, dtype, versions, date.

Dims: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bottleneck.benchmark import slowed
from bottleneck.benchmark.clock import seconds
from bottleneck.benchmark.table import Row, hardware, row
from bottleneck.config.numbers import as_count
from bottleneck.config.schema import OptimConfig
from bottleneck.core.environment import commit, cores, versions
from bottleneck.core.errors import check
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.key import HeadKey
from bottleneck.losses import memory
from bottleneck.results import curve
from bottleneck.training.optim import build_optimizer, clip_per_head

NAME = "cost"
log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 1024, help="of a step (default: 8192 on a GPU)")
    parser.add_argument("--repeats", type=int, default=50 if cuda else 5)


def works(key: HeadKey, V: int, D: int, *, tokens: int, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A training step and a decoding step of one head with random weights."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bank = HeadBank([key], V, D, "auto", tokens=tokens).to(device)
    bank.memory = memory.decide(torch.device(device), bank.loss_memory)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in bank[key].parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(1, p.shape[-1]) ** 0.5)
    h = torch.randn(tokens, D, generator=g).to(device, dtype)
    y = torch.randint(0, V, (tokens,), generator=g).to(device)
    c = OptimConfig()
    optimizer = build_optimizer(bank, c)

    def step() -> None:
        bank.zero_gradients()
        losses = bank.accumulate(h, y, bank.cast(dtype), 1 / tokens)
        _, optimizer.divisors = clip_per_head(bank, c.clip, losses, optimizer.norms())
        optimizer.step()

    read, one = bank.cast(dtype)[0], h[:1]
    return step, lambda: bank[key].float_logits(one, read).argmax(-1)


def run(args: argparse.Namespace) -> list[Row]:
    as_count("--tokens", args.tokens)
    as_count("--repeats", args.repeats)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "device": hardware(device),
        "tokens": args.tokens,
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        **versions(("bottleneck", "torch")),
    }
    load = os.getloadavg()[0]
    if device == "cpu" and load > 0.3 * cores():
        said = "other processes may use the CPU, and times vary by a factor then; repeat the command when it is idle"
        log.warning("load average %.1f on %d cores: %s", load, cores(), said)
    curves = {}
    for folder in args.runs:
        found = curve.read([folder / "curve.json" if folder.is_dir() else folder])
        check(len(found) == 1 and folder.is_dir(), f"{folder}: not the folder of one finished run")
        curves[folder] = found[0]
    rows, known = [], {}
    for c in curves.values():
        for h in c["heads"]:
            key = dataclasses.replace(HeadKey.of(h), lr=1e-3, seed=0)
            place = key, c["vocab_size"], c["hidden_size"]
            if place not in known:
                found_ms = []
                for what, work in zip(("step", "decode"), works(*place, tokens=args.tokens, device=device)):
                    times = seconds(work, device, args.repeats)
                    rows.append(row(NAME, f"{key.name.partition('_lr')[0]}, {what}", "ours", times, device=device))
                    found_ms.append(float(np.median(times)) * 1e3)
                known[place] = found_ms
            h |= {"step_ms": known[place][0], "decode_ms": known[place][1], "timing": about}
    if device == "cuda":
        slowed.check_times(", ".join(str(folder / "curve.json") for folder in curves))
    for folder, c in curves.items():  # only when all are measured
        curve.write([c], folder)
    return rows

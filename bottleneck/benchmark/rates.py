"""Which learning rate is best at which rank: the measurement behind the power rule's defaults (docs/log.md).

    python bottleneck/benchmark/rates.py --out DIR [--inits fisher,scaled] [--rates 1e-4:3e-2:9] [OVERRIDES…]

Trains a bank of every rank at every rate in one run for each init, and prints for each rank the best rate, its loss,
and how much worse the rule's own rate is (in per cent of the loss, interpolated between the rates tried; nan outside).
A star marks a best rate at the edge of those tried.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from bottleneck.config import checks
from bottleneck.config import schema as config
from bottleneck.core.paths import CONF
from bottleneck.train import train
from bottleneck.training.optim import power_rate


def rates(spec: str) -> list[float]:
    """LOW:HIGH:COUNT as a geometric series of 3 digits."""
    low, high, count = spec.split(":")
    return [float(f"{r:.3g}") for r in np.geomspace(float(low), float(high), int(count))]


def report(curve: dict[str, Any], rule: Callable[[int], float]) -> None:
    print(f"{'rank':>5} {'best rate':>10} {'loss':>8} {'at start':>9} | {'rule':>9} {'loss':>8} {'worse by':>9}")
    for rank in sorted({h["rank"] for h in curve["heads"]}):
        heads = [h for h in curve["heads"] if h["rank"] == rank and h["status"] == "ok"]
        best = min(heads, key=lambda h: h["loss"])
        lr = [h["lr"] for h in heads]
        inside = lr[0] <= rule(rank) <= lr[-1]
        at_rule = np.interp(np.log(rule(rank)), np.log(lr), [h["loss"] for h in heads]) if inside else float("nan")
        edge = "*" if best["lr"] in (lr[0], lr[-1]) else " "
        print(
            f"{rank:5d} {best['lr']:9.2g}{edge} {best['loss']:8.4f} {best['initial_loss']:9.4f} | "
            f"{rule(rank):9.2g} {at_rule:8.4f} {100 * (at_rule / best['loss'] - 1):8.2f}%"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--inits", default="fisher,scaled,svd")
    parser.add_argument("--rates", type=rates, default=rates("1e-4:3e-2:9"), metavar="LOW:HIGH:COUNT")
    args, overrides = parser.parse_known_args()
    config.register()
    for init in args.inits.split(","):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            grid = "optim.lrs=[" + ",".join(map(str, args.rates)) + "]"
            cfg = compose(
                "train", overrides=[f"head.init={init}", "optim=grid", grid, "trainer.log_every=1000", *overrides]
            )
        curve = train(cfg, args.out / init).curve
        optim = checks.check_config(cfg).optim
        print(
            f"\n{curve['backbone']}, {init}, {curve['tokens']:,} tokens, batch {curve['recipe']['batch_size']} x "
            f"{curve['recipe']['block_size']}, original head {curve['reference']['loss']:.4f}"
        )
        shape = curve["hidden_size"], curve["vocab_size"]
        report(curve, lambda rank: power_rate(optim, init, rank, *shape))  # noqa: B023


if __name__ == "__main__":
    main()

"""Prints the heads of the next run, with rates tuned over several runs, as an override of train.py.

    python -m bottleneck.benchmark.tuning entries EXPERIMENT.yaml BUDGET
    python -m bottleneck.benchmark.tuning best RUN_DIR… [--factors 0.5 1 2]
    python -m bottleneck.benchmark.tuning beyond RUN_DIR…

`entries` are an experiment's heads at one of its budgets. `best` is each head at its best rate, times factors.
`beyond` are the heads whose best rate is the highest or the lowest tried, at rates further out; it prints nothing if
every best rate lies between two others. A rate at which a head diverged has been tried, so it closes the grid on its
side. Heads with one rate have no grid and no edge.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bottleneck.cli import one_line_errors as cli
from bottleneck.config.literal import literal
from bottleneck.core.errors import Parser, check
from bottleneck.results import curve

FURTHER = 2  # rates beyond an edge


def entries(file: Path, budget: int) -> list[dict[str, Any]]:
    """The entries of `heads` in an experiment, each with the rank of one budget."""
    check(file.is_file(), f"{file}: no such file; give an experiment, such as conf/experiment/kinds_smollm2.yaml")
    given: Any = OmegaConf.to_container(OmegaConf.load(file))
    heads = given.get("heads") or []
    check(bool(heads), f"{file}: has no heads")
    budgets = min(len(e["rank"]) for e in heads)
    check(0 <= budget < budgets, f"budget {budget}: {file} has the budgets 0 to {budgets - 1}")
    return [{**e, "rank": e["rank"][budget]} for e in heads]


def _by_head(curves: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(entry without rate, its rows by rate) of each kind, options and rank, in the order in which they are found."""
    found: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for c in curves:
        for h in c["heads"]:
            entry = {"kind": h.get("kind", "low_rank"), "rank": h["rank"], **h.get("options", {})}
            found.setdefault(repr(entry), (entry, []))[1].append(h)
    return [(entry, sorted(rows, key=lambda h: h["lr"])) for entry, rows in found.values()]


def _best(entry: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    good = [h for h in rows if h["status"] == "ok"]
    rates = ", ".join(f"{h['lr']:g}" for h in rows)
    check(bool(good), f"curve.json: {override([entry])} diverged at every rate, {rates}")
    return min(good, key=lambda h: h["loss"])["lr"]


def best(curves: Iterable[dict[str, Any]], factors: Iterable[float] = (1.0,)) -> list[dict[str, Any]]:
    """Entries of `heads`: every head at its best rate times each factor. Raises UserError if all of one diverged."""
    around = list(factors)
    return [{**e, "lr": [float(f"{_best(e, rows) * f:.3g}") for f in around]} for e, rows in _by_head(curves)]


def beyond(curves: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of `heads` for those whose best rate is the highest or the lowest tried: `FURTHER` rates beyond it.

    The rates go on in the ratio of the two outermost. A head that diverged at every rate goes on below.
    """
    further = []
    for entry, rows in _by_head(curves):
        rates = sorted({h["lr"] for h in rows})
        if len(rates) < 2:
            continue
        good = [h for h in rows if h["status"] == "ok"]
        chosen = min(good, key=lambda h: h["loss"])["lr"] if good else rates[0]
        if chosen == rates[-1]:
            edge, ratio = rates[-1], rates[-1] / rates[-2]
        elif chosen == rates[0]:
            edge, ratio = rates[0], rates[0] / rates[1]
        else:
            continue
        further.append({**entry, "lr": [float(f"{edge * ratio**i:.3g}") for i in range(1, FURTHER + 1)]})
    return further


def _read(runs: list[Path]) -> list[dict[str, Any]]:
    """The curves of runs that differ in their heads only. Raises UserError for others."""
    found = curve.read(runs)
    for name in ("backbone", "backbone_hash", "data", "data_hash", "tokens"):
        values = sorted({str(c[name]) for c in found})
        check(len(values) < 2, f"runs with {name} {', '.join(values)}: their rates are not comparable")
    return found


def override(heads: list[dict[str, Any]]) -> str:
    """`[{kind: mos, rank: 64, components: 4, lr: [0.001]}]`, the value of heads=…; empty without heads."""
    return literal(heads) if heads else ""


def command(argv: list[str]) -> None:
    parser = Parser(prog="python -m bottleneck.benchmark.tuning", description="Heads of the next run.")
    parts = parser.add_subparsers(dest="part", required=True)
    given = parts.add_parser("entries", help="an experiment's heads at one of its budgets")
    given.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    given.add_argument("budget", type=int)
    for name, about in (("best", "each head at its best rate"), ("beyond", "heads whose best rate is an edge")):
        part = parts.add_parser(name, help=about)
        part.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
        if name == "best":
            part.add_argument("--factors", nargs="+", type=float, default=[1.0], help="of the best rate (default: 1)")
    args = parser.parse_args(argv)
    if args.part == "entries":
        print(override(entries(args.experiment, args.budget)))
    elif args.part == "best":
        print(override(best(_read(args.runs), args.factors)))
    else:
        print(override(beyond(_read(args.runs))))


if __name__ == "__main__":
    sys.exit(cli.one_line_errors(lambda: command(sys.argv[1:])))

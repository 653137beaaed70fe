"""After how many tokens a run is as good as another one at its end, at every rank.

    python -m bottleneck.race BASE RUN… --out DIR

Read from the validations on the way (trainer.val_every) in metrics.csv, between two of which the loss is taken to fall evenly. All runs
must have the same backbone and text; rates, seeds, starts, objectives and budgets are what is compared. Of several heads at a
rank, BASE gives the lowest loss it ends at, another run the head that is there first.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.core.errors import Parser, UserError, check
from bottleneck.core.files import write_atomic
from bottleneck.heads.bank import HeadKey
from bottleneck.results import curve
from bottleneck.results.picture import as_text

METRIC = "val/loss"
Line = list[tuple[int, float]]  # (tokens, loss), by tokens


class Run(NamedTuple):
    """A finished run: its curve, and the validation losses of each head along training."""

    name: str
    curve: dict[str, Any]
    lines: dict[str, Line]

    def heads(self, rank: int) -> list[tuple[dict[str, Any], Line]]:
        """The heads of a rank that did not diverge, with their losses."""
        rows = [h for h in self.curve["heads"] if h["rank"] == rank and h["status"] == "ok"]
        return [(h, self.lines[HeadKey(h["rank"], h["lr"], h["seed"]).name]) for h in rows]


class Finding(NamedTuple):
    """tokens: until the base's last loss is reached, None where it is not; loss, lr: of the run's best head at its end."""

    rank: int
    run: str
    base_loss: float
    base_tokens: int
    tokens: Optional[int]
    loss: float
    lr: float


def read(folder: Path) -> Run:
    """Raises UserError where the folder is not that of a finished run, or has no metrics.csv with its validations."""
    (found, *more) = curve.read([folder])
    check(not more, f"{folder}: holds several curves; give the folder of one run")
    lines: dict[str, Line] = {}
    file = folder / "metrics.csv"
    try:
        with open(file, newline="") as f:
            for row in csv.DictReader(f):
                if row["metric"] == METRIC:
                    lines.setdefault(row["head"], []).append((int(row["tokens"]), float(row["value"])))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: no losses along training to be read there (logger=csv writes them): {error}"
        ) from error
    names = [HeadKey(h["rank"], h["lr"], h["seed"]).name for h in found["heads"] if h["status"] == "ok"]
    lost = [n for n in names if n not in lines]
    check(not lost, f"{file}: has no validation of {', '.join(lost[:3])}")
    return Run(folder.name, found, {name: sorted(line) for name, line in lines.items()})


def reached(line: Line, loss: float) -> Optional[int]:
    """Tokens at which a line is first at or below a loss; None where it never is."""
    before: Optional[tuple[int, float]] = None
    for tokens, value in line:
        if value <= loss:
            if before is None or before[1] == value:
                return tokens
            return round(before[0] + (tokens - before[0]) * (before[1] - loss) / (before[1] - value))
        before = tokens, value
    return None


def race(base: Run, others: list[Run]) -> list[Finding]:
    """Raises UserError where runs differ in backbone or text, or share no rank."""
    for run in others:
        for key, words in (("backbone_hash", "backbone"), ("data_hash", "text")):
            check(
                run.curve[key] == base.curve[key],
                f"{run.name}: its {words} is not that of {base.name}; only runs on the same can be compared",
            )
    out = []
    for rank in sorted({h["rank"] for h in base.curve["heads"]}):
        aim = min((h["loss"] for h, _ in base.heads(rank)), default=None)
        for run in others if aim is not None else []:
            heads = run.heads(rank)
            if heads:
                best = min((h for h, _ in heads), key=lambda h: h["loss"])
                arrivals = [t for t in (reached(line, aim) for _, line in heads) if t is not None]
                out.append(
                    Finding(
                        rank, run.name, aim, base.curve["tokens"], min(arrivals, default=None), best["loss"], best["lr"]
                    )
                )
    check(bool(out), f"{base.name}: shares no rank with the other runs")
    return out


def draw(base: Run, others: list[Run], file: BinaryIO) -> None:
    """One panel a rank: the best head of each run along training; dashed: where the base ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = [r for r in sorted({h["rank"] for h in base.curve["heads"]}) if base.heads(r)]
    columns = min(4, len(ranks))
    rows = -(-len(ranks) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.8 * rows), dpi=130, layout="constrained", squeeze=False
    )
    for axes, rank in zip(panels.flat, ranks):
        aim = min(h["loss"] for h, _ in base.heads(rank))
        ends = [aim]
        for run in [base, *others]:
            if run.heads(rank):
                best, line = min(run.heads(rank), key=lambda pair: pair[0]["loss"])
                line = [(t, x) for t, x in line if t] or line  # a random start is far above
                axes.plot(
                    [t / 1e6 for t, _ in line],
                    [x for _, x in line],
                    "o-",
                    ms=2,
                    label=as_text(f"{run.name} ({best['lr']:.2g})"),
                )
                ends.append(best["loss"])
        axes.axhline(aim, color="0.5", ls="--", lw=1)
        low, high = min(ends), max(ends)
        axes.set_ylim(low - 0.05 * max(0.1, high - low), high + max(0.25, 2 * (high - low)))
        axes.set_title(f"r = {rank}", fontsize=9)
        axes.set_xlabel("million training tokens", fontsize=8)
        axes.set_ylabel("validation loss, nats", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=6, frameon=False, title="run (rate)", title_fontsize=6)
    for axes in list(panels.flat)[len(ranks) :]:
        axes.set_visible(False)
    figure.savefig(file, format="png")
    plt.close(figure)


def show(found: list[Finding], base: Run, console: Console) -> None:
    table = Table(
        title=escape(f"tokens until the loss of {base.name} after {base.curve['tokens']:,}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for name in ("rank", "its loss", "run", "there after", "its last loss", "rate"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for f in found:
        table.add_row(
            str(f.rank),
            f"{f.base_loss:.4f}",
            escape(f.run),
            "not reached" if f.tokens is None else f"{f.tokens:,}",
            f"{f.loss:.4f}",
            f"{f.lr:.3g}",
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bottleneck.race",
        description="Tokens that runs need until they are as good as another one at its end.",
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of the run that is to be reached")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of the others")
    parser.add_argument("--out", required=True, type=Path, help="folder for race.csv, race.png")
    try:
        args = parser.parse_args(argv)
        for folder in (args.base, *args.runs):
            check(folder.is_dir(), f"{folder}: no such folder")
        base, *others = (read(folder) for folder in (args.base, *args.runs))
        found = race(base, others)
        text, picture = io.StringIO(), io.BytesIO()
        csv.writer(text, lineterminator="\n").writerows([Finding._fields, *found])
        draw(base, others, picture)
        for name, raw in (("race.csv", text.getvalue().encode()), ("race.png", picture.getvalue())):
            write_atomic(args.out / name, lambda part, raw=raw: part.write_bytes(raw))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(found, base, Console())
    print(f"wrote {args.out}/race.csv, race.png")
    return 0

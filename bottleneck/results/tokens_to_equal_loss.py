"""After how many tokens a run reaches the final loss of another run, at every rank.

    python -m bottleneck.race BASE RUN… --out DIR

Losses along training are those of the validations during training (trainer.val_every) in metrics.csv; between two
of them the loss is taken to be linear in tokens. All runs must have the same backbone and text. Rates, seeds, starts,
objectives and budgets may differ. If a rank has several heads, the base is represented by the one with the lowest final
loss, and another run by the one that reaches that loss first.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import sys
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import Parser, UserError, check
from bottleneck.core.files import write_atomic
from bottleneck.heads.key import HeadKey
from bottleneck.results import curve
from bottleneck.results.labels import as_text
from bottleneck.results.picture import pyplot
from bottleneck.results.schema import printable, series

log = logging.getLogger(__name__)
METRIC = "val/loss"
COLUMNS = ("step", "tokens", "metric", "head", "value")  # of metrics.csv
Line = list[tuple[int, float]]  # (tokens, loss in nats), by tokens


class RaceRun(NamedTuple):
    """A finished run: its curve, and the validation losses of each head along training, by the head's name."""

    name: str
    curve: dict[str, Any]
    lines: dict[str, Line]

    def heads(self, rank: int) -> list[tuple[dict[str, Any], Line]]:
        """The heads of a rank that did not diverge, with their losses."""
        rows = [h for h in self.curve["heads"] if h["rank"] == rank and h["status"] == "ok"]
        return [(h, self.lines[HeadKey.of(h).name]) for h in rows]


class Finding(NamedTuple):
    """One rank of one run beside the base.

    Attributes:
        tokens: until the base's final loss is reached; None if it is not.
        loss, lr: of the run's best head at its end.
    """

    rank: int
    run: str
    base_loss: float
    base_tokens: int
    tokens: Optional[int]
    loss: float
    lr: float


def _name(h: dict[str, Any]) -> str:
    return HeadKey.of(h).name


def read(folder: Path) -> RaceRun:
    """Raises UserError if the folder is not that of a finished run, or its metrics.csv does not belong to its curve."""
    found, *more = curve.read([folder])
    check(not more, f"{folder}: holds several curves; give the folder of one run")
    file = folder / "metrics.csv"
    lines = _validations(file)
    names = {
        rank: {series(h) for h in found["heads"] if h["rank"] == rank} for rank in {h["rank"] for h in found["heads"]}
    }
    mixed = next((f"{rank} ({'; '.join(sorted(kinds))})" for rank, kinds in names.items() if len(kinds) > 1), None)
    check(
        mixed is None,
        f"{folder}: several kinds of heads at rank {mixed}; a race compares runs of one kind at each rank",
    )
    for h in (h for h in found["heads"] if h["status"] == "ok"):
        line = lines.get(HeadKey.of(h).name)
        check(line is not None, f"{file}: has no validation of {HeadKey.of(h).name}")
        assert line is not None
        tokens, loss = line[-1]
        same = tokens == found["tokens"] and math.isclose(loss, h["loss"], rel_tol=1e-6)
        check(
            same,
            f"{file}: ends with loss {loss:.6g} of {HeadKey.of(h).name} after {tokens} tokens, curve.json has "
            f"{h['loss']:.6g} after {found['tokens']}: it belongs to another run or is truncated",
        )
    return RaceRun(printable(folder.name), found, lines)


def _validations(file: Path) -> dict[str, Line]:
    """Validation losses in a metrics.csv: head -> [(tokens, loss)] by tokens. Raises UserError if it cannot be
    read."""
    lines: dict[str, dict[int, float]] = {}
    try:
        with open(file, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f, strict=True)
            if reader.fieldnames != list(COLUMNS):
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            for row in reader:
                if row["metric"] == METRIC:
                    tokens, loss = int(row["tokens"]), float(row["value"])
                    known = lines.setdefault(row["head"], {}).setdefault(tokens, loss)
                    if tokens < 0 or (known != loss and not math.isnan(loss)):
                        raise ValueError(f"{row['head']} has losses {known} and {loss} after {tokens} tokens")
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: no losses along training (logger=csv writes them): {error}") from error
    return {name: sorted(line.items()) for name, line in lines.items()}


def reached(line: Line, loss: float) -> Optional[int]:
    """Tokens at which a line is first at or below a loss; None if it never is."""
    before: Optional[tuple[int, float]] = None
    for tokens, value in line:
        if value <= loss:
            if before is None or before[1] == value or not math.isfinite(before[1]):
                return tokens
            return round(before[0] + (tokens - before[0]) * (before[1] - loss) / (before[1] - value))
        before = tokens, value
    return None


def race(base: RaceRun, others: list[RaceRun]) -> list[Finding]:
    """Every rank of every other run beside the base.

    Raises: UserError if runs differ in backbone or text, or share no rank.
    """
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
            if heads and aim is not None:
                best = min((h for h, _ in heads), key=lambda h: h["loss"])
                arrivals = [t for t in (reached(line, aim) for _, line in heads) if t is not None]
                tokens, budget = min(arrivals, default=None), base.curve["tokens"]
                out.append(Finding(rank, run.name, aim, budget, tokens, best["loss"], best["lr"]))
    check(bool(out), f"{base.name}: shares no rank with the other runs")
    return out


def draw(base: RaceRun, others: list[RaceRun], file: BinaryIO) -> None:
    """One panel for each rank: the best head of each run along training; dashed: the base's final loss."""
    plt = pyplot()
    ranks = [r for r in sorted({h["rank"] for h in base.curve["heads"]}) if base.heads(r)]
    columns = min(4, len(ranks))
    rows = -(-len(ranks) // columns)
    figure, places = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.8 * rows), dpi=130, layout="constrained", squeeze=False
    )
    for axes, rank in zip(places.flat, ranks):
        _draw_rank(axes, rank, base, others)
    for axes in list(places.flat)[len(ranks) :]:
        axes.set_visible(False)
    figure.savefig(file, format="png")
    plt.close(figure)


def _draw_rank(axes: Any, rank: int, base: RaceRun, others: list[RaceRun]) -> None:
    aim = min(h["loss"] for h, _ in base.heads(rank))
    ends = [aim]
    for run in [base, *others]:
        if run.heads(rank):
            best, line = min(run.heads(rank), key=lambda pair: pair[0]["loss"])
            line = [(t, x) for t, x in line if t and math.isfinite(x)] or line  # a random start is far above
            label = as_text(f"{run.name} ({best['lr']:.2g})")
            axes.plot([t / 1e6 for t, _ in line], [x for _, x in line], "o-", ms=2, label=label)
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


def show(found: list[Finding], base: RaceRun, console: Console) -> None:
    """Print the findings as a table."""
    table = Table(
        title=escape(f"tokens until the loss of {base.name} after {base.curve['tokens']:,}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for name in ("rank", "its loss", "run", "reached after", "its final loss", "rate"):
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


def command(argv: list[str]) -> None:
    """`python -m bottleneck.race`. Raises UserError for bad input."""
    parser = Parser(
        prog="python -m bottleneck.race",
        description="Tokens that runs need to reach the final loss of another run.",
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of the run whose final loss is to be reached")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of the others")
    parser.add_argument("--out", required=True, type=Path, help="folder for race.csv, race.png")
    args = parser.parse_args(argv)
    for folder in (args.base, *args.runs):
        check(folder.is_dir(), f"{folder}: no such folder")
    for folder in curve.given_twice([args.base, *args.runs]):
        raise UserError(f"{folder}: the run is given twice; give each once, first the one whose loss is to be reached")
    base, *others = (read(folder) for folder in (args.base, *args.runs))
    found = race(base, others)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Finding._fields, *found])
    write_atomic(args.out / "race.csv", lambda part: part.write_bytes(text.getvalue().encode()))
    show(found, base, Console())
    picture = io.BytesIO()
    try:
        draw(base, others, picture)
    except Exception as error:  # Matplotlib raises many kinds; results do not depend on its pictures
        log.warning("%s: cannot be drawn: %s: %s", args.out / "race.png", type(error).__name__, error)
        print(printable(f"wrote {args.out}/race.csv"))
        return
    write_atomic(args.out / "race.png", lambda part: part.write_bytes(picture.getvalue()))
    print(printable(f"wrote {args.out}/race.csv, race.png"))


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, reported in one line."""
    words = sys.argv[1:] if argv is None else argv
    return cli.one_line_errors(lambda: command(words), after_interrupt="run the same command again")

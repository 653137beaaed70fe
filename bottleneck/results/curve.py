"""The result of a run: perplexity against rank, as curve.json, curve.csv, a picture and a table; merged across runs.

    python -m bottleneck.curve RUN_DIR… --out DIR

Runs that differ in backbone, text, budget or recipe stay separate lines: only heads that are comparable share one.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, Optional

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from bottleneck.core.errors import Parser, UserError, check
from bottleneck.core.files import write_atomic
from bottleneck.heads.bank import HeadKey
from bottleneck.results.knee import knees, told
from bottleneck.results.picture import draw, draw_details, labels

SCHEMA = 1
MERGED = "curve"  # folder, in that of a multirun, of its jobs' curves as one
# A line of the picture: everything that must be equal for two heads to be comparable.
IDENTITY = ("backbone_hash", "data_hash", "tokens", "recipe")
HEAD_COLUMNS = (
    "rank",
    "lr",
    "seed",
    "init",
    "parameters",
    "loss",
    "perplexity",
    "bits_per_byte",
    "initial_loss",
    "status",
    "best",
)
DETAILS = ("kl", "top1_agreement", "top5_agreement", "acceptance")  # of bottleneck.compare; runs before it have none


NUMBERS = {"loss", "perplexity", "bits_per_byte"}
TOP = {"schema", "backbone", "data", "hidden_size", "vocab_size", "reference", "heads", *IDENTITY}


def mark_best(heads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by init, rank, rate and seed; `best` is true for the lowest validation loss of each init and rank."""
    heads = sorted(heads, key=lambda h: (h["init"], h["rank"], h["lr"], h["seed"]))
    winners: dict[tuple, dict[str, Any]] = {}
    for h in heads:
        h["best"] = False
        place = (h["init"], h["rank"])
        if h["status"] == "ok" and (place not in winners or h["loss"] < winners[place]["loss"]):
            winners[place] = h
    for h in winners.values():
        h["best"] = True
    return heads


def merge(curves: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Curves of several runs, as one curve for each identity. Raises UserError where one head has two results."""
    lines: dict[str, dict[str, Any]] = {}
    for c in curves:
        identity = json.dumps([c[k] for k in IDENTITY], sort_keys=True)
        line = lines.setdefault(identity, {**c, "heads": []})
        known = {(h["init"], h["rank"], h["lr"], h["seed"]): h for h in line["heads"]}
        for h in c["heads"]:
            twin = known.get((h["init"], h["rank"], h["lr"], h["seed"]))
            if twin is None:
                line["heads"].append(dict(h))
                continue
            check(
                twin["loss"] == h["loss"],
                f"curve.json: rank {h['rank']}, lr {h['lr']}, seed {h['seed']} has two results, {twin['loss']} and {h['loss']}; merge one run of it",
            )
    return [finish(line) for line in lines.values()]


def finish(c: dict[str, Any]) -> dict[str, Any]:
    """Mark the best heads and name the second reference: the best trained head of full rank, r = d, where there is one.

    On text unlike the pretraining it beats the backbone's own head, so it is what low ranks are fairly compared with.
    """
    heads = mark_best(c["heads"])
    full = [h for h in heads if h["rank"] == c["hidden_size"] and h["best"]]
    best = min(full, key=lambda h: h["loss"], default=None)
    c = {**c, "heads": heads, "trained_reference": best and {k: best[k] for k in sorted(NUMBERS)}}
    return c | {"knee": knees(c)}


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


# what a value must be, by key; runs of earlier versions lack some of them
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("rank", "parameters", "hidden_size", "vocab_size"), (_count, "a whole number above 0")),
    **dict.fromkeys(("tokens", "seed"), (lambda x: _count(x) or x == 0, "a whole number")),
    "lr": (_number, "a number"),
    **dict.fromkeys((*NUMBERS, "initial_loss", *DETAILS), (lambda x: x is None or _number(x), "a number or null")),
    **dict.fromkeys(("init", "status", "backbone", "data"), (lambda x: isinstance(x, str), "a word")),
    "best": (lambda x: isinstance(x, bool), "true or false"),
    **dict.fromkeys(("recipe", "versions", "reference"), (lambda x: isinstance(x, dict), "an object")),
    "bands": (
        lambda x: (
            isinstance(x, list) and all(isinstance(b, dict) and {"band", "tokens", "loss"} <= b.keys() for b in x)
        ),
        "a list of bands",
    ),
    "heads": (lambda x: isinstance(x, list) and bool(x), "a list that is not empty"),
}


def _wrong_kind(row: dict[str, Any], whose: str) -> str | None:
    for key, (fits, words) in KINDS.items():
        if key in row and not fits(row[key]):
            return f"{whose} {key} is {str(row[key])[:40]}, not {words}"
    return None


def fault(c: Any) -> str | None:
    """What keeps a parsed curve.json from being one, or None."""
    if not isinstance(c, dict):
        return "not an object"
    if "schema" in c and c["schema"] != SCHEMA:
        return f"schema {c['schema']}, this version reads {SCHEMA}"
    if TOP - c.keys():
        return f"it lacks {', '.join(sorted(TOP - c.keys()))}"
    wrong = _wrong_kind(c, "its") or _wrong_kind(c["reference"], "its reference's")
    if wrong or NUMBERS - c["reference"].keys():
        return wrong or "its reference lacks numbers"
    for h in c["heads"]:
        if not isinstance(h, dict) or set(HEAD_COLUMNS) - h.keys():
            return "a head lacks " + (
                ", ".join(sorted(set(HEAD_COLUMNS) - h.keys())) if isinstance(h, dict) else "everything"
            )
        wrong = _wrong_kind(h, "a head's")
        if wrong:
            return wrong
        if h["status"] == "ok" and h["loss"] is None:
            return f"its head of rank {h['rank']} is ok but has no loss"
        bands = [[b["band"] for b in row.get("bands", [])] for row in (h, c["reference"])]
        if h.get("kl") is not None and bands[0] != bands[1]:
            return f"the bands of its head of rank {h['rank']} are not those of its reference"
    return None


def read(paths: Iterable[Path], skip: Optional[Path] = None) -> list[dict[str, Any]]:
    """Every curve.json below some run folders (a multirun's folder holds its jobs'). Raises UserError for bad ones."""
    curves: list[dict[str, Any]] = []
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob("curve.json"))
        # a multirun leaves its own merged curve: its jobs' are taken, unless that one is asked for
        files = [
            f
            for f in files
            if (skip is None or f.parent.resolve() != skip.resolve())
            and (f.parent == path or f == path or not _merged(f.parent))
        ]
        check(bool(files), f"{path}: no curve.json there; give the folder of a finished run, or of a multirun")
        for file in files:
            try:
                content = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"{file}: not a curve of bottleneck: {error}") from error
            found = content.get("curves", [content]) if isinstance(content, dict) else [content]
            faults = [fault(c) for c in found] if isinstance(found, list) and found else ["it holds no curve"]
            for wrong in filter(None, faults):
                raise UserError(f"{file}: not a curve of bottleneck: {wrong}")
            curves += found
    return curves


def _merged(folder: Path) -> bool:
    return folder.name == MERGED and (folder.parent / "multirun.yaml").exists()


def write(curves: list[dict[str, Any]], out: Path) -> None:
    """curve.json (one curve as it is, several under "curves"), curve.csv and curve.png into `out`."""
    content = curves[0] if len(curves) == 1 else {"schema": SCHEMA, "curves": curves}
    table, picture = io.StringIO(newline=""), io.BytesIO()
    writer = csv.writer(table)
    bands = list(dict.fromkeys(name for c in curves for h in c["heads"] for name in band_losses(h)))
    writer.writerow(("backbone", "data", "tokens", *HEAD_COLUMNS, *DETAILS, *bands))
    for c in curves:
        for h in c["heads"]:
            row = h | band_losses(h)
            writer.writerow(
                (c["backbone"], c["data"], c["tokens"], *(row.get(k) for k in (*HEAD_COLUMNS, *DETAILS, *bands)))
            )
    draw(curves, picture)
    details = io.BytesIO()
    drawn = draw_details(curves, details)
    parts = {
        "curve.json": (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(),
        "curve.csv": table.getvalue().encode(),
        "curve.png": picture.getvalue(),
    } | ({"details.png": details.getvalue()} if drawn else {})
    for name, raw in parts.items():  # all three are made before the first is written
        write_atomic(out / name, lambda part, raw=raw: part.write_bytes(raw))


def band_losses(head: dict[str, Any]) -> dict[str, Any]:
    """The losses by frequency of the target token as single numbers: loss_1-10, loss_11-100, …"""
    return {f"loss_{b['band'].replace('–', '-')}": b["loss"] for b in head.get("bands") or ()}


def show(curves: list[dict[str, Any]], console: Console) -> None:
    """Print the best head of every rank beside the backbone's own head."""
    for c, label in zip(curves, labels(curves)):
        seeds = len({h["seed"] for h in c["heads"]})
        apart = [
            w for w in label.removeprefix(c["backbone"]).split(", ") if w and not w.endswith(" tokens")
        ]  # which the title names anyway
        more = "".join(f", {w}" for w in apart) + (f", the best of {seeds} seeds" if seeds > 1 else "")
        table = Table(
            title=escape(f"{c['backbone']} on {c['data']}, {c['tokens']:,} training tokens{more}"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1),
            pad_edge=False,
        )
        for column in ("rank", "lr", "loss", "perplexity", "start", "KL", "top-1", "accept"):
            table.add_column(column, justify="right", no_wrap=True)
        inits = sorted({h["init"] for h in c["heads"]})
        if len(inits) > 1:
            table.add_column("init")
        if seeds > 1:
            table.add_column(f"all {seeds} seeds", justify="right", no_wrap=True)
        for h in c["heads"]:
            if h["best"]:
                cells = [str(h["rank"]), f"{h['lr']:.3g}", *_numbers(h), _cell(h["initial_loss"], ".4f")]
                cells += [
                    _cell(h.get("kl"), ".4f"),
                    *(_cell(h.get(k), ".1%") for k in ("top1_agreement", "acceptance")),
                ]
                table.add_row(
                    *cells, *([h["init"]] if len(inits) > 1 else []), *([_spread(c["heads"], h)] if seeds > 1 else [])
                )
        reference = c["reference"]
        table.add_row("own head", "", *_numbers(reference), "", "", "", "", style="bold")
        # in its own width, also where the terminal is narrower: a number that is cut is another number
        console.width = max(
            console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum
        )
        console.print(table)
        for line in told(c) if "knee" in c else ():
            console.print(line, highlight=False, soft_wrap=True)
        for line in _at_the_end(c["heads"]):
            console.print(line, highlight=False, soft_wrap=True)
        lost = [f"rank {h['rank']} lr {h['lr']:.3g} seed {h['seed']}" for h in c["heads"] if h["status"] != "ok"]
        if lost:
            console.print(
                f"diverged: {', '.join(lost)}"
                + ("; every head did: give lower rates (optim.lr)" if len(lost) == len(c["heads"]) else "")
            )


def _spread(heads: list[dict[str, Any]], best: dict[str, Any]) -> str:
    """The perplexities of a rank's seeds, each at its best rate: lowest and highest."""
    found: dict[int, float] = {}
    for h in heads:
        if (h["init"], h["rank"], h["status"]) == (best["init"], best["rank"], "ok") and h["perplexity"] is not None:
            found[h["seed"]] = min(h["perplexity"], found.get(h["seed"], math.inf))
    return f"{_perplexity(min(found.values()))}–{_perplexity(max(found.values()))}" if found else "–"


def _at_the_end(heads: list[dict[str, Any]]) -> list[str]:
    """A line where the best of several rates is the lowest or highest of them: a better one may lie beyond."""
    out = []
    for which, pick in (("lowest", min), ("highest", max)):
        ranks = []
        for h in heads:
            rates = {o["lr"] for o in heads if (o["init"], o["rank"]) == (h["init"], h["rank"])}
            if h["best"] and len(rates) > 2 and h["lr"] == pick(rates):
                ranks.append(str(h["rank"]))
        if ranks:
            out.append(
                f"the {which} rate tried is the best at rank {', '.join(ranks)}: try {'lower' if which == 'lowest' else 'higher'} ones"
            )
    return out


def _numbers(row: dict[str, Any]) -> list[str]:
    return [_cell(row["loss"], ".4f"), _perplexity(row["perplexity"])]


def _perplexity(value: Any) -> str:
    return _cell(value, ",.2f" if value is None or value < 1e5 else ".3g")


def _cell(value: Any, form: str) -> str:
    """As `form` says, but short where it is large, and no sign before a rounded zero."""
    if value is None:
        return "–"
    large = form == ".4f" and abs(value) >= 1e3
    shown = format(value, (",.0f" if abs(value) < 1e6 else ".3g") if large else form)
    return shown.removeprefix("-") if set(shown) <= set("-0.") else shown


def complete(run_dir: Path) -> dict[str, Any] | None:
    """The curve of a run that left all its files, or None."""
    try:
        found = json.loads((run_dir / "curve.json").read_text())
        files = [
            run_dir / "heads" / f"{HeadKey(h['rank'], h['lr'], h['seed']).name}.safetensors" for h in found["heads"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if files and all(f.is_file() for f in files) else None


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bottleneck.curve", description="Merge runs into one curve.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run or a multirun")
    parser.add_argument("--out", required=True, type=Path, help="folder for curve.json, curve.csv, curve.png")
    try:
        args = parser.parse_args(argv)
        for run in args.runs:
            check(run.exists(), f"{run}: no such folder")
        curves = merge(read(args.runs, skip=args.out))
        write(curves, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(curves, Console())
    print(f"wrote {args.out}/curve.json, curve.csv, curve.png")
    return 0

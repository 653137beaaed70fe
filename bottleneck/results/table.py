"""The table of a curve on the terminal, and what a reader should know about it."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from bottleneck.results.knee import knee_lines
from bottleneck.results.labels import kind_of, labels, line_names, token_words
from bottleneck.results.metric_names import Column, columns
from bottleneck.results.schema import series

HARM = 1.02  # loss over that of the start; at rank d a start is the original head, and training may lose 1 %


def show(curves: list[dict[str, Any]], console: Console) -> None:
    """Print the best head of every rank beside the original head, the knees, and hints about rates."""
    for c, label in zip(curves, labels(curves)):
        table = _table(c, label, [m for m in columns(curves) if m.table])
        # in its full width even on a narrow terminal: a truncated number would be misread
        measured = Measurement.get(console, console.options.update(max_width=1000), table)
        console.width = max(console.width, measured.maximum)
        console.print(table)
        for line in [*(knee_lines(c) if "knee" in c else ()), *_rates_at_the_end(c["heads"]), *_harmed(c["heads"])]:
            console.print(line, highlight=False, soft_wrap=True)
        lost = [f"{_place(h, c['heads'])} lr {h['lr']:.3g} seed {h['seed']}" for h in c["heads"] if h["status"] != "ok"]
        if lost:
            advice = "; all heads diverged: give lower rates (optim.lr)" if len(lost) == len(c["heads"]) else ""
            console.print(f"diverged: {', '.join(lost)}{advice}")


def _table(c: dict[str, Any], label: str, shown: list[Column]) -> Table:
    """Args: label: name of the curve among those that are shown, see `labels.labels`."""
    seeds = len({h["seed"] for h in c["heads"]})
    names = line_names([c])
    # the title names the backbone and the training tokens anyway
    apart = [w for w in label.removeprefix(c["backbone"]).split(", ") if w not in ("", token_words(c["tokens"]))]
    more = "".join(f", {w}" for w in apart) + (f", the best of {seeds} seeds" if seeds > 1 else "")
    table = Table(
        title=escape(f"{c['backbone']} on {c['data']}, {c['tokens']:,} training tokens{more}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    domains = [d["domain"] for d in c["reference"].get("domains", [])]
    for column in (
        "rank",
        "lr",
        "loss",
        "perplexity",
        *map(escape, domains),
        "start",
        *(escape(m.title) for m in shown),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    if len(names) > 1:
        starts = {h["init"] for h in c["heads"]}
        kinds = {kind_of(h) for h in c["heads"]}
        table.add_column(", ".join(["init"] * (len(starts) > 1) + ["kind"] * (len(kinds) > 1)))
    if seeds > 1:
        table.add_column(f"all {seeds} seeds", justify="right", no_wrap=True)
    for h in (h for h in c["heads"] if h["best"]):
        cells = [
            str(h["rank"]),
            f"{h['lr']:.3g}",
            *_numbers(h),
            *_by_domain(h, domains),
            _cell(h["initial_loss"], ".4f"),
        ]
        cells += [_cell(h.get(m.name), m.form) for m in shown]
        cells += [escape(names[series(h)])] if len(names) > 1 else []
        table.add_row(*cells, *([_spread(c["heads"], h)] if seeds > 1 else []))
    reference = c["reference"]
    table.add_row("original head", "", *_numbers(reference), *_by_domain(reference, domains), style="bold")
    return table


def _spread(heads: list[dict[str, Any]], best: dict[str, Any]) -> str:
    """The perplexities of a rank's seeds, each at its best rate: lowest and highest."""
    found: dict[int, float] = {}
    for h in heads:
        if (series(h), h["rank"], h["status"]) == (series(best), best["rank"], "ok") and h["perplexity"] is not None:
            found[h["seed"]] = min(h["perplexity"], found.get(h["seed"], math.inf))
    return f"{_perplexity(min(found.values()))}–{_perplexity(max(found.values()))}" if found else "–"


def _rates_at_the_end(heads: list[dict[str, Any]]) -> list[str]:
    """A hint if the best of several rates is the lowest or the highest: a better one may lie beyond."""
    out = []
    for which, pick, advice in (("lowest", min, "lower"), ("highest", max, "higher")):
        ranks = []
        for h in (h for h in heads if h["best"]):
            rates = {o["lr"] for o in heads if (series(o), o["rank"]) == (series(h), h["rank"])}
            if len(rates) > 2 and h["lr"] == pick(rates):
                ranks.append(_place(h, heads).removeprefix("rank "))
        if ranks:
            out.append(f"the {which} rate tried is the best at rank {', '.join(ranks)}: try {advice} ones")
    return out


def _harmed(heads: list[dict[str, Any]]) -> list[str]:
    """A hint if training made the best head of a rank worse than its start: its rate is too high for so short a run."""
    worse = [
        f"{_place(h, heads)} ({h['initial_loss']:.4f} to {h['loss']:.4f})"
        for h in heads
        if h["best"] and h.get("initial_loss") is not None and h["loss"] > HARM * h["initial_loss"]
    ]
    return [f"training made worse: {', '.join(worse)}: give lower rates or more tokens"] if worse else []


def _place(h: dict[str, Any], heads: list[dict[str, Any]]) -> str:
    """A head's rank, and what tells its line from others of `heads`: start, kind or both."""
    names = line_names([{"heads": heads}])
    name = names[series(h)] if len(names) > 1 else kind_of(h)
    return f"rank {h['rank']}" + (f" ({name})" if name else "")


def _numbers(row: dict[str, Any]) -> list[str]:
    return [_cell(row["loss"], ".4f"), _perplexity(row["perplexity"])]


def _by_domain(row: dict[str, Any], domains: list[str]) -> list[str]:
    """Perplexities by text of a mix."""
    found = {d["domain"]: d["perplexity"] for d in row.get("domains", [])}
    return [_perplexity(found.get(name)) for name in domains]


def _perplexity(value: Any) -> str:
    return _cell(value, ",.2f" if value is None or value < 1e5 else ".3g")


def _cell(value: Any, form: str) -> str:
    """A number in a format, shortened if it is large, and without a sign if it rounds to zero."""
    if value is None:
        return "–"
    large = form == ".4f" and abs(value) >= 1e3
    shown = format(value, (",.0f" if abs(value) < 1e6 else ".3g") if large else form)
    return shown.removeprefix("-") if set(shown) <= set("-0.") else shown

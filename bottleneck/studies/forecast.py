"""How much rank does a model need? The loss of each rank after a budget, forecast from two short runs.

The heads start from `refined` and are trained for 0.5M and 2M tokens in one pass over the text; a law that was fitted
on stored runs extends their losses to the budget, with an interval (`formulas.forecast`).
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_count, as_list
from bottleneck.core.errors import check
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text
from bottleneck.studies.shared.config import StudyConfig, StudyKeys, check_ranks
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

if TYPE_CHECKING:
    from bottleneck.studies.formulas.forecast import Curve, Stored

log = logging.getLogger(__name__)
COLUMNS = ("backbone", "data", "rank", "tokens", "loss", "low", "high", "measured", "outside")


@dataclass(frozen=True)
class Forecast(StudyKeys):
    """The loss of each rank after a budget, from `refined` heads and two runs of 0.5M and 2M tokens."""

    ranks: list[int] | Literal["auto"] = key("auto", "As in training: a rank, a list, or auto.", read=Any)
    budgets: list[int] = key([4_000_000, 16_000_000], "Budgets to forecast, in tokens: one or a list.", read=Any)
    max_tokens: int = key(2_000_000, "Training tokens to read of a streamed text; more with study.check.", read=Any)
    check: list[int] = key(
        [], "Budgets, in tokens, that are also trained, to compare the forecast with what it forecasts.", read=Any
    )


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Forecast`."""
    from bottleneck.studies.formulas.forecast import SHORT, STEP_TOKENS  # here, so that --help loads no scipy

    check_ranks(keys)
    keys.max_tokens = as_count("study.max_tokens", keys.max_tokens)
    for name in ("budgets", "check"):
        where = f"study.{name}"
        given = [as_count(where, t) for t in as_list(getattr(keys, name))]
        least = f"must be at least {SHORT[1] + STEP_TOKENS:,} tokens, a step more than the longer short run"
        check(all(t >= SHORT[1] + STEP_TOKENS for t in given), f"{where}={min(given, default=0)}: {least}")
        setattr(keys, name, sorted({t // STEP_TOKENS * STEP_TOKENS for t in given}))  # whole steps
    check(len(keys.budgets) + len(keys.check) > 0, "study.budgets=[]: give at least one budget")


def forecast(curve: Curve, stored: Stored, budgets: list[int], block_size: int) -> list[dict[str, Any]]:
    """Forecasts of one rank. Outside of what the law was fitted on, there is no interval but the reasons."""
    rows = []
    for tokens in budgets:
        loss, half = stored.law.forecast(curve, tokens)
        outside = [*stored.range.outside(curve, block_size), *stored.range.outside_budget(tokens, curve.hidden_size)]
        low, high = (None, None) if outside else (loss - half, loss + half)
        measured = curve.losses.get(tokens)
        rows.append(
            {"tokens": tokens, "loss": loss, "low": low, "high": high, "measured": measured, "outside": outside}
        )
    return rows


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Loss against rank: before training, after the short runs, and the forecasts with their intervals."""
    figure, (axes,) = canvas(width=8.0, height=4.8)
    heads = content["heads"]
    ranks = [h["rank"] for h in heads]
    axes.plot(ranks, [h["closed_form"] for h in heads], ":", color="0.5", label="start `refined`, no labels yet")
    for i, tokens in enumerate(content["short"]):
        look = {"ls": "--", "lw": 1, "color": f"{0.55 - 0.25 * i}", "label": f"{tokens / 1e6:.2g}M tokens, measured"}
        axes.plot(ranks, [h["short"][i] for h in heads], **look)
    for i, tokens in enumerate(content["budgets"]):
        rows = [next(f for f in h["forecasts"] if f["tokens"] == tokens) for h in heads]
        halves = [math.nan if f["high"] is None else f["high"] - f["loss"] for f in rows]  # NaN: no bar
        without = all(math.isnan(half) for half in halves)
        label = f"{tokens / 1e6:.3g}M tokens, forecast{', no interval' * without}"
        look = {"fmt": "o:" if without else "o-", "ms": 3, "lw": 1.2, "capsize": 3, "color": f"C{i}"}
        axes.errorbar(ranks, [f["loss"] for f in rows], halves, label=label, **look)
        measured = [(r, f["measured"]) for r, f in zip(ranks, rows) if f["measured"] is not None]
        if measured:
            label = f"{tokens / 1e6:.3g}M tokens, measured"
            axes.plot(*zip(*measured), "x", ms=8, color=f"C{i}", label=label)
    axes.axhline(content["reference"], color="0.4", ls="-.", lw=1, label="original head")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set(xlabel="rank r of the head W = AB", ylabel="validation loss, nats a token")
    axes.set_title(as_text(f"{content['backbone']} on {content['data']}"), fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    save(figure, file)


def show(content: dict[str, Any], console: Console) -> None:
    """Print the table, what is outside the fitted range, and what the intervals were checked on."""
    title = escape(f"{content['backbone']} on {content['data']}: validation loss, nats a token")
    table = Table(title=title, title_justify="left")
    names = [f"{t / 1e6:.3g}M" for t in content["short"]]
    for column in ("rank", "start", *names, *(f"{t / 1e6:.4g}M, forecast" for t in content["budgets"])):
        table.add_column(column, justify="right")
    for h in content["heads"]:
        cells = [f"{h['closed_form']:.3f}", *(f"{x:.3f}" for x in h["short"])]
        for f in h["forecasts"]:
            said = f"{f['loss']:.3f}" + ("" if f["high"] is None else f" ± {f['high'] - f['loss']:.3f}")
            cells.append(said + ("" if f["measured"] is None else f" (is {f['measured']:.3f})"))
        table.add_row(str(h["rank"]), *cells)
    table.add_row("original", f"{content['reference']:.3f}", style="bold")
    console.print(table)
    for line in content["statements"]:
        console.print(escape(line), highlight=False, soft_wrap=True)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of forecast.json."""
    from bottleneck.studies.formulas import forecast as laws
    from bottleneck.studies.measure.forecast import measure  # here, so that --help loads no torch

    if not c.study.check:
        laws.stored()  # refuses before anything is read; runs with study.check are what stored curves are made of
    found = measure(c, folder, sorted({*laws.SHORT, *c.study.check}))
    budgets = sorted({*c.study.budgets, *c.study.check})
    stored = laws.stored()
    rows = [{**found, "text": found["data"], **row} for row in found["losses"]]
    heads: list[dict[str, Any]] = [
        {
            "rank": curve.rank,
            "parameters": curve.rank * (curve.vocab_size + curve.hidden_size),
            "closed_form": curve.losses[0],
            "short": [curve.losses[t] for t in laws.SHORT],
            "forecasts": forecast(curve, stored, budgets, found["block_size"]),
        }
        for curve in laws.curves_of(rows)
    ]
    content = {**found, "short": list(laws.SHORT), "budgets": budgets, "law": asdict(stored), "heads": heads}
    content["statements"] = statements(content, stored)
    table = [
        (found["backbone"], found["data"], h["rank"], *(f[k] for k in COLUMNS[3:-1]), "; ".join(f["outside"]))
        for h in heads
        for f in h["forecasts"]
    ]
    write(folder, c.study.name, content, columns=COLUMNS, rows=table, draw=functools.partial(draw, content))
    show(content, Console(width=max(110, Console().width)))
    return content


def statements(content: dict[str, Any], stored: Stored) -> list[str]:
    """What the forecasts hold for, in sentences."""
    said = [stored.statement]
    rows = [f for h in content["heads"] for f in h["forecasts"]]
    for reason in dict.fromkeys(reason for f in rows for reason in f["outside"]):
        said.append(f"Extrapolated, without an interval: {reason}.")
    known = [f for f in rows if f["measured"] is not None and f["high"] is not None]
    if known:
        inside = sum(f["low"] <= f["measured"] <= f["high"] for f in known)
        said.append(f"Of {len(known)} measured losses {inside} lie in their intervals.")
    return said


STUDIES.register(
    Study(
        name="forecast",
        summary="loss of each rank after a budget with an interval, from runs of 0.5M and 2M tokens",
        figure="Fig. 6",
        schema=Forecast,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                10.5,
                "the curve after a budget, forecast",
                "two short runs and a law fitted on stored runs",
                (f"{STUDY} study=forecast data=pile backbone=pythia-160m",),
                "about 0.02 h, not measured",
            ),
        ),
    )
)

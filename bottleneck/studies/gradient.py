"""arXiv 2603.10145: the head as a gradient bottleneck (Godey & Artzi 2026).

How much of the logit gradient's norm reaches the hidden state, for the original head and each rank; 95–99 % of it is
lost in pretrained models. Low-rank heads are closed forms on the same hidden states, each with its own softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_count
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text
from bottleneck.studies.shared.config import StudyConfig, StudyKeys, check_ranks, check_starts
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.output import write, write_table
from bottleneck.studies.shared.pictures import canvas, save

NUMBERS = ("share", "lost", "rms", "rank", "update_effective_rank", "update_stable_rank")
COLUMNS = ("backbone", "head", *NUMBERS, "chance")
TOKENS = "gradient_tokens.csv"  # target id and share of every token: original head, each rank


@dataclass(frozen=True)
class Gradient(StudyKeys):
    """arXiv 2603.10145: share of the logit gradient's norm that reaches the hidden state."""

    ranks: list[int] | Literal["auto"] = key("auto", "As in training: a rank, a list, or auto.", read=Any)
    init: str = key("fisher", "Closed-form start of the low-rank heads: a value of head.init.", registry="STARTS")
    calibration_tokens: int = key(16_384, "Training tokens that measure the hidden states for it.", read=Any)


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Gradient`."""
    check_ranks(keys)
    keys.calibration_tokens = as_count("study.calibration_tokens", keys.calibration_tokens)
    check_starts("study.init", [keys.init], closed_form=True)


def chance(rank: int, vocabulary: int) -> float:
    """Root mean square share for a gradient that is independent of W: √(rank / V)."""
    return math.sqrt(rank / vocabulary)


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Share against rank with chance; its distribution over tokens; share by frequency of the target."""
    figure, (left, middle, right) = canvas(3, width=5.2)
    heads, full = content["heads"], content["full"]
    _by_rank(left, content)
    counts, bins = full["histogram"], len(full["histogram"])
    edges = [i / bins for i in range(bins + 1)]
    middle.stairs([n / sum(counts) for n in counts], edges, fill=True, alpha=0.6)
    middle.set_xlim(0, max(i for i, n in enumerate(counts, 1) if n) / bins)
    title = as_text(f"{content['backbone']}, original head")
    middle.set(xlabel="share that reaches the hidden state", ylabel="share of tokens", title=title)
    places = range(len(content["band_names"]))
    some = [(f"rank {h['rank_of_head']}", h) for h in heads[:: max(1, len(heads) // 3)]]
    for label, row in (("original head", full), *some):
        right.plot(places, [b["share"] for b in row["bands"]], "o-", ms=4, label=label)
    right.set_xticks(places, content["band_names"], rotation=20, fontsize=8)
    right.set(xlabel="position of the target by frequency", ylabel="share that reaches the hidden state")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
    save(figure, file)


def _by_rank(axes: Any, content: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    V, heads, share = content["vocab_size"], content["heads"], content["full"]["share"]
    ranks = [h["rank_of_head"] for h in heads]
    axes.plot(ranks, [h["share"] for h in heads], "o-", ms=4, label=f"heads of rank r ({content['init']})")
    axes.axhline(share, ls="--", color="C1", label=f"original head ({share:.3f})")
    axes.plot(ranks, [chance(r, V) for r in ranks], ":", color="0.4", label="chance, √(r/V)")
    axes.set(xscale="log", yscale="log", xlabel="rank r of the head", ylabel="share of the logit gradient's norm")
    axes.xaxis.set_minor_locator(NullLocator())
    # of ranks that are close together only the last is named
    axes.set_xticks(ranks, [str(r) if all(s <= r or s > 1.3 * r for s in ranks) else "" for r in ranks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of gradient.json."""
    from bottleneck.studies.measure.gradient import measure  # here, so that --help loads no torch

    content = measure(c, folder)
    V = content["vocab_size"]
    named = [("full", content["full"]), *((str(h["rank_of_head"]), h) for h in content["heads"])]
    rows = [(content["backbone"], name, *(r[n] for n in NUMBERS), chance(r["rank"], V)) for name, r in named]
    # one row for each token is long, so it goes into a table of its own
    tokens = {"target": content.pop("targets"), **{f"share_{name}": r.pop("tokens") for name, r in named}}
    write_table(folder / TOKENS, list(tokens), zip(*tokens.values()))
    content = {**content, "by_token": TOKENS}
    result = write(folder, c.study.name, content, columns=COLUMNS, rows=rows, draw=lambda file: draw(content, file))
    title = escape(f"{content['backbone']}: share of the logit gradient's norm that reaches the hidden state")
    table = Table(title=title, title_justify="left")
    for column in ("head", "reaches it", "lost", "chance", "effective rank of the update"):
        table.add_column(column, justify="right")
    for name, r in named:
        update = "–" if r["update_effective_rank"] is None else f"{r['update_effective_rank']:.1f}"
        label = "original" if name == "full" else name
        table.add_row(label, f"{r['share']:.4f}", f"{100 * r['lost']:.1f} %", f"{chance(r['rank'], V):.4f}", update)
    Console(width=max(100, Console().width)).print(table)
    return result


STUDIES.register(
    Study(
        name="gradient",
        summary="share of the logit gradient that reaches the hidden state, for the original head and every rank",
        figure="2603.10145",
        schema=Gradient,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                11,
                "2603.10145",
                "share of the logit gradient that reaches the hidden state",
                tuple(
                    f"{STUDY} study=gradient data=pile data.block_size=1024 backbone={b}"
                    for b in ("gpt2", "pythia-1b", "llama-2-7b")
                ),
                "under 0.05 h each",
            ),
        ),
    )
)

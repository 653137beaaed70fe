"""The curve of Fig. 6 without training: starts of every rank, evaluated, beside a trained curve if there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Optional

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_count, as_list
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text
from bottleneck.studies.shared.config import StudyConfig, StudyKeys, check_ranks, check_starts
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

if TYPE_CHECKING:
    from bottleneck.studies.shared.trained import Trained

NUMBERS = ("kl", "top1_agreement", "top5_agreement", "acceptance")  # see `evaluation.agreement`
COLUMNS = (
    "backbone",
    "init",
    "rank",
    "parameters",
    "loss",
    "perplexity",
    *NUMBERS,
    "trained_loss",
    "trained_perplexity",
)


@dataclass(frozen=True)
class Estimate(StudyKeys):
    """The curve of Fig. 6 from starts alone, without training."""

    ranks: list[int] | Literal["auto"] = key(
        "auto", "As in training: a rank, a list, or auto; those of study.curve are added.", read=Any
    )
    inits: list[str] = key(
        ["refined", "fisher", "svd", "scaled", "normal"],
        "Starts to evaluate: values of head.init.",
        read=Any,
        registry="STARTS",
    )
    calibration_tokens: int = key(
        16_384, "Training tokens that measure the hidden states and teach the refined start.", read=Any
    )
    passes: int = key(2, "Passes of the refined start over the calibration tokens.", read=Any)
    seed: int = key(0, "Seed of the random starts.")
    curve: Optional[str] = key(
        None, "curve.json of trained heads to show beside the estimate, or the folder of the run."
    )


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Estimate`."""
    check_ranks(keys)
    keys.calibration_tokens = as_count("study.calibration_tokens", keys.calibration_tokens)
    keys.passes = as_count("study.passes", keys.passes)
    as_count("study.seed", keys.seed, 0)
    keys.inits = [str(i) for i in as_list(keys.inits)]
    check_starts("study.inits", keys.inits)


def beside(heads: list[dict[str, Any]], original: float, trained: Optional[Trained]) -> list[dict[str, Any]]:
    """Add to each head the trained loss of its rank and `excess`, in nats.

    The excess is how much further above the original head the estimate is than the trained head. Both gaps are taken
    on their own text, since the run may have used another one.

    Args:
        original: loss of the original head on this study's text.
    """
    out = []
    for h in heads:
        loss = trained.losses.get(h["rank"]) if trained else None
        excess = None
        if trained is not None and loss is not None and h["loss"] is not None:
            excess = (h["loss"] - original) - (loss - trained.own)
        out.append({**h, "trained_loss": loss, "excess": excess})
    return out


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Left, Fig. 6 without training: perplexity by rank of each start. Right: KL to the original head, disagreement."""
    figure, (left, right) = canvas(2)
    reference = content["reference"]["perplexity"]
    shown = [reference]
    for i, init in enumerate(dict.fromkeys(h["init"] for h in content["heads"])):
        own = [h for h in content["heads"] if h["init"] == init]
        fair = [h for h in own if h["perplexity"]]
        look = {"ms": 3.5, "lw": 1.3, "color": f"C{i}", "label": init}
        left.plot([h["rank"] for h in fair], [h["perplexity"] for h in fair], "o-", **look)
        shown += [h["perplexity"] for h in fair if init in ("fisher", "refined")]
        positive = [h for h in own if h["kl"] and h["kl"] > 1e-6]
        right.plot([h["rank"] for h in positive], [h["kl"] for h in positive], "o-", **look)
        wrong = [h for h in own if h["top1_agreement"] is not None and h["top1_agreement"] < 1]
        right.plot([h["rank"] for h in wrong], [1 - h["top1_agreement"] for h in wrong], ":", lw=1.2, color=f"C{i}")
    if content["trained"]:
        losses = content["trained"]["losses"]
        label = as_text(f"trained, {content['trained']['tokens']:,} tokens ({content['trained']['data']})")
        left.plot([int(r) for r in losses], [math.exp(x) for x in losses.values()], "k*--", ms=7, lw=1, label=label)
    left.axhline(reference, color="0.4", ls="--", lw=1, label=f"original head ({reference:.4g})")
    # random starts are far above the others
    ceiling = 30 * max(shown) if len(shown) > 1 else 1e6
    highest = max([h["perplexity"] for h in content["heads"] if h["perplexity"]], default=1e6)
    _limit(left, reference / 1.3, min(ceiling, 1.5 * highest))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rank r of the head W = AB")
        axes.legend(fontsize=7, frameon=False)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    right.set_ylim(top=min(right.get_ylim()[1], 30.0))  # nats: literal N(0, 1) starts are hundreds away
    left.set_ylabel("perplexity, no training")
    right.set_ylabel("solid: KL from the original head, nats\ndotted: share of tokens with another top token")
    save(figure, file)


def _limit(axes: Any, low: float, high: float) -> None:
    """Set the limits and mark in the legend the lines that lie above them."""
    axes.set_ylim(low, high)
    for line in axes.get_lines():
        if len(line.get_ydata()) and min(line.get_ydata()) > axes.get_ylim()[1]:
            line.set_label(f"{line.get_label()} (above {axes.get_ylim()[1]:,.0f})")


def show(content: dict[str, Any], console: Console) -> None:
    """Print the curves: one row for each rank, one column for each start."""
    inits = list(dict.fromkeys(h["init"] for h in content["heads"]))
    title = escape(f"{content['backbone']} on {content['data']}: perplexity without training")
    table = Table(title=title, title_justify="left")
    trained = content["trained"]["losses"] if content["trained"] else {}
    for column in ("rank", *inits, *(["trained"] if trained else []), f"KL ({inits[0]})", "same top token"):
        table.add_column(column, justify="right")
    by = {(h["init"], h["rank"]): h for h in content["heads"]}
    for r in dict.fromkeys(h["rank"] for h in content["heads"]):
        first = by[inits[0], r]
        cells = ["–" if by[i, r]["perplexity"] is None else f"{by[i, r]['perplexity']:,.5g}" for i in inits]
        if trained:
            cells.append(f"{math.exp(trained[r]):,.5g}" if r in trained else "–")
        cells.append("–" if first["kl"] is None else f"{first['kl']:.4f}")
        cells.append("–" if first["top1_agreement"] is None else f"{100 * first['top1_agreement']:.1f} %")
        table.add_row(str(r), *cells)
    table.add_row("original", f"{content['reference']['perplexity']:,.5g}", style="bold")
    console.print(table)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of estimate.json."""
    from bottleneck.studies.measure.estimate import measure  # here, so that --help loads no torch

    content, trained = measure(c, folder)
    content["heads"] = beside(content["heads"], content["reference"]["loss"], trained)
    fields = ("data", "tokens", "losses", "own")
    content["trained"] = trained and {name: getattr(trained, name) for name in fields}
    rows = [
        (
            content["backbone"],
            *(h[k] for k in ("init", "rank", "parameters", "loss", "perplexity")),
            *(h[n] for n in NUMBERS),
            h["trained_loss"],
            None if h["trained_loss"] is None else math.exp(h["trained_loss"]),
        )
        for h in content["heads"]
    ]
    result = write(folder, c.study.name, content, columns=COLUMNS, rows=rows, draw=lambda f: draw(content, f))
    show(content, Console(width=max(110, Console().width)))
    return result


STUDIES.register(
    Study(
        name="estimate",
        summary="the curve from closed forms, without training, with KL and agreement",
        figure="Fig. 6",
        schema=Estimate,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                10,
                "the curve without training",
                "closed forms, KL and agreement",
                (f"{STUDY} study=estimate data=pile backbone=pythia-1b study.calibration_tokens=65536",),
                "under 0.05 h",
            ),
        ),
    )
)

"""How often a low-rank preview of the logits has the original head's most likely token among its top k.

A decoder may compute all logits with a low-rank head and recompute only the best k exactly. This study measures how
large k must be, by rank and by weighting of the closed form. A start that weights tokens by their Fisher information
fits frequent tokens best; for the tail of rare arg-maxes the whitened SVD, which weights all tokens alike, may keep
more. The shares are measured, not guaranteed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_count, as_list
from bottleneck.core.errors import check
from bottleneck.core.extensions import STARTS, STUDIES, Study
from bottleneck.results.picture import as_text
from bottleneck.studies.shared.config import StudyConfig, StudyKeys, check_ranks
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

log = logging.getLogger(__name__)
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)  # of the position of the arg-max
COLUMNS = ("backbone", "weighting", "rank", "numbers_read", *(f"position_{q:g}" for q in QUANTILES))


@dataclass(frozen=True)
class Preview(StudyKeys):
    """How often the original head's arg-max is in a low-rank preview's top k."""

    ranks: list[int] | Literal["auto"] = key("auto", "As in training: a rank, a list, or auto.", read=Any)
    weightings: list[str] = key(
        ["whitened", "fisher", "svd"],
        "Closed forms to preview with: whitened (truncated SVD of W Sigma^1/2) or closed-form values of head.init.",
        read=Any,
    )
    top: list[int] = key([1, 8, 64, 256, 1024], "Numbers of candidates k.", read=Any)
    calibration_tokens: int = key(16_384, "Training tokens that measure the hidden states.", read=Any)


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Preview`."""
    check_ranks(keys)
    keys.calibration_tokens = as_count("study.calibration_tokens", keys.calibration_tokens)
    keys.top = sorted({as_count("study.top", k) for k in as_list(keys.top)})
    check(len(keys.top) > 0, "study.top=[]: give at least one number of candidates")
    keys.weightings = [str(w) for w in as_list(keys.weightings)]
    check(len(keys.weightings) > 0, "study.weightings=[]: give at least one")
    allowed = ["whitened", *(start.name for start in STARTS if start.closed_form and not start.reads_hidden)]
    for weighting in keys.weightings:
        check(weighting in allowed, f"study.weightings={weighting}: must be one of {', '.join(allowed)}")


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Left: share of tokens whose arg-max is not in the top k, by rank. Right: quantiles of its position, by rank."""
    figure, (left, right) = canvas(2)
    tops, levels = content["top"], content["quantiles"]
    smallest = 0.5 / content["tokens"]
    shown = [i for i, k in enumerate(tops) if k in (tops[0], tops[len(tops) // 2], tops[-1])]
    named = [i for i, q in enumerate(levels) if q in (0.9, 0.999)]
    for j, weighting in enumerate(dict.fromkeys(p["weighting"] for p in content["previews"])):
        own = [p for p in content["previews"] if p["weighting"] == weighting]
        ranks = [p["rank"] for p in own]
        for i, style in zip(shown, ("-", "--", ":")):
            missed = [max(1 - p["shares"][i], smallest) for p in own]
            left.plot(ranks, missed, style, marker="o", ms=3, color=f"C{j}", label=f"{weighting}, top {tops[i]}")
        for i, style in zip(named, ("--", "-")):
            places = [p["quantiles"][i] for p in own]
            right.plot(
                ranks, places, style, marker="o", ms=3, color=f"C{j}", label=f"{weighting}, {100 * levels[i]:g} %"
            )
    left.set_ylabel("share of tokens whose arg-max is not in the top k")
    right.set_ylabel("position of the arg-max in the preview")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="rank r of the preview")
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle(as_text(f"{content['backbone']} on {content['data']}, {content['tokens']:,} tokens"), fontsize=10)
    save(figure, file)


def show(content: dict[str, Any], console: Console) -> None:
    """Print the shares and the 99.9 % position of every preview."""
    title = escape(f"{content['backbone']} on {content['data']}: arg-max of the original head in a preview's top k")
    table = Table(title=title, title_justify="left")
    for column in ("weighting", "rank", *(f"top {k}" for k in content["top"]), "99.9 % position"):
        table.add_column(column, justify="left" if column == "weighting" else "right")
    at = content["quantiles"].index(0.999)
    for p in content["previews"]:
        shares = [f"{100 * x:.2f} %" for x in p["shares"]]
        table.add_row(p["weighting"], str(p["rank"]), *shares, f"{p['quantiles'][at]:,.0f}")
    console.print(table)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of preview.json."""
    from bottleneck.studies.measure.preview import measure  # here, so that --help loads no torch

    content = measure(c, folder, QUANTILES)
    if content["tokens"] < 10_000:
        log.info("%d tokens: the 99.9 %% position rests on few of them; give tokens=50_000 or more", content["tokens"])
    columns = (*COLUMNS, *(f"share_top_{k}" for k in content["top"]))
    fields = ("weighting", "rank", "numbers_read")
    rows = [(content["backbone"], *(p[k] for k in fields), *p["quantiles"], *p["shares"]) for p in content["previews"]]
    result = write(folder, c.study.name, content, columns=columns, rows=rows, draw=lambda file: draw(content, file))
    show(content, Console(width=max(110, Console().width)))
    return result


STUDIES.register(
    Study(
        name="preview",
        summary="how often the original head's arg-max is in a low-rank preview's top k, by rank and weighting",
        figure="previews",
        schema=Preview,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                13,
                "previews",
                "candidates that a low-rank preview needs, by rank and weighting of the closed form",
                (f"{STUDY} study=preview data=pile backbone=pythia-1b",),
                "under 0.05 h",
            ),
        ),
    )
)

"""Sec. 5.2: a bound on the loss that a head of rank r adds, from the spectrum of the original head, and the measured
loss.

The formulas are in `formulas.expansion`. The bound holds at every rank, but at low ranks it is far above the loss of
any head. It is therefore shown as a multiple of the measured KL and capped at the trivial bound, that of the uniform
distribution. Two more informative results stand beside it: the measured KL against the tail energy, with its slope, and
the true second-order term of the KL.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Literal, Optional

from bottleneck.config.declare import key
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text
from bottleneck.studies.shared.config import StudyConfig, StudyKeys, check_ranks
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

log = logging.getLogger(__name__)
COLUMNS = (
    "backbone",
    "rank",
    "tail_head",
    "tail_weighted",
    "bound",
    "bound_head",
    "surrogate",
    "kl_truncated",
    "trained_loss",
    "trained_gap",
    "bound_capped",
    "bound_ratio",
    "second_order_truncated",
    "kl_fisher",
    "second_order_fisher",
)
VISIBLE = 1e-5  # nats; smaller gaps are rounding
GAPS = (
    ("KL of the truncated head", "kl_truncated", "oC2"),
    ("its second-order term", "second_order_truncated", "+C2"),
    ("KL of the Fisher-weighted head", "kl_fisher", "sC4"),
    ("its second-order term", "second_order_fisher", "xC4"),
    ("gap of the trained head", "trained_gap", "*C3"),
)


@dataclass(frozen=True)
class Theory(StudyKeys):
    """Sec. 5.2: tail energy, bound, and measured gap against rank."""

    curve: Optional[str] = key(None, "curve.json of heads trained on this backbone, or the folder of the run.")
    ranks: list[int] | Literal["auto"] = key(
        "auto", "As in training: a rank, a list, or auto; those of study.curve are added.", read=Any
    )


def holds(rows: list[dict[str, Any]]) -> bool:
    """Whether every measured KL is below its bound and the bounds are ordered; float32 rounding of the logits is
    allowed.
    """
    return all(
        row["kl_truncated"] <= row["bound"] * (1 + 1e-4) + 1e-5
        and row["bound"] <= row["bound_head"] * (1 + 1e-9) + 1e-9
        for row in rows
    )


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Left: capped bound, surrogate and measured gaps against rank.

    Middle: gaps against tail energy. Right: the tails.
    """
    figure, (left, middle, right) = canvas(3, width=5.4)
    rows, t = content["ranks"], content["tails"]
    full = list(range(1, content["hidden_size"]))
    trivial = content["trivial_bound"]
    capped = [min(t["weighted"][r] / 4, trivial) for r in full]
    left.plot(full, capped, "-", lw=1.3, color="C0", label=f"bound ¼ Σ_{{i>r}} σ_i(W Σ^½)², at most {trivial:.2f} nats")
    left.plot(
        full, [t["surrogate"][r] for r in full], "--", lw=1.3, color="C1", label="surrogate: diagonal, token-averaged"
    )
    shown: list[float] = []
    for name, key_, style in GAPS:
        points = [(row["rank"], row["tail_weighted"], row[key_]) for row in rows if (row[key_] or 0) > VISIBLE]
        if points:
            ranks, tail, gap = zip(*points)
            shown += gap
            size = 9 if style[0] == "*" else 5
            left.plot(ranks, gap, style, ms=size, label=name)
            found = content["slopes"].get(key_)
            named = name if found is None else f"{name}, slope {found:.2f}"
            middle.plot(tail, gap, style, ms=size, label=named if not key_.startswith("second") else None)
    left.set_ylim(bottom=min(shown, default=1e-3) / 5)
    energy = sorted(row["tail_weighted"] for row in rows if row["tail_weighted"] > 0)
    middle.plot(energy, [x / 4 for x in energy], "-", lw=1, color="C0", label="bound, slope 1")
    for name, values, style, colour in (
        ("W", t["head"], "-", "C4"),
        ("W Σ^½", t["weighted"], "-", "C0"),
        ("Q^½ W Σ^½", t["surrogate"], "--", "C1"),
    ):
        right.plot(full, _shares(values, full), style, lw=1.3, color=colour, label=name)
    left.set_ylabel("loss above the original head, nats a token")
    middle.set(xlabel="tail energy Σ_{i>r} σ_i(W Σ^½)²", ylabel="loss above the original head, nats a token")
    right.set_ylabel("tail energy Σ_{i>r} σ_i², share of all")
    for axes in (left, right):
        axes.set_xlabel("rank r")
    for axes in (left, middle, right):
        if energy and trivial > 0:  # a head of zeros has no logarithms
            axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=7, frameon=False)
    if shown and trivial > 0:
        middle.set_ylim(min(shown) / 5, 10 * trivial)
    figure.suptitle(as_text(f"{content['backbone']} on {content['data']}"), fontsize=10)
    save(figure, file)


def _shares(tail: list[float], at: Iterable[int]) -> list[float]:
    return [tail[r] / (tail[0] or 1.0) for r in at]


def conclusion(content: dict[str, Any]) -> str:
    """Whether the bound holds, and from which rank on it is below the trivial bound."""
    rows, trivial = content["ranks"], content["trivial_bound"]
    if not content["holds"]:
        return "the bound does NOT hold at every rank: please report this"
    useful = [row["rank"] for row in rows if row["bound"] < trivial]
    where = f"from rank {useful[0]}" if useful else "at none of these ranks"
    return f"the bound holds, and is below the trivial bound of {trivial:.3g} nats {where}"


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of theory.json."""
    from bottleneck.studies.measure.theory import measure  # here, so that --help loads no torch

    content = measure(c, folder)
    content["holds"] = holds(content["ranks"])
    for row in content["ranks"]:
        gap = "" if row["trained_gap"] is None else f", trained heads {row['trained_gap']:+.4f}"
        ratio = "" if row["bound_ratio"] is None else f", {row['bound_ratio']:,.3g} times its KL"
        capped = f" (capped {row['bound_capped']:.4g}{ratio})"
        log.info(
            "rank %d: truncated head %.4g nats, second order %.4g, bound %.4g%s",
            *(row[k] for k in ("rank", "kl_truncated", "second_order_truncated", "bound")),
            capped,
        )
        log.info(
            "rank %d: Fisher-weighted head %.4g nats, second order %.4g, diagonal surrogate %.4g%s",
            *(row[k] for k in ("rank", "kl_fisher", "second_order_fisher", "surrogate")),
            gap,
        )
    log.info("%s", conclusion(content))
    rows = [(content["backbone"], *(row[k] for k in COLUMNS[1:])) for row in content["ranks"]]
    return write(folder, c.study.name, content, columns=COLUMNS, rows=rows, draw=lambda file: draw(content, file))


STUDIES.register(
    Study(
        name="theory",
        summary="tail energy, bound and second-order term, and the measured gap of low-rank and trained heads",
        figure="Sec. 5.2",
        schema=Theory,
        check=check_ranks,
        run=run,
        commands=(
            Figure(
                9,
                "Sec. 5.2",
                "tail energy, bound, and what heads cost",
                (f"{STUDY} study=theory data=pile backbone=pythia-1b study.curve=paper/figure6/3",),
                "under 0.05 h",
            ),
        ),
    )
)

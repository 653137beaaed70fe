"""Fig. 4 and 5: singular values of the head along training, of W alone and through the hidden states, W Σ^½."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bottleneck.config.declare import key
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text, colours_for
from bottleneck.studies.shared.config import CheckpointKeys, StudyConfig, check_checkpoints
from bottleneck.studies.shared.figures import SMALL, STUDY, Figure, pythia, visit_hours
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save, shades, step_bar

log = logging.getLogger(__name__)
METRICS = (
    "entropy",
    "effective_rank",
    "stable_rank",
    "participation_ratio",
    "condition",
    "top_share",
    "largest",
    "smallest",
    "energy",
)
COLUMNS = ("model", "step", "matrix", "d", "rows", "padding_rows", "tied", *METRICS)
MOST_NAMED = 8  # lines that a legend names
LOWEST = 1e-4  # of the largest singular value: where a panel ends
MATRICES = {"head": "W", "weighted": "W Σ^½"}


@dataclass(frozen=True)
class Spectrum(CheckpointKeys):
    """Fig. 4 and 5: singular values of the head along training."""

    hidden: bool = key(
        True,
        "Also compute the spectrum of W Sigma^1/2, which needs text and the whole model; false: read the head alone.",
    )
    drop_padding: bool = key(False, "Leave out the rows beyond the tokenizer's entries; they are counted in any case.")


def draw(entries: list[dict[str, Any]], file: BinaryIO) -> None:
    """First Fig. 4, one panel for each model and matrix: σ_i against i, dark to light along training. Last Fig. 5,
    entropy against step or model, if there are several checkpoints.
    """
    models = list(dict.fromkeys(e["model"] for e in entries))
    kinds = [k for k in MATRICES if k in entries[0]]
    figure, panels = canvas(len(models) * len(kinds) + (len(entries) > 1), width=4.8)
    for (m, k), axes in zip([(m, k) for m in models for k in kinds], panels):
        own = [e for e in entries if e["model"] == m]
        many = len(own) > MOST_NAMED
        for e, shade in zip(own, shades(len(own))):
            values = e[k]["singular_values"]
            name = as_text(m) if e["step"] is None else f"step {e['step']}"
            axes.plot(range(1, len(values) + 1), values, color=shade, lw=1.2, label=None if many else name)
        axes.set(xscale="log", xlabel="index i", ylabel=f"singular value σ_i of {MATRICES[k]}", title=as_text(m))
        _scale(axes, [e[k]["singular_values"] for e in own])
        if many:
            step_bar(figure, axes, [e["step"] for e in own])
        else:
            axes.legend(fontsize=7, frameon=False, loc="lower left")
    if len(entries) > 1:
        _entropies(entries, models, kinds, panels[-1])
    save(figure, file)


def _scale(axes: Any, spectra: list[list[float]]) -> None:
    """A logarithmic axis that ends at LOWEST of the largest value; a direction that the last norm removes would
    stretch it.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    largest = max(map(max, spectra))
    if largest == 0:  # a head of zeros has no logarithms
        return
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(min(map(min, spectra)), LOWEST * largest) * 0.8)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _entropies(entries: list[dict[str, Any]], models: list[str], kinds: list[str], last: Any) -> None:
    along = any(sum(e["model"] == m for e in entries) > 1 for m in models)
    for i, (m, colour) in enumerate(zip(models, colours_for(len(models)))):
        own = [e for e in entries if e["model"] == m]
        x = [e["step"] or 0 for e in own] if along else [i]
        for k, style in zip(kinds, ("o-", "s--")):
            y, name = [e[k]["entropy"] for e in own], as_text(f"{m}, {MATRICES[k]}")
            last.plot(x, y, style, color=colour, ms=3, lw=1.2, label=name)
    if along:
        last.set_xscale("symlog", linthresh=1)
        last.set_xlabel("training step")
    else:
        last.set_xticks(range(len(models)), [as_text(m) for m in models])
    last.set_ylabel("singular entropy KL(σ/Σσ ‖ uniform), nats")
    last.legend(fontsize=7, frameon=False)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of spectrum.json."""
    from bottleneck.studies.measure.spectrum import measure  # here, so that --help loads no torch

    entries, about = measure(c, folder)
    for model, e in {e["model"]: e for e in entries}.items():
        pads = e["padding"]["rows"]
        log.info(
            "%s: padding rows %s (%s), %d rows in the spectra, embeddings %s",
            model,
            "unknown" if pads is None else pads,
            "left out" if c.study.drop_padding else "kept",
            e["rows"],
            "tied" if e["tied"] else "untied",
        )
    rows = [
        (e["model"], e["step"], k, e["d"], e["rows"], e["padding"]["rows"], e["tied"], *(e[k][m] for m in METRICS))
        for e in entries
        for k in MATRICES
        if k in e
    ]
    content = {**about, "drop_padding": c.study.drop_padding, "checkpoints": entries}
    return write(folder, c.study.name, content, columns=COLUMNS, rows=rows, draw=lambda file: draw(entries, file))


STUDIES.register(
    Study(
        name="spectrum",
        summary="singular values of the head, entropy, effective and stable rank",
        figure="Fig. 4, 5",
        schema=Spectrum,
        check=check_checkpoints,
        run=run,
        commands=(
            Figure(
                5,
                "Fig. 4, 5",
                "singular values and entropy of the head along training "
                "(study.hidden=false: reads the head alone, needs no GPU)",
                (f"{STUDY} study=spectrum data=pile study.steps=pythia {pythia(SMALL)} hydra.run.dir=paper/spectrum",),
                visit_hours(SMALL),
            ),
        ),
    )
)

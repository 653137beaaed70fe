"""arXiv 2403.06634, 2403.09539: the rank of a head, recovered from log-probabilities alone.

Carlini et al. and Finlayson et al. 2024 recover the width of models behind an interface. Here it is a test of exported
heads: a head of rank r must show exactly the rank r, without access to its weights. Run it with
backbone.dtype=float32: at 16 bits rounding hides the end of the spectrum.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Optional

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_count
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text, colours_for
from bottleneck.studies.shared.config import CheckpointKeys, StudyConfig, check_checkpoints
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

log = logging.getLogger(__name__)
FIELDS = (
    "rank",
    "known_rank",
    "gap",
    "limit",
    "contexts",
    "tokens_of_block",
    "effective_rank",
    "hidden_size",
    "hidden_rank",
)
COLUMNS = ("model", "step", *FIELDS)


@dataclass(frozen=True)
class Extract(CheckpointKeys):
    """arXiv 2403.06634: rank of a head from its log-probabilities; `tokens` is the number of contexts."""

    top: Optional[int] = key(
        None,
        "Use the k most likely tokens of each context only; default: log-probabilities of fixed tokens.",
        read=Any,
    )


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Extract`."""
    check_checkpoints(keys)
    keys.top = None if keys.top is None else as_count("study.top", keys.top, 3)


def fall_after(entry: dict[str, Any], rank: int) -> float:
    """Ratio of the singular value of that index, from 1, to the next one; 0 where the next one is not known or 0."""
    values = entry["singular_values"]
    return values[rank - 1] / values[rank] if 0 < rank < len(values) and values[rank] > 0 else 0.0


def verdict(entry: dict[str, Any]) -> str:
    """What the singular values say about the rank, compared with the rank that an export states."""
    from bottleneck.studies.formulas.extraction import CLEAR  # here, so that --help loads no torch

    if entry["rank"] is None:
        return f"no rank up to {entry['limit']} shows (largest gap {entry['gap']:.2g}): higher, or hidden by rounding"
    said = f"rank {entry['rank']} (the next singular value is {entry['gap']:.3g} times smaller)"
    known = entry["known_rank"]
    if known is not None:
        same = entry["rank"] == min(known, entry["hidden_rank"])
        said += ", as exported" if same else f", but exported as {known}"
        if same and entry["rank"] < known:
            said += f" ({known} = d, of which hidden states after a LayerNorm show {entry['hidden_rank']})"
        fall = fall_after(entry, known)
        if not same and fall >= CLEAR:
            said += f", after which the values fall {fall:.3g} times: what is beyond may be rounding to 16 bits"
    elif entry["rank"] == entry["hidden_rank"] < entry["hidden_size"]:
        said += f" (of d = {entry['hidden_size']}: hidden states after a LayerNorm show one less)"
    elif entry["rank"] > entry["hidden_size"]:
        said += f", above the hidden size, {entry['hidden_size']}: its logits are not linear in the hidden states, or "
        said += "rounding hides the end of the spectrum"
    if entry["limit"] < entry["hidden_size"] and known != entry["rank"]:
        said += f"; this block shows at most {entry['limit']} of {entry['hidden_size']}: give more tokens to be sure"
    return said


def draw(entries: list[dict[str, Any]], file: BinaryIO) -> None:
    """Singular values of the centred log-probabilities; a vertical line where each spectrum ends."""
    figure, (axes,) = canvas(1, width=7.0)
    for e, colour in zip(entries, colours_for(len(entries))):
        values = [x for x in e["singular_values"] if x > 0]
        name = e["model"] if e["step"] is None else f"{e['model']}, step {e['step']}"
        shown = "none" if e["rank"] is None else e["rank"]
        axes.plot(range(1, len(values) + 1), values, lw=1.2, color=colour, label=as_text(f"{name}: rank {shown}"))
        if e["rank"] is not None:
            axes.axvline(e["rank"], color=colour, lw=0.8, ls="--")
    axes.set(xscale="log", yscale="log", xlabel="index i", ylabel="singular value σ_i of centred log-probabilities")
    axes.legend(fontsize=7, frameon=False)
    save(figure, file)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of extract.json."""
    from bottleneck.studies.measure.extract import measure  # here, so that --help loads no torch

    content = measure(c, folder)
    entries = content["checkpoints"]
    for e in entries:
        e["verdict"] = verdict(e)
        log.info("%s: %s", e["model"] if e["step"] is None else f"{e['model']}@step{e['step']}", e["verdict"])
    rows = [(e["model"], e["step"], *(e[k] for k in FIELDS)) for e in entries]
    return write(folder, c.study.name, content, columns=COLUMNS, rows=rows, draw=lambda file: draw(entries, file))


STUDIES.register(
    Study(
        name="extract",
        summary="the rank of a head recovered from its log-probabilities, a test of exported heads",
        figure="2403.06634",
        schema=Extract,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                14,
                "2403.06634",
                "ranks recovered from log-probabilities; also for exports: backbone=local backbone.path=EXPORT, with "
                "backbone.trust_remote_code=true for --form serve and modelling",
                (f"{STUDY} study=extract data=pile backbone=pythia-160m backbone.dtype=float32",),
                "under 0.05 h",
            ),
        ),
    )
)

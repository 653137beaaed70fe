"""Does a head escape the rank bottleneck? Output ranks of a run's heads of all kinds, beside their loss.

For each head the empirical rank of its log-probability matrix is measured on the same contexts, and whether the loss
follows it. For the original head also the exponent of the extended logit matrix (Golowich, Liu, Shetty, arXiv
2510.24966) and the loss after bands of singular directions of W are removed (Cancedda, arXiv 2402.09221).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_count
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text, colours_for
from bottleneck.studies.shared.config import StudyConfig, StudyKeys
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

log = logging.getLogger(__name__)
FIELDS = ("loss", "rank", "limit", "effective_rank", "tail_energy", "exponent")
COLUMNS = ("backbone", "head", "kind", "rank_of_head", *FIELDS)


@dataclass(frozen=True)
class Escape(StudyKeys):
    """Output rank against loss for the heads of a run; `tokens` is the number of contexts."""

    run: str = key("???", "Folder of a finished run of train.py on this backbone.")
    columns: int = key(
        4_096,
        "Tokens of the vocabulary whose log-probabilities are used: half the likeliest, half evenly spaced.",
        read=Any,
    )
    bands: int = key(8, "Bands of singular directions of the original head to remove in turn.", read=Any)
    histories: int = key(128, "Rows of the extended logit matrix.", read=Any)
    futures: int = key(32, "Futures of the extended logit matrix, of 4 tokens each.", read=Any)


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Escape`."""
    for name, least in (("columns", 3), ("bands", 1), ("histories", 8), ("futures", 1)):
        setattr(keys, name, as_count(f"study.{name}", getattr(keys, name), least))


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Left: singular values of the log-probabilities. Middle: loss against output rank. Right: loss without bands."""
    figure, (left, middle, right) = canvas(3, width=5.2)
    original = {"head": "original head", "kind": "original", **content["reference"]}
    entries = [original, *content["heads"]]
    colours = colours_for(len(entries))
    for e, colour in zip(entries, colours):
        values = [x for x in e["singular_values"] if x > 0]
        left.plot(range(1, len(values) + 1), values, lw=1.1, color=colour, label=as_text(e["head"]))
        middle.plot([e["effective_rank"] or 1.0], [e["loss"]], "o", color=colour, label=as_text(e["head"]))
    # below 1e-18 of the largest all is rounding, and kinds with constant logits go down to 1e-300
    highest = max((x for e in [original, *content["heads"]] for x in e["singular_values"]), default=0.0)
    if highest > 0:
        left.set_ylim(highest * 1e-18, highest * 10)
    left.set(xscale="log", yscale="log", xlabel="index i", ylabel="singular value of centred log-probabilities")
    middle.set(xscale="log", xlabel="effective rank of the log-probabilities", ylabel="loss, nats a token")
    bands = content["reference"]["without_bands"]
    right.bar([f"{b['first']}–{b['last']}" for b in bands], [b["loss"] for b in bands])
    right.axhline(content["reference"]["loss"], color="0.4", ls="--", lw=1, label="original head")
    right.tick_params(axis="x", rotation=30, labelsize=7)
    right.set(xlabel="singular directions of W that are removed", ylabel="loss, nats a token")
    for axes in (left, middle, right):
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle(as_text(f"{content['backbone']} on {content['data']}"), fontsize=10)
    save(figure, file)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of escape.json."""
    from bottleneck.studies.measure.escape import measure  # here, so that --help loads no torch

    content = measure(c, folder)
    original = {"head": "original", "kind": "original", "rank_of_head": None, **content["reference"]}
    entries = [original, *content["heads"]]
    for e in entries:
        beyond = "–" if e["tail_energy"] is None else f"{e['tail_energy']:.2g}"
        said = "%s: loss %.4f, output rank %s%d (effective %.1f), share of energy beyond the hidden size %s"
        least = "at least " if e["rank"] >= e["limit"] else ""  # so many contexts and columns show no more
        log.info(said, e["head"], e["loss"], least, e["rank"], e["effective_rank"] or 0.0, beyond)
    found = content["reference"]["extended"]["exponent"]
    log.info("extended logit matrix: exponent %s", "–" if found is None else f"{found:.3f}")
    if content["rho"] is not None:
        log.info("rank correlation of loss and effective output rank over the heads: %+.2f", content["rho"])
    rows = [
        (content["backbone"], *(e[k] for k in ("head", "kind", "rank_of_head")), *(e[k] for k in FIELDS))
        for e in entries
    ]
    return write(folder, c.study.name, content, columns=COLUMNS, rows=rows, draw=lambda file: draw(content, file))


STUDIES.register(
    Study(
        name="escape",
        summary="output rank of a run's heads of all kinds beside their loss; loss without bands of directions",
        figure="2510.24966",
        schema=Escape,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                15,
                "2510.24966",
                "output rank against loss for the heads of a run",
                (f"{STUDY} study=escape data=pile backbone=pythia-1b study.run=paper/figure6/3",),
                "under 0.05 h",
            ),
        ),
    )
)

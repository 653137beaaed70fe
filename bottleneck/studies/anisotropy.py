"""Fig. 2 and 3: how similar in direction the hidden states of each layer are: by layer, along training, by loss."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text, colours_for
from bottleneck.studies.shared.config import CheckpointKeys, StudyConfig, check_checkpoints
from bottleneck.studies.shared.figures import SIZES, SMALL, STUDY, Figure, models, pythia, visit_hours
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save, shades

log = logging.getLogger(__name__)
PLAIN = (
    "mean_cosine",
    "mean_cosine_centred",
    "mean_norm",
    "top_dimension",
    "top_dimension_share",
    "top_energy_share",
)
STRONGEST = (1, 5, 20)  # strongest dimensions that are left out, in the table
COLUMNS = (
    "model",
    "step",
    "layer",
    "layers",
    *PLAIN,
    "loss",
    "cone",
    *(f"mean_cosine_without_{k}" for k in STRONGEST),
    *(f"cone_without_{k}" for k in STRONGEST),
)
ISOTROPIC = 0.1  # mean cosine below which hidden states count as isotropic
OUTLIERS = 0.2  # share of the mean cosine that FEW dimensions must carry to be called outliers
FEW = 5


@dataclass(frozen=True)
class Anisotropy(CheckpointKeys):
    """Fig. 2 and 3: mean pairwise cosine of the hidden states of every layer, and the loss."""


def few_left_out(layer: dict[str, Any]) -> dict[str, Any] | None:
    """A layer's numbers without its FEW strongest dimensions, fewer if it is narrow; None if it is too narrow."""
    return next((x for x in reversed(layer["without_strongest"]) if x["k"] <= FEW), None)


def reading(layer: dict[str, Any]) -> str:
    """What makes a layer anisotropic: outlier dimensions, a cone (a direction shared by many dimensions), or both.

    A cone keeps its mean cosine when the strongest dimensions are left out; outlier dimensions take theirs with them.
    The centred cosine cannot tell them apart: it is near 0 for either.
    """
    cosine, few = layer["mean_cosine"], few_left_out(layer)
    if abs(cosine) < ISOTROPIC:
        return "almost isotropic"
    first, *_ = layer["strongest_dimensions"]
    said = [f"mean cosine {cosine:.2f}"]
    for x in layer["without_strongest"]:
        which = f"dimension {first}" if x["k"] == 1 else f"the {x['k']} strongest"
        if x["k"] <= FEW or _gone(cosine, x):
            said.append(f"{x['mean_cosine']:.2f} without {which}")
    said.append(f"norm of the mean {layer['cone']:.2f} of the RMS norm")
    return f"{', '.join(said)}: {_cause(cosine, few, layer['without_strongest'])}"


def _gone(cosine: float, left_out: dict[str, Any]) -> bool:
    """Whether nothing that could be a cone remains without the strongest dimensions."""
    return left_out["mean_cosine"] < min(ISOTROPIC, cosine / 2)


def _cause(cosine: float, few: dict[str, Any] | None, without: list[dict[str, Any]]) -> str:
    if few is None:
        return "too few dimensions to tell outlier dimensions from a cone"
    if any(_gone(cosine, x) for x in without):  # also where the outlier dimensions are more than FEW
        return "outlier dimensions, no cone"
    outliers = cosine - few["mean_cosine"] > OUTLIERS * cosine
    cone = few["mean_cosine"] >= ISOTROPIC or not outliers
    if outliers and cone:
        return "outlier dimensions and a cone"
    return "outlier dimensions, no cone" if outliers else "a cone, no outlier dimensions"


def draw(entries: list[dict[str, Any]], file: BinaryIO) -> None:
    """Left, Fig. 2: cosine by layer (dotted: without the strongest dimensions). Middle: mean norms. Right, Fig. 3:
    cosine of the last layer against the loss, along training or across models.
    """
    names = list(dict.fromkeys(e["model"] for e in entries))
    along = any(sum(e["model"] == m for e in entries) > 1 for m in names)
    figure, (left, middle, *rest) = canvas(3 if len(entries) > 1 else 2, width=5.0)
    for m, colour in zip(names, colours_for(len(names))):
        own = [e for e in entries if e["model"] == m]
        colours = shades(len(own)) if len(names) == 1 and along else [colour] * len(own)
        _by_layer(left, middle, own, colours, several=len(names) > 1 and along)
        for right in rest:
            x, y = [e["loss"] for e in own], [e["layers"][-1]["mean_cosine"] for e in own]
            right.plot(x, y, "-" if along else "", color="0.7", lw=0.8)
            for k in range(len(own)):
                right.plot(x[k], y[k], "o", ms=4, color=colours[k], label=as_text(m) if k == len(own) - 1 else None)
    left.set_ylabel(f"mean cosine of pairs (dotted: without the {FEW} strongest dimensions)", fontsize=8)
    middle.set(yscale="log", ylabel="mean norm |h|")
    for axes in (left, middle):
        axes.set_xlabel("depth: 0 embedding, 1 input of the head")
    left.legend(fontsize=7, frameon=False)
    for right in rest:
        right.set(xlabel="loss, nats a token", ylabel="mean cosine, last layer" + (", along training" if along else ""))
        right.invert_xaxis()  # so that training goes to the right
        right.legend(fontsize=7, frameon=False)
    save(figure, file)


def _by_layer(left: Any, middle: Any, own: list[dict[str, Any]], colours: list[Any], *, several: bool) -> None:
    """Lines of one model: all its checkpoints if they are few and alone, else the first, the middle and the last."""
    alone = not several and len(own) <= 8
    drawn = list(range(len(own))) if alone else sorted({0, len(own) // 2, len(own) - 1})
    for n, k in enumerate(drawn):
        e = own[k]
        depth = [x["layer"] / (len(e["layers"]) - 1) for x in e["layers"]]
        steps = ", ".join(str(own[j]["step"]) for j in drawn) if several else e["step"]
        name = e["model"] if e["step"] is None else f"{e['model']}, step {steps}"
        label = as_text(name) if not several or n == len(drawn) - 1 else None
        look = {"color": colours[k], "alpha": (n + 1) / len(drawn) if several else 1.0}  # early steps are pale
        left.plot(depth, [x["mean_cosine"] for x in e["layers"]], "o-", ms=2.5, lw=1.2, label=label, **look)
        few = [(z, few_left_out(x)) for z, x in zip(depth, e["layers"])]
        rest = [(z, x["mean_cosine"]) for z, x in few if x is not None]
        if rest:
            left.plot(*zip(*rest), ":", lw=1.1, **look)
        middle.plot(depth, [x["mean_norm"] for x in e["layers"]], "o-", ms=2.5, lw=1.2, **look)


def _row(entry: dict[str, Any], layer: dict[str, Any]) -> tuple[Any, ...]:
    fewer = {x["k"]: x for x in layer["without_strongest"]}
    left_out = [fewer.get(k, {}).get(name) for name in ("mean_cosine", "cone") for k in STRONGEST]
    place = (entry["model"], entry["step"], layer["layer"], len(entry["layers"]) - 1)
    return (*place, *(layer[k] for k in PLAIN), entry["loss"], layer["cone"], *left_out)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of anisotropy.json."""
    from bottleneck.studies.measure.anisotropy import measure  # here, so that --help loads no torch

    entries, about = measure(c, folder, STRONGEST)
    for e in entries:
        e["reading"] = reading(e["layers"][-1])
    for model, said in {e["model"]: e["reading"] for e in entries}.items():
        log.info("%s, last layer: %s", model, said)
    rows = [_row(e, x) for e in entries for x in e["layers"]]
    content = {**about, "checkpoints": entries}
    return write(folder, c.study.name, content, columns=COLUMNS, rows=rows, draw=lambda file: draw(entries, file))


FAMILIES = (
    tuple(f"openai-community/{n}" for n in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")),
    tuple(f"facebook/opt-{n}" for n in ("125m", "350m", "1.3b", "2.7b", "6.7b")),
    tuple(f"EleutherAI/pythia-{n}" for n in SIZES),
    ("google/gemma-2b",),
)
STUDIES.register(
    Study(
        name="anisotropy",
        summary="mean pairwise cosine of every layer, outlier dimensions or a cone, and the loss",
        figure="Fig. 2, 3",
        schema=Anisotropy,
        check=check_checkpoints,
        run=run,
        commands=(
            Figure(
                3,
                "Fig. 2",
                "anisotropy of every layer, one command for each family, since tokenizers differ",
                tuple(f"{STUDY} study=anisotropy data=pile data.block_size=1024 {models(f)}" for f in FAMILIES),
                "0.1 h, computed: 20 models, 80 GB to download",
            ),
            Figure(
                4,
                "Fig. 3",
                "anisotropy along training",
                (
                    f"{STUDY} study=anisotropy data=pile study.steps=pythia {pythia(SMALL)} "
                    "hydra.run.dir=paper/anisotropy",
                ),
                visit_hours(SMALL),
            ),
        ),
    )
)

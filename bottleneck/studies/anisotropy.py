"""Fig. 2 and 3: how much the hidden states of each layer point one way, by layer, along training, and beside the loss.

Dims: N sequences, T sequence length, D hidden size, L layers.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, BinaryIO, Iterator

import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.evaluation.sums import full_head_loss
from bottleneck.losses.chunked import chunk_rows
from bottleneck.results.picture import as_text
from bottleneck.studies.config import StudyConfig
from bottleneck.studies.cosines import Cosines
from bottleneck.studies.output import Parts, Steps, canvas, save, shades, write
from bottleneck.studies.series import check_same_shapes, checkpoints, device_of, say_memory, visit
from bottleneck.studies.text import StudyText, study_text

log = logging.getLogger(__name__)
COLUMNS = (
    "model",
    "step",
    "layer",
    "layers",
    "mean_cosine",
    "mean_cosine_centred",
    "mean_norm",
    "top_dimension",
    "top_dimension_share",
    "top_energy_share",
    "loss",
)
OUTLIER = 0.5  # share of the mean cosine from which one dimension is called its cause


@torch.no_grad()
def layer_states(backbone: Backbone, ids_NT: Tensor) -> tuple[Tensor, ...]:
    """Hidden states [N, T, D] after the embedding and after each layer, the last one after the final norm: what the head gets."""
    out = backbone.body(input_ids=ids_NT, use_cache=False, output_hidden_states=True)
    return (*out.hidden_states[:-1], out.last_hidden_state)  # OPT-350m projects the last ones to another width


def layers(backbone: Backbone, text: StudyText, micro_batch: int, steps: Steps) -> dict[str, Any]:
    """Anisotropy of every layer over the positions that predict a token, and the loss of the own head on the same tokens.

    The text is read twice: centred cosines need the mean first, and keeping all layers' states would take L·n·D numbers.

    Returns: `layers`, from the embedding (0) to the last, and `loss` in nats a token.
    """
    device = backbone.lm_head.weight.device

    def states(offset: float) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        done = 0
        for inputs, targets in text.batches(micro_batch):
            y = targets.to(device).flatten()
            keep = y != IGNORE
            yield tuple(h.flatten(0, 1)[keep] for h in layer_states(backbone, inputs.to(device))), y[keep]
            done += len(inputs)
            steps.at(offset + 0.5 * done / len(text))

    plain: list[Cosines] = []
    loss = tokens = 0.0
    for hidden, y in states(0.0):
        plain = plain or [Cosines.empty(h.shape[1], device) for h in hidden]
        for sums, h in zip(plain, hidden):
            sums.add(h)
        loss += full_head_loss(hidden[-1], backbone.head, y, IGNORE).item()
        tokens += len(y)
    centred = [Cosines.empty(len(sums.sum_D), device, sums.mean_D) for sums in plain]
    for hidden, _ in states(0.5):
        for sums, h in zip(centred, hidden):
            sums.add(h)
    out = []
    for i, (a, b) in enumerate(zip(plain, centred)):
        index, share = a.top_dimension
        out.append(
            {
                "layer": i,
                "mean_cosine": a.mean_cosine,
                "mean_cosine_centred": b.mean_cosine,
                "mean_norm": a.mean_norm,
                "top_dimension": index,
                "top_dimension_share": share,
                "top_energy_share": a.top_energy,
                "zero_vectors": a.zeros,
            }
        )
    return {"layers": out, "loss": loss / tokens}


def measure(c: StudyConfig, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every checkpoint on the same tokens. Returns: one entry a checkpoint; what was measured on."""
    series = checkpoints(c)
    shapes = check_same_shapes(series)
    device = device_of(c)
    text = study_text(c, series)
    width, vocabulary = max(shapes.values(), key=lambda shape: shape[1])
    # the states of all layers of a micro-batch: 64 layers at most in the families that are known
    held = c.trainer.micro_batch_size * text.block * width * (64 + 24)
    say_memory(series, device, 4 * held + 12 * chunk_rows(vocabulary, device.type) * vocabulary)
    parts = Parts(folder, c.study.name, {**text.identity, "dtype": c.backbone.dtype})
    out = []
    with Steps(len(series), c.trainer.progress) as steps:
        for cp in series:
            steps.begin(cp.label)
            part = parts.get(cp.key)
            kept = part is not None
            if part is None:
                part = visit(
                    cp, device, shapes, lambda backbone: layers(backbone, text, c.trainer.micro_batch_size, steps)
                )
                check(math.isfinite(part["loss"]), f"{cp.where}: its loss is not a number; are its weights whole?")
                part = parts.put(cp.key, part)
            out.append({"model": cp.model, "step": cp.step, **part})
            last = part["layers"][-1]
            steps.end(
                f"mean cosine of the last layer {last['mean_cosine']:.3f} (centred {last['mean_cosine_centred']:.3f}), loss {part['loss']:.4f}",
                kept,
            )
    return out, {"data": text.corpus.name, "tokens": text.tokens, "block_size": text.block}


def reading(last: dict[str, Any]) -> str:
    """What makes a layer anisotropic: nothing, one outlier dimension, or a common direction of many (a cone)."""
    if abs(last["mean_cosine"]) < 0.1:
        return "almost isotropic"
    kind = (
        f"one dimension ({last['top_dimension']})"
        if last["top_dimension_share"] > OUTLIER
        else "a common direction of many dimensions"
    )
    return f"mean cosine {last['mean_cosine']:.2f}, {100 * last['top_dimension_share']:.0f} % of it from its first dimension: {kind}"


def draw(entries: list[dict[str, Any]], file: BinaryIO) -> None:
    """Left, Fig. 2: by layer (dashed: centred). Middle: mean norms. Right, Fig. 3: last layer against loss, along training
    or across models."""
    models = list(dict.fromkeys(e["model"] for e in entries))
    along = any(sum(e["model"] == m for e in entries) > 1 for m in models)
    figure, (left, middle, *rest) = canvas(3 if len(entries) > 1 else 2, width=5.0)
    for i, m in enumerate(models):
        own = [e for e in entries if e["model"] == m]
        colours = shades(len(own)) if len(models) == 1 and along else [f"C{i % 10}"] * len(own)
        several = len(models) > 1 and along
        drawn = range(len(own)) if len(models) == 1 and len(own) <= 8 else sorted({0, len(own) // 2, len(own) - 1})
        for n, k in enumerate(drawn):
            e = own[k]
            depth = [x["layer"] / (len(e["layers"]) - 1) for x in e["layers"]]
            steps = ", ".join(str(own[j]["step"]) for j in drawn) if several else e["step"]
            name = m if e["step"] is None else f"{m}, step {steps}"
            look = {"color": colours[k], "alpha": (n + 1) / len(drawn) if several else 1.0}  # early steps are pale
            left.plot(
                depth,
                [x["mean_cosine"] for x in e["layers"]],
                "o-",
                ms=2.5,
                lw=1.2,
                **look,
                label=as_text(name) if not several or n == len(drawn) - 1 else None,
            )
            left.plot(depth, [x["mean_cosine_centred"] for x in e["layers"]], "--", lw=0.9, **look)
            middle.plot(depth, [x["mean_norm"] for x in e["layers"]], "o-", ms=2.5, lw=1.2, **look)
        for right in rest:
            x, y = [e["loss"] for e in own], [e["layers"][-1]["mean_cosine"] for e in own]
            right.plot(x, y, "-" if along else "", color="0.7", lw=0.8)
            for k, e in enumerate(own):
                right.plot(x[k], y[k], "o", ms=4, color=colours[k], label=as_text(m) if k == len(own) - 1 else None)
    left.set_ylabel("mean cosine of pairs (dashed: centred)")
    middle.set(yscale="log", ylabel="mean norm |h|")
    for axes in (left, middle):
        axes.set_xlabel("depth: 0 embedding, 1 what the head receives")
    left.legend(fontsize=7, frameon=False)
    for right in rest:
        right.set(xlabel="loss, nats a token", ylabel="mean cosine, last layer" + (", along training" if along else ""))
        right.invert_xaxis()  # training goes to the right
        right.legend(fontsize=7, frameon=False)
    save(figure, file)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The study. Returns: the content of anisotropy.json."""
    entries, about = measure(c, folder)
    for e in entries:
        e["reading"] = reading(e["layers"][-1])
    for model, said in {e["model"]: e["reading"] for e in entries}.items():
        log.info("%s, last layer: %s", model, said)
    rows = [
        (
            e["model"],
            e["step"],
            x["layer"],
            len(e["layers"]) - 1,
            x["mean_cosine"],
            x["mean_cosine_centred"],
            x["mean_norm"],
            x["top_dimension"],
            x["top_dimension_share"],
            x["top_energy_share"],
            e["loss"],
        )
        for e in entries
        for x in e["layers"]
    ]
    return write(
        folder, c.study.name, {**about, "checkpoints": entries}, COLUMNS, rows, lambda file: draw(entries, file)
    )

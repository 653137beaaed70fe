"""Mean pairwise cosine of the hidden states of every layer.

Dims: N sequences, T sequence length, D hidden size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.evaluation.sums import full_head_loss
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.cosines import Cosines, without
from bottleneck.studies.shared.config import StudyConfig
from bottleneck.studies.shared.loading import device_of, log_memory, visit
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import check_same_shapes, checkpoints
from bottleneck.studies.shared.text import StudyText, study_text

NARROWEST = 8  # times as many dimensions a layer must have


@torch.no_grad()
def layer_states(backbone: Backbone, ids_NT: Tensor) -> tuple[Tensor, ...]:
    """Hidden states [N, T, D] after the embedding and after each layer; the last ones after the final norm, as the
    head sees.

    Raises: UserError for a family that does not return its layers' hidden states.
    """
    out = backbone.body(input_ids=ids_NT, use_cache=False, output_hidden_states=True)
    hidden = getattr(out, "hidden_states", None)
    check(hidden is not None, f"backbone {backbone.name}: its family does not return the hidden states of its layers")
    assert hidden is not None
    return (*hidden[:-1], out.last_hidden_state)  # OPT-350m projects the last ones to another width


def layers(
    backbone: Backbone, text: StudyText, *, micro_batch: int, strongest: tuple[int, ...], progress: StudyProgress
) -> dict[str, Any]:
    """Anisotropy of every layer over the positions that predict a token, and the original head's loss on the same
    tokens.

    The text is read twice, since centring needs the mean first and storing the states of all layers takes L·n·D
    numbers.

    Args:
        strongest: so many of the strongest dimensions are left out of further cosines.
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
            progress.at(offset + 0.5 * done / len(text))

    raw: list[Cosines] = []
    loss = tokens = 0.0
    for hidden, y in states(0.0):
        raw = raw or [Cosines.empty(h.shape[1], device) for h in hidden]
        for sums, h in zip(raw, hidden):
            sums.add(h)
        loss += full_head_loss(hidden[-1], backbone.head, y, IGNORE).item()
        tokens += len(y)
    centred = [Cosines.empty(len(sums.sum_D), device, sums.mean_D) for sums in raw]
    fewer = [{k: without(sums, k) for k in strongest if NARROWEST * k <= len(sums.sum_D)} for sums in raw]
    for hidden, _ in states(0.5):
        for i, h in enumerate(hidden):
            for sums in (centred[i], *fewer[i].values()):
                sums.add(h)
    return {"layers": [_layer(i, *parts) for i, parts in enumerate(zip(raw, centred, fewer))], "loss": loss / tokens}


def _layer(index: int, raw: Cosines, centred: Cosines, fewer: dict[int, Cosines]) -> dict[str, Any]:
    top, share = raw.top_dimension
    return {
        "layer": index,
        "mean_cosine": raw.mean_cosine,
        "mean_cosine_centred": centred.mean_cosine,
        "mean_norm": raw.mean_norm,
        "top_dimension": top,
        "top_dimension_share": share,
        "top_energy_share": raw.top_energy,
        "zero_vectors": raw.zeros,
        "cone": raw.cone,
        "strongest_dimensions": raw.strongest(max(fewer, default=1)).tolist(),
        "without_strongest": [{"k": k, "mean_cosine": s.mean_cosine, "cone": s.cone} for k, s in fewer.items()],
    }


def measure(c: StudyConfig, folder: Path, strongest: tuple[int, ...]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Visit every checkpoint on the same tokens.

    Returns: one entry for each checkpoint; the text that was measured on.
    """
    series = checkpoints(c)
    shapes = check_same_shapes(series)
    device = device_of(c)
    text = study_text(c, series)
    width, vocabulary = max(shapes.values(), key=lambda shape: shape[1])
    micro_batch = c.trainer.micro_batch_size
    # the states of all layers of a micro-batch: at most 64 layers in the families that are known
    held = micro_batch * text.block * width * (64 + 24)
    log_memory(series, device, 4 * held + 12 * chunk_rows(vocabulary, device.type) * vocabulary)
    settings = {**text.identity, "dtype": c.backbone.dtype, "strongest": strongest}
    parts = PartialResults(folder, c.study.name, settings)

    def one(backbone: Backbone) -> dict[str, Any]:
        return layers(backbone, text, micro_batch=micro_batch, strongest=strongest, progress=progress)

    out = []
    with StudyProgress(len(series), c.trainer.progress) as progress:
        for cp in series:
            progress.begin(cp.label)
            part = parts.get(cp.key)
            kept = part is not None
            if part is None:
                part = visit(cp, device, shapes, one)
                check(math.isfinite(part["loss"]), f"{cp.where}: its loss is not a number; are its weights damaged?")
                part = parts.put(cp.key, part)
            out.append({"model": cp.model, "step": cp.step, **part})
            last = part["layers"][-1]
            cosines = f"{last['mean_cosine']:.3f} (centred {last['mean_cosine_centred']:.3f})"
            progress.end(f"mean cosine of the last layer {cosines}, loss {part['loss']:.4f}", kept)
    return out, {"data": text.corpus.name, "tokens": text.tokens, "block_size": text.block}

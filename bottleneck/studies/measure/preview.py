"""Positions of the original head's arg-max in low-rank previews, over a text.

Dims: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.previews import Factors, positions, summary, whitened
from bottleneck.studies.measure.estimate import Calibrated, on_device, start_heads
from bottleneck.studies.shared.config import StudyConfig, ranks_of
from bottleneck.studies.shared.loading import device_of, loaded, log_memory
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import check_same_shapes, one_checkpoint
from bottleneck.studies.shared.text import StudyText, study_text


def previews(weighting: str, ranks: list[int], calibrated: Calibrated) -> list[Factors]:
    """Previews of every rank: `whitened`, or a closed-form start; float32 on the backbone's device."""
    if weighting != "whitened":
        return start_heads(weighting, ranks, calibrated)
    head = calibrated.backbone.head
    return on_device(whitened(head.W_VD.float() * head.scale, calibrated.moments, ranks), head.W_VD.device)


def hidden_states(backbone: Backbone, text: StudyText, micro_batch: int, progress: StudyProgress) -> Tensor:
    """Hidden states [N, D] of the positions that predict a token."""
    device, found, done = backbone.lm_head.weight.device, [], 0
    for inputs, targets in text.batches(micro_batch):
        found.append(backbone(inputs.to(device))[targets.to(device) != IGNORE])
        done += len(inputs)
        progress.at(done / len(text))
    return torch.cat(found)


def measure(c: StudyConfig, folder: Path, quantiles: tuple[float, ...]) -> dict[str, Any]:
    """Every weighting at every rank: the content of preview.json."""
    s = c.study
    cp = one_checkpoint(c)
    shapes = check_same_shapes([cp])
    (width, vocabulary), device = shapes[cp.model], device_of(c)
    ranks = ranks_of(s.ranks, width)
    tops = [k for k in s.top if k <= vocabulary]
    check(len(tops) == len(s.top), f"study.top={s.top}: must be at most the vocabulary size, {vocabulary}")
    text = study_text(c, [cp])
    work = 4 * 8 * vocabulary * width + 4 * (s.calibration_tokens + text.tokens) * width
    log_memory([cp], device, work + 12 * chunk_rows(vocabulary, device.type) * vocabulary)
    settings = {
        "ranks": ranks,
        "top": tops,
        "calibration_tokens": s.calibration_tokens,
        "data_seed": c.data.seed,
        "dtype": c.backbone.dtype,
    }
    parts = PartialResults(folder, s.name, {**text.identity, **settings})
    rows: list[dict[str, Any]] = []
    unit = "weighting"
    with StudyProgress(len(s.weightings), c.trainer.progress, unit) as progress, loaded(cp, device, shapes) as backbone:
        calibrated = Calibrated(c, cp, backbone, text)
        hidden: list[Tensor] = []
        for weighting in s.weightings:
            progress.begin(weighting)
            key = f"{weighting} {backbone.hash}"
            part = parts.get(key)
            kept = part is not None
            if part is None:
                heads = previews(weighting, ranks, calibrated)
                hidden = hidden or [hidden_states(backbone, text, c.trainer.micro_batch_size, progress)]
                finite = bool(torch.isfinite(hidden[0]).all())
                check(finite, f"{cp.where}: its hidden states are not numbers; are its weights damaged?")
                found = positions(heads, hidden[0], backbone.head)
                part = parts.put(key, {"ranks": [summary(p, tops, quantiles) for p in found]})
            numbers = part["ranks"]
            rows += [{"weighting": weighting, "rank": r, **m} for r, m in zip(ranks, numbers)]
            progress.end(f"in the top {tops[-1]} at rank {ranks[0]}: {numbers[0]['shares'][-1]:.4f}", kept)
        about = {"backbone": backbone.name, "backbone_hash": backbone.hash}
    for row in rows:
        row["numbers_read"] = row["rank"] * (vocabulary + width) / (vocabulary * width)
    return {
        **about,
        "hidden_size": width,
        "vocab_size": vocabulary,
        "data": text.corpus.name,
        "tokens": text.tokens,
        "top": tops,
        "quantiles": list(quantiles),
        "previews": rows,
    }

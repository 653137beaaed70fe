"""Loss of every checkpoint on the same text, block by block.

Dims: N sequences, T tokens predicted per sequence.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.evaluation.sums import full_head_loss
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.statistics import block_mean
from bottleneck.studies.shared.config import StudyConfig
from bottleneck.studies.shared.loading import device_of, log_memory, visit
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import check_same_shapes, checkpoints
from bottleneck.studies.shared.text import StudyText, study_text


@torch.no_grad()
def block_losses(backbone: Backbone, text: StudyText, micro_batch: int, progress: StudyProgress) -> dict[str, Any]:
    """Losses of the original head on every block of the text.

    Returns: `sums`, the summed loss in nats, and `counts`, the number of predicted tokens, of each block; and the
        model's number of `parameters`, tied ones counted once.
    """
    device = backbone.lm_head.weight.device
    sums, counts = [], []
    for inputs, targets in text.batches(micro_batch):
        h_NTD = backbone(inputs.to(device))
        for h, y in zip(h_NTD, targets.to(device)):
            sums.append(full_head_loss(h, backbone.head, y, IGNORE).item())
            counts.append(int((y != IGNORE).sum()))
        progress.at(len(sums) / len(text))
    return {"parameters": sum(p.numel() for p in backbone.parameters()), "sums": sums, "counts": counts}


def measure(c: StudyConfig, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run every checkpoint on the same tokens.

    Returns: models as `saturation.read_losses` gives them, with sums by block; the text that was measured on.
    """
    series = checkpoints(c)
    shapes = check_same_shapes(series)
    device = device_of(c)
    text = study_text(c, series)
    micro_batch = c.trainer.micro_batch_size
    width, vocabulary = max(shapes.values(), key=lambda shape: shape[1])
    rows = chunk_rows(vocabulary, device.type)
    log_memory(series, device, 4 * (micro_batch * text.block * 24 * width + 3 * rows * vocabulary))
    parts = PartialResults(folder, c.study.name, {**text.identity, "dtype": c.backbone.dtype})
    models: dict[str, dict[str, Any]] = {}
    with StudyProgress(len(series), c.trainer.progress) as progress:
        for cp in series:
            progress.begin(cp.label)
            part = parts.get(cp.key)
            kept = part is not None
            if part is None:
                part = visit(cp, device, shapes, lambda b: block_losses(b, text, micro_batch, progress))
                finite = all(map(math.isfinite, part["sums"]))
                check(finite, f"{cp.where}: its loss is not a number; are its weights damaged?")
                part = parts.put(cp.key, part)
            loss, error = block_mean(part["sums"], part["counts"])
            empty = {"model": cp.model, "parameters": part["parameters"], "checkpoints": []}
            point = {
                "step": cp.step,
                "tokens": (cp.step or 0) * c.study.tokens_per_step,
                "loss": loss,
                "stderr": error,
                "sums": part["sums"],
                "counts": part["counts"],
            }
            models.setdefault(cp.model, empty)["checkpoints"].append(point)
            progress.end(f"loss {loss:.4f} ± {error:.4f}", kept)
    return list(models.values()), {"data": text.corpus.name, "tokens": text.tokens, "block_size": text.block}

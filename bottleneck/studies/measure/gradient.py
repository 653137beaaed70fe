"""The share of the logit gradient that the original head and low-rank heads pass on, over a text.

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.evaluation.agreement import band_names, bands_of
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.reach import Reach
from bottleneck.studies.measure.estimate import Calibrated, Factors, start_heads
from bottleneck.studies.shared.config import StudyConfig, ranks_of
from bottleneck.studies.shared.loading import device_of, loaded, log_memory
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import check_same_shapes, one_checkpoint
from bottleneck.studies.shared.text import StudyText, study_text

log = logging.getLogger(__name__)


def measure_heads(
    heads: list[Factors], backbone: Backbone, text: StudyText, micro_batch: int, progress: StudyProgress
) -> tuple[list[Reach], list[int]]:
    """Measure the original head and low-rank ones with one pass of the backbone.

    Returns: the original head's sums, then those of the low-rank heads; the targets in order.
    """
    W, device = backbone.head.W_VD.detach().float() * backbone.head.scale, backbone.lm_head.weight.device
    bands = bands_of(text.corpus.train, len(W)).to(device)
    found = [Reach(W, len(band_names())), *(Reach(A, len(band_names()), B) for A, B in heads)]
    rows, done, goals = chunk_rows(len(W), device.type), 0, []
    for inputs, targets in text.batches(micro_batch):
        y = targets.to(device).flatten()
        keep = y != IGNORE
        hidden, y = backbone(inputs.to(device)).flatten(0, 1)[keep], y[keep]
        for h, y_n in zip(hidden.split(rows), y.split(rows)):
            found[0].add(torch.softmax(backbone.head.float_logits(h), -1), y_n, bands[y_n])
            for (A, B), reach in zip(heads, found[1:]):
                logits = (h.float() @ B.T) @ A.T
                reach.add(torch.softmax(logits, -1), y_n, bands[y_n])
        goals += y.tolist()
        done += len(inputs)
        progress.at(done / len(text))
    return found, goals


def measure(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The content of gradient.json, with the shares of every token."""
    s = c.study
    cp = one_checkpoint(c)
    shapes = check_same_shapes([cp])
    (width, vocabulary), device = shapes[cp.model], device_of(c)
    ranks = ranks_of(s.ranks, width)
    text = study_text(c, [cp])
    # chunks of logits; a closed form's float64 matrices as large as W; A and Q of every rank; sums of D x D
    work = 16 * chunk_rows(vocabulary, device.type) * vocabulary + 3 * 8 * vocabulary * width
    log_memory([cp], device, work + 8 * sum(ranks) * vocabulary + 16 * width * width)
    identity = {
        "ranks": ranks,
        "init": s.init,
        "calibration_tokens": s.calibration_tokens,
        "data_seed": c.data.seed,
        "dtype": c.backbone.dtype,
    }
    parts = PartialResults(folder, s.name, {**text.identity, **identity})
    with StudyProgress(1, c.trainer.progress, "pass") as progress, loaded(cp, device, shapes) as backbone:
        _check_head(backbone, cp.where)
        progress.begin(cp.label)

        def compute() -> dict[str, Any]:
            heads = start_heads(s.init, ranks, Calibrated(c, cp, backbone, text))
            reached, goals = measure_heads(heads, backbone, text, c.trainer.micro_batch_size, progress)
            full, *low = (r.result for r in reached)
            return {"targets": goals, "full": full, "heads": [{"rank_of_head": r, **m} for r, m in zip(ranks, low)]}

        part, kept = parts.get_or(backbone.hash, compute)
        share = part["full"]["share"]
        finite = share is not None and math.isfinite(share)
        check(finite, f"{cp.where}: its gradients are not numbers; are its weights damaged?")
        progress.end(f"the original head passes on {100 * share:.1f} %", kept)
        about = {**text.read_by(backbone), "tokens": text.tokens}
    return {**about, "init": s.init, "band_names": band_names(), **part}


def _check_head(backbone: Backbone, where: str) -> None:
    bias = backbone.head.bias_V
    check(bias is None or bool(torch.isfinite(bias).all()), f"{where}: its head's bias is not a number")
    if backbone.head.softcap is not None:
        log.warning("%s: its head has a soft cap; the gradient is taken before it", backbone.name)

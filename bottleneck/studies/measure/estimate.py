"""Start heads of every rank without training and evaluate them.

Dims: N sequences, T tokens of a sequence, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from pathlib import Path
from typing import Any, Iterable, Optional, Sequence

import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.heads.calibration import Calibration, calibrate
from bottleneck.heads.key import HeadKey
from bottleneck.heads.starting import make_start
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.agreement import Agreement
from bottleneck.studies.shared.config import StudyConfig, ranks_of
from bottleneck.studies.shared.loading import check_moments, device_of, loaded, log_memory
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import Checkpoint, check_same_shapes, one_checkpoint
from bottleneck.studies.shared.text import StudyText, study_text
from bottleneck.studies.shared.trained import Trained, read_trained, with_trained

log = logging.getLogger(__name__)
Factors = tuple[Tensor, Tensor]  # A [V, R], B [R, D]


class Calibrated:
    """Hidden states [N, T, D] of the calibration tokens and their moments, computed when they are first needed."""

    def __init__(self, c: StudyConfig, cp: Checkpoint, backbone: Backbone, text: StudyText):
        self.c, self.cp, self.backbone, self.text = c, cp, backbone, text
        self.hidden: list[Tensor] = []
        self._moments: Optional[Calibration] = None

    @property
    def moments(self) -> Calibration:
        """Raises: UserError if the hidden states are not finite."""
        if self._moments is None:
            device = self.backbone.lm_head.weight.device
            ids = self.text.calibration(self.c.study.calibration_tokens, self.c.data.seed)
            pieces = ids.split(self.c.trainer.micro_batch_size)
            self.hidden = [self.backbone(b[:, :-1].to(device)) for b in pieces]
            self._moments = calibrate(self.hidden, self.backbone.head)
            check_moments(self.cp, self._moments)
        return self._moments


def start_heads(
    init: str, ranks: Iterable[int], calibrated: Calibrated, *, seed: int = 0, passes: int = 2
) -> list[Factors]:
    """Factors of every rank for one `head.init`, as train.py starts them; float32 on the backbone's device."""
    head, moments = calibrated.backbone.head, calibrated.moments
    keys = [HeadKey(r, 1.0, seed) for r in ranks]
    start = make_start(init, head, moments, hidden=calibrated.hidden, keys=keys, options={"passes": passes})
    return on_device([start(key) for key in keys], head.W_VD.device)


def on_device(heads: Sequence[Factors], device: torch.device) -> list[Factors]:
    """The factors as float32 on a device.

    If all heads are slices of one matrix, as closed forms are, one copy is held.
    """
    widest = max(heads, key=lambda pair: pair[0].shape[1])
    places = {A.untyped_storage().data_ptr() for A, _ in heads} | {widest[0].untyped_storage().data_ptr()}
    if len(places) > 1:
        return [(A.to(device, torch.float32), B.to(device, torch.float32)) for A, B in heads]
    A, B = (x.to(device, torch.float32) for x in widest)
    return [(A[:, : b.shape[0]], B[: b.shape[0]]) for _, b in heads]


def evaluate_starts(
    heads: list[Factors], backbone: Backbone, text: StudyText, micro_batch: int, progress: StudyProgress
) -> Agreement:
    """Evaluate all heads on the text with one pass of the backbone."""
    device = backbone.lm_head.weight.device
    result, done = Agreement(heads), 0
    for inputs, targets in text.batches(micro_batch):
        y = targets.to(device).flatten()
        keep = y != IGNORE
        result.add(backbone(inputs.to(device)).flatten(0, 1)[keep], y[keep], backbone.head)
        done += len(inputs)
        progress.at(done / len(text))
    return result


def measure(c: StudyConfig, folder: Path) -> tuple[dict[str, Any], Optional[Trained]]:
    """Evaluate every start at every rank. Returns: the content of estimate.json so far, and the trained curve."""
    s = c.study
    cp = one_checkpoint(c)
    shapes = check_same_shapes([cp])
    (width, vocabulary), device = shapes[cp.model], device_of(c)
    ranks = ranks_of(s.ranks, width)
    text = study_text(c, [cp])
    # closed forms: three float64 matrices as large as W; refined: four copies of A of every rank
    work = 3 * 8 * vocabulary * width + 16 * sum(ranks) * vocabulary + 4 * s.calibration_tokens * width
    log_memory([cp], device, work + 24 * chunk_rows(vocabulary, device.type) * vocabulary)
    settings = {
        "calibration_tokens": s.calibration_tokens,
        "passes": s.passes,
        "seed": s.seed,
        "data_seed": c.data.seed,
        "dtype": c.backbone.dtype,
    }
    heads: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    with loaded(cp, device, shapes) as backbone:
        trained = read_trained(s.curve, "study.curve", backbone.name, backbone.hash) if s.curve else None
        ranks = with_trained(ranks, trained, width)
        parts = PartialResults(folder, s.name, {**text.identity, **settings, "ranks": ranks})
        if not backbone.head.plain:
            said = (
                "%s: its head has a bias, a scale or a cap; bias and cap have no low-rank form and are left out of it"
            )
            log.warning(said, backbone.name)
        calibrated = Calibrated(c, cp, backbone, text)
        with StudyProgress(len(s.inits), c.trainer.progress, "start") as progress:
            for init in s.inits:
                progress.begin(init)
                compute = functools.partial(_one, init, ranks, calibrated, progress)
                part, kept = parts.get_or(f"{init} {backbone.hash}", compute)
                finite = math.isfinite(part["full_loss"] or math.nan)
                check(finite, f"{cp.where}: its loss is not a number; are its weights damaged?")
                heads += part["heads"]
                about = {"loss": part["full_loss"], "perplexity": math.exp(part["full_loss"])}
                shown = [f"{h['perplexity']:.4g}" for h in part["heads"] if h["perplexity"]]
                progress.end(", ".join(shown) or "no finite perplexity", kept)
        content = {
            **text.read_by(backbone),
            "tokens": text.tokens,
            "calibration_tokens": s.calibration_tokens,
            "reference": about,
            "heads": heads,
        }
    return content, trained


def _one(init: str, ranks: list[int], calibrated: Calibrated, progress: StudyProgress) -> dict[str, Any]:
    """All ranks of one start."""
    began = time.monotonic()
    c, backbone = calibrated.c, calibrated.backbone
    started = start_heads(init, ranks, calibrated, seed=c.study.seed, passes=c.study.passes)
    result = evaluate_starts(started, backbone, calibrated.text, c.trainer.micro_batch_size, progress)
    size = backbone.vocab_size + backbone.hidden_size
    rows = [{"init": init, "rank": r, "parameters": r * size, **m} for r, m in zip(ranks, result.means)]
    return {"heads": rows, "full_loss": result.full_loss, "seconds": time.monotonic() - began}

"""Tails and bounds of a backbone's head, and what low-rank heads cost on the study's text.

Dims: D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Optional

import torch

from bottleneck.backbone.model import Backbone, FullHead
from bottleneck.data.module import IGNORE
from bottleneck.heads.calibration import calibrate
from bottleneck.heads.key import HeadKey
from bottleneck.heads.starting import make_start
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.expansion import expansion, slope, theory_tails, truncated
from bottleneck.studies.formulas.singular import ROWS
from bottleneck.studies.shared.config import StudyConfig, ranks_of
from bottleneck.studies.shared.loading import check_moments, device_of, loaded, log_memory
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import Checkpoint, check_same_shapes, one_checkpoint
from bottleneck.studies.shared.text import StudyText, study_text
from bottleneck.studies.shared.trained import Trained, read_trained, with_trained

log = logging.getLogger(__name__)


def measure(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Tails, bounds, the KL of truncated and Fisher-weighted heads, and the trained heads' gaps: the content of
    theory.json.
    """
    s = c.study
    cp = one_checkpoint(c)
    shapes = check_same_shapes([cp])
    (width, vocabulary), device = shapes[cp.model], device_of(c)
    text = study_text(c, [cp])
    work = 4 * 8 * vocabulary * width + 8 * (min(ROWS, vocabulary) + 8 * width) * width + 4 * text.tokens * width
    log_memory([cp], device, work + 24 * chunk_rows(vocabulary, device.type) * vocabulary)
    with loaded(cp, device, shapes) as backbone:
        trained = read_trained(s.curve, "study.curve", backbone.name, backbone.hash) if s.curve else None
        ranks = with_trained(ranks_of(s.ranks, width), trained, width)
        identity = {**text.identity, "ranks": ranks, "dtype": c.backbone.dtype, "expansion": "per context"}
        parts = PartialResults(folder, s.name, identity)
        if backbone.head.bias_V is not None or backbone.head.softcap is not None:
            log.warning("%s: the bias and cap of its head are left out, here and in the measured KL", backbone.name)
        with StudyProgress(1, c.trainer.progress, "backbone") as progress:
            progress.begin(cp.label)
            part, kept = parts.get_or(
                f"{cp.label} {backbone.hash}", lambda: _numbers(c, cp, backbone, text, ranks=ranks, progress=progress)
            )
            kl, bound = part["kl"][0], part["bound"][ranks[0]]
            progress.end(f"KL of the truncated head of rank {ranks[0]}: {kl:.4g}, bound {bound:.4g}", kept)
        rows = _rows(part, ranks, trained, math.log(vocabulary) - part["entropy"])
        about = {**text.read_by(backbone), "tokens": text.tokens}
    described = ("data", "tokens", "reference", "own")
    tail = [row["tail_weighted"] for row in rows]
    gaps = ("kl_truncated", "kl_fisher", "trained_gap")
    return {
        **about,
        "trained": trained and {name: getattr(trained, name) for name in described},
        "trivial_bound": math.log(vocabulary) - part["entropy"],
        "slopes": {name: slope(tail, [row[name] or 0.0 for row in rows]) for name in gaps},
        "ranks": rows,
        "tails": {k: part[k] for k in ("head", "weighted", "surrogate")},
    }


def _numbers(
    c: StudyConfig, cp: Checkpoint, backbone: Backbone, text: StudyText, *, ranks: list[int], progress: StudyProgress
) -> dict[str, Any]:
    """Tails by rank, and KL and second-order terms of the truncated and the Fisher-weighted heads."""
    device = backbone.lm_head.weight.device
    # the theory is about softmax(W h): a bias or a cap has no place in it
    head = FullHead(backbone.head.W_VD.detach().float() * backbone.head.scale)
    hidden, done = [], 0
    for inputs, targets in text.batches(c.trainer.micro_batch_size):
        hidden.append(backbone(inputs.to(device))[targets.to(device) != IGNORE].float())
        done += len(inputs)
        progress.at(0.4 * done / len(text))
    moments = calibrate(hidden, head)
    check_moments(cp, moments)
    t = theory_tails(head.W_VD, moments)
    progress.at(0.5)
    h_ND = torch.cat(hidden)
    svd = expansion(truncated(head.W_VD, moments, ranks), h_ND, head)
    progress.at(0.75)
    start = make_start("fisher", head, moments)
    fisher = expansion([start(HeadKey(r, 1.0, 0)) for r in ranks], h_ND, head)
    return {
        **{k: getattr(t, k).tolist() for k in vars(t)},
        "kl": svd.kl,
        "second_order": svd.second_order,
        "kl_fisher": fisher.kl,
        "second_order_fisher": fisher.second_order,
        "entropy": svd.entropy,
    }


def _rows(part: dict[str, Any], ranks: list[int], trained: Optional[Trained], trivial: float) -> list[dict[str, Any]]:
    rows = []
    for i, r in enumerate(ranks):
        loss = trained.losses.get(r) if trained else None
        kl, bound = part["kl"][i], part["bound"][r]
        rows.append(
            {
                "rank": r,
                "tail_head": part["head"][r],
                "tail_weighted": part["weighted"][r],
                "bound": bound,
                "bound_head": part["bound_head"][r],
                "surrogate": part["surrogate"][r],
                "kl_truncated": kl,
                "trained_loss": loss,
                "trained_gap": None if trained is None or loss is None else loss - trained.reference,
                "bound_capped": min(bound, trivial),
                "bound_ratio": bound / kl if kl > 1e-6 else None,
                "second_order_truncated": part["second_order"][i],
                "kl_fisher": part["kl_fisher"][i],
                "second_order_fisher": part["second_order_fisher"][i],
            }
        )
    return rows

"""Singular values of the head of every checkpoint, and of the head seen through the hidden states.

Dims: D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone, load_tokenizer
from bottleneck.core.errors import UserError, check
from bottleneck.studies.formulas.singular import ROWS, padding, singular_values, square_root, summary, triangle
from bottleneck.studies.shared.config import StudyConfig
from bottleneck.studies.shared.loading import device_of, load_head, log_memory, visit
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import Checkpoint, Shapes, check_same_shapes, checkpoints
from bottleneck.studies.shared.stored_head import Head
from bottleneck.studies.shared.text import StudyText, entries_of, study_text

log = logging.getLogger(__name__)


@torch.no_grad()
def covariance(backbone: Backbone, text: StudyText, micro_batch: int, progress: StudyProgress) -> Tensor:
    """Σ = E[h hᵀ] [D, D], float64, over the positions of the text that predict a token."""
    device = backbone.lm_head.weight.device
    total = torch.zeros(backbone.hidden_size, backbone.hidden_size, dtype=torch.float64, device=device)
    count = done = 0
    for inputs, targets in text.batches(micro_batch):
        h = backbone(inputs.to(device))[targets.to(device) >= 0].double()
        total.addmm_(h.T, h)
        count += len(h)
        done += len(inputs)
        progress.at(done / len(text))
    return total / count


def spectra(head: Head, entries: Optional[int], drop_padding: bool, cov_DD: Optional[Tensor]) -> dict[str, Any]:
    """Singular values and summaries of W, and of W Σ^½ if Σ is given.

    Args:
        entries: of the tokenizer; the rows from there on are padding, which `drop_padding` leaves out of the spectra.
    """
    W = head.W_VD
    pads = padding(W, entries)
    if drop_padding and pads["rows"]:
        W = W[: len(W) - pads["rows"]]
    R = triangle(W)
    out: dict[str, Any] = {"tied": head.tied, "rows": len(W), "d": W.shape[1], "padding": pads}
    matrices = {"head": R} | ({} if cov_DD is None else {"weighted": R @ square_root(cov_DD).to(R.device)})
    for name, M in matrices.items():
        sigma = singular_values(M)
        out[name] = {**summary(sigma), "singular_values": sigma.tolist()}
    return out


def _entries(cp: Checkpoint) -> Optional[int]:
    try:
        return entries_of(load_tokenizer(cp.backbone))
    except UserError as error:
        log.warning("the padding rows are unknown: %s", error)
        return None


def _known_entries(series: list[Checkpoint], drop_padding: bool) -> dict[str, Optional[int]]:
    """Entries of each model's tokenizer.

    Raises: UserError where padding is to be dropped and a tokenizer is missing.
    """
    entries = {cp.model: _entries(cp) for cp in reversed(series)}
    unknown = ", ".join(model for model, n in entries.items() if n is None)
    check(
        not (drop_padding and unknown),
        f"study.drop_padding=true: {unknown} has no tokenizer, so its padding rows are not known; "
        "give backbone.tokenizer",
    )
    return entries


def measure(c: StudyConfig, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Spectra of every checkpoint. Returns: one entry for each checkpoint; the text that was measured on."""
    s = c.study
    series = checkpoints(c)
    shapes = check_same_shapes(series)
    device = device_of(c)
    text = study_text(c, series) if s.hidden else None
    if text is None:
        log.info("study.hidden=false: only the head is read; the other weights are not looked at")
    width, vocabulary = max(shapes.values(), key=lambda shape: shape[0] * shape[1])
    work = 8 * (min(ROWS, vocabulary) + 6 * width) * width + 4 * vocabulary * width
    log_memory(series, device, work + (4 * c.trainer.micro_batch_size * text.block * 24 * width if text else 0))
    entries = _known_entries(series, s.drop_padding)
    about = {"drop_padding": s.drop_padding, "dtype": c.backbone.dtype, "entries": entries}
    parts = PartialResults(folder, s.name, {**about, **(text.identity if text else {"hidden": False})})
    out = []
    with StudyProgress(len(series), c.trainer.progress) as progress:
        for cp in series:
            progress.begin(cp.label)
            part = parts.get(cp.key)
            kept = part is not None
            if part is None:
                found = _one(c, cp, shapes, text, entries=entries[cp.model], device=device, progress=progress)
                part = parts.put(cp.key, found)
            out.append({"model": cp.model, "step": cp.step, **part})
            progress.end(_note(part), kept)
    return out, ({"data": text.corpus.name, "tokens": text.tokens} if text else {})


def _one(
    c: StudyConfig,
    cp: Checkpoint,
    shapes: Shapes,
    text: Optional[StudyText],
    *,
    entries: Optional[int],
    device: torch.device,
    progress: StudyProgress,
) -> dict[str, Any]:
    cov = None
    head = load_head(cp, shapes)  # in the file's own precision, even if the model runs in bfloat16
    head.W_VD = head.W_VD.to(device)
    if text is not None:
        cov = visit(cp, device, shapes, lambda b: covariance(b, text, c.trainer.micro_batch_size, progress))
        finite = bool(torch.isfinite(cov).all())
        check(finite, f"{cp.where}: its hidden states are not numbers; are its weights damaged?")
    return spectra(head, entries, c.study.drop_padding, cov)


def _note(part: dict[str, Any]) -> str:
    w = part["head"]
    if w["entropy"] is None:
        return "a head of zeros"
    ranks = f"effective rank {w['effective_rank']:.1f} of {part['d']}, stable rank {w['stable_rank']:.2f}"
    return f"entropy {w['entropy']:.4f}, {ranks}"

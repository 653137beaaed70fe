"""Fig. 4 and 5: the singular values of the head along training, alone and seen through the hidden states.

Dims: D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from torch import Tensor

from bottleneck.backbone.model import load_tokenizer
from bottleneck.core.errors import UserError, check
from bottleneck.results.picture import as_text
from bottleneck.studies.config import Spectrum, StudyConfig
from bottleneck.studies.output import Parts, Steps, canvas, save, shades, step_bar, write
from bottleneck.studies.series import (
    Checkpoint,
    Head,
    check_same_shapes,
    checkpoints,
    device_of,
    load_head,
    say_memory,
    visit,
)
from bottleneck.studies.singular import ROWS, padding, singular_values, square_root, summary, triangle
from bottleneck.studies.text import StudyText, entries_of, study_text

log = logging.getLogger(__name__)
METRICS = (
    "entropy",
    "effective_rank",
    "stable_rank",
    "participation_ratio",
    "condition",
    "top_share",
    "largest",
    "smallest",
    "energy",
)
COLUMNS = ("model", "step", "matrix", "d", "rows", "padding_rows", "tied", *METRICS)
MOST_NAMED = 8  # lines that a legend names
LOWEST = 1e-4  # of the largest singular value: where a panel ends
MATRICES = {"head": "W", "weighted": "W Σ^½"}


@torch.no_grad()
def covariance(backbone: Any, text: StudyText, micro_batch: int, steps: Steps) -> Tensor:
    """Σ = E[h hᵀ] [D, D], float64, over the text's inputs."""
    device = backbone.lm_head.weight.device
    total = torch.zeros(backbone.hidden_size, backbone.hidden_size, dtype=torch.float64, device=device)
    count = done = 0
    for inputs, targets in text.batches(micro_batch):
        h = backbone(inputs.to(device))[targets.to(device) >= 0].double()  # only where something is predicted
        total.addmm_(h.T, h)
        count += len(h)
        done += len(inputs)
        steps.at(done / len(text))
    return total / count


def spectra(head: Head, entries: Optional[int], drop_padding: bool, cov_DD: Optional[Tensor]) -> dict[str, Any]:
    """Singular values of W, and of W Σ^½ where Σ is given, with their summaries.

    Args:
        entries: of the tokenizer; the rows from there on are padding, and left out of the spectra with `drop_padding`.
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
        log.warning("padding rows are not known: %s", error)
        return None


def measure(c: StudyConfig, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Spectra of every checkpoint. Returns: one entry a checkpoint; what was measured on."""
    s: Spectrum = c.study
    series = checkpoints(c)
    shapes = check_same_shapes(series)
    device = device_of(c)
    text = study_text(c, series) if s.hidden else None
    if text is None:
        log.info("study.hidden=false: only the head is read; the other weights are not looked at")
    width, vocabulary = max(shapes.values(), key=lambda shape: shape[0] * shape[1])
    work = 8 * (min(ROWS, vocabulary) + 6 * width) * width + 4 * vocabulary * width
    say_memory(series, device, work + (4 * c.trainer.micro_batch_size * text.block * 24 * width if text else 0))
    entries = {cp.model: _entries(cp) for cp in reversed(series)}
    unknown = [model for model, n in entries.items() if n is None]
    check(
        not (s.drop_padding and unknown),
        f"study.drop_padding=true: {', '.join(unknown)} has no tokenizer, so its padding rows are not known; give backbone.tokenizer",
    )
    about = {"drop_padding": s.drop_padding, "dtype": c.backbone.dtype, "entries": entries}
    parts = Parts(folder, s.name, {**about, **(text.identity if text else {"hidden": False})})
    out = []
    with Steps(len(series), c.trainer.progress) as steps:
        for cp in series:
            steps.begin(cp.label)
            part = parts.get(cp.key)
            kept = part is not None
            if part is None:
                cov = None
                # in the file's own precision, also where the model runs in bfloat16
                head = load_head(cp, shapes)
                head.W_VD = head.W_VD.to(device)
                if text is not None:
                    cov = visit(cp, device, shapes, lambda b: covariance(b, text, c.trainer.micro_batch_size, steps))
                    check(
                        bool(torch.isfinite(cov).all()),
                        f"{cp.where}: its hidden states are not numbers; are its weights whole?",
                    )
                part = parts.put(cp.key, spectra(head, entries[cp.model], s.drop_padding, cov))
            out.append({"model": cp.model, "step": cp.step, **part})
            w = part["head"]
            zero = w["entropy"] is None
            steps.end(
                "a head of zeros"
                if zero
                else f"entropy {w['entropy']:.4f}, effective rank {w['effective_rank']:.1f} of {part['d']}, stable rank {w['stable_rank']:.2f}",
                kept,
            )
    return out, ({"data": text.corpus.name, "tokens": text.tokens} if text else {})


def draw(entries: list[dict[str, Any]], file: BinaryIO) -> None:
    """First Fig. 4, a panel a model and matrix: σ_i against i, dark to light along training; last Fig. 5, entropy against
    step or model, where there are several."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    models = list(dict.fromkeys(e["model"] for e in entries))
    kinds = [k for k in MATRICES if k in entries[0]]
    along = any(sum(e["model"] == m for e in entries) > 1 for m in models)
    figure, panels = canvas(len(models) * len(kinds) + (len(entries) > 1), width=4.8)
    for (m, k), axes in zip([(m, k) for m in models for k in kinds], panels):
        own = [e for e in entries if e["model"] == m]
        many = len(own) > MOST_NAMED
        for e, shade in zip(own, shades(len(own))):
            values = e[k]["singular_values"]
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=shade,
                lw=1.2,
                label=None if many else as_text(m) if e["step"] is None else f"step {e['step']}",
            )
        axes.set(xscale="log", xlabel="index i", ylabel=f"singular value σ_i of {MATRICES[k]}", title=as_text(m))
        largest = max(max(e[k]["singular_values"]) for e in own)
        if largest > 0:  # a head of zeros has no logarithms
            # a direction that the last norm takes away would stretch the axis over ten decades
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(min(min(e[k]["singular_values"]) for e in own), LOWEST * largest) * 0.8)
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if many:
            step_bar(figure, axes, [e["step"] for e in own])
        else:
            axes.legend(fontsize=7, frameon=False, loc="lower left")
    if len(entries) > 1:
        _entropies(entries, models, kinds, along, panels[-1])
    save(figure, file)


def _entropies(entries: list[dict[str, Any]], models: list[str], kinds: list[str], along: bool, last: Any) -> None:
    for i, m in enumerate(models):
        own = [e for e in entries if e["model"] == m]
        for k, style in zip(kinds, ("o-", "s--")):
            x = [e["step"] or 0 for e in own] if along else [i]
            last.plot(
                x,
                [e[k]["entropy"] for e in own],
                style,
                color=f"C{i % 10}",
                ms=3,
                lw=1.2,
                label=as_text(f"{m}, {MATRICES[k]}"),
            )
    if along:
        last.set_xscale("symlog", linthresh=1)
        last.set_xlabel("training step")
    else:
        last.set_xticks(range(len(models)), [as_text(m) for m in models])
    last.set_ylabel("singular entropy KL(σ/Σσ ‖ uniform), nats")
    last.legend(fontsize=7, frameon=False)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The study. Returns: the content of spectrum.json."""
    entries, about = measure(c, folder)
    for model, pads in {e["model"]: (e["padding"]["rows"], e["rows"], e["tied"]) for e in entries}.items():
        said = "unknown" if pads[0] is None else pads[0]
        log.info(
            "%s: padding rows %s (%s), %d rows in the spectra, embeddings %s",
            model,
            said,
            "left out" if c.study.drop_padding else "kept",
            pads[1],
            "tied" if pads[2] else "apart",
        )
    rows = [
        (e["model"], e["step"], k, e["d"], e["rows"], e["padding"]["rows"], e["tied"], *(e[k][m] for m in METRICS))
        for e in entries
        for k in MATRICES
        if k in e
    ]
    return write(
        folder,
        c.study.name,
        {**about, "drop_padding": c.study.drop_padding, "checkpoints": entries},
        COLUMNS,
        rows,
        lambda file: draw(entries, file),
    )

"""Sec. 5.2: how much loss a head of rank r must cost, from the spectrum of the full one, beside what it was measured to cost.

For logits z = W h and z + δ of a low-rank head, with p = softmax(z):

    KL(p ‖ p') = LSE(z + δ) − LSE(z) − p·δ  ≤  ¼ |δ|²

because the Hessian diag(p) − p pᵀ of the log-sum-exp has no eigenvalue above ½ (a unit vector's variance under any p is at
most (√2/2)² = ½). In the mean over tokens |δ|² is ‖(A B − W) Σ^½‖²_F with Σ = E[h hᵀ], and least for the truncated SVD of
W Σ^½ (Eckart–Young–Mirsky). The softmax ignores a shift of all logits, so W may first lose its mean row, W_c. Hence

    KL(r)  ≤  ¼ Σ_{i>r} σ_i(W_c Σ^½)²  ≤  ¼ λ_max(Σ) Σ_{i>r} σ_i(W_c)²            the bound; the tail of Godey et al. 2024
    KL(r)  ≈  ½ Σ_{i>r} σ_i(Q^½ W_c Σ^½)²                                        second order, Fisher diagonal Q, for small tails

For the text's own labels the gap to an *ideal* head (one that no other beats) is below the same bound: the term linear in δ
is then zero. A trained backbone's own head is ideal for its pretraining text only, so gaps of trained heads are measured
from the best full-rank head there is.

Dims: D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bottleneck.backbone.model import FullHead
from bottleneck.data.module import IGNORE
from bottleneck.heads.closed_forms import Calibration, calibrate, roots
from bottleneck.heads.refine import divergence
from bottleneck.losses.chunked import chunk_rows
from bottleneck.results.picture import as_text
from bottleneck.studies.config import StudyConfig, Theory, ranks_of
from bottleneck.studies.output import Parts, Steps, canvas, save, write
from bottleneck.studies.series import check_moments, check_same_shapes, device_of, loaded, one_checkpoint, say_memory
from bottleneck.studies.singular import ROWS, singular_values, tails, triangle
from bottleneck.studies.text import study_text
from bottleneck.studies.trained import read_trained, with_trained

log = logging.getLogger(__name__)
COLUMNS = (
    "backbone",
    "rank",
    "tail_head",
    "tail_weighted",
    "bound",
    "bound_head",
    "second_order",
    "kl_truncated",
    "trained_loss",
    "trained_gap",
)


@dataclass
class Tails:
    """Everything by rank r = 0 … D: [D + 1], float64, CPU. Energies in squared units of the logits, the rest in nats."""

    head: Tensor  # Σ_{i>r} σ_i(W_c)²
    weighted: Tensor  # Σ_{i>r} σ_i(W_c Σ^½)²: mean squared error of the logits, summed over the vocabulary
    bound: Tensor  # ¼ weighted
    bound_head: Tensor  # ¼ λ_max(Σ) head
    second_order: Tensor  # ½ Σ_{i>r} σ_i(Q^½ W_c' Σ^½)², W_c' without its mean under the model's own distribution


def theory_tails(W_VD: Tensor, c: Calibration) -> Tails:
    """The three spectra of a head. Memory: a piece of W in float64 at a time, and a few D × D matrices."""
    root = roots(c.cov_DD)[0].to(W_VD.device)
    W = W_VD.double()
    R = triangle(W - W.mean(dim=0))
    head, weighted = tails(singular_values(R)), tails(singular_values(R @ root))
    # the same values as Q^½ W_c' Σ^½ without a second matrix as large as W
    centre = c.mean_V.to(W) @ W
    R = triangle(c.fisher_V.to(W).clamp(min=0).sqrt()[:, None] * (W - centre))
    top = torch.linalg.eigvalsh(c.cov_DD)[-1].item()
    return Tails(head, weighted, weighted / 4, head * top / 4, tails(singular_values(R @ root)) / 2)


def truncated(W_VD: Tensor, c: Calibration, ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The heads that the bound is about: A [V, R], B [R, D] float32 with A B Σ^½ the truncated SVD of W_c Σ^½."""
    W = W_VD.double()
    root, inverse = (m.to(W.device) for m in roots(c.cov_DD))
    X = (W - W.mean(dim=0)) @ root
    vectors = torch.linalg.svd(triangle(X)).Vh.T  # right singular vectors of X
    A, B = (X @ vectors).float(), (vectors.T @ inverse).float()
    return [(A[:, :r], B[:r]) for r in ranks]


def measure(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Tails, bounds and the KL of the truncated heads on the study's text, and the trained heads' gaps. Returns: theory.json."""
    s: Theory = c.study
    cp = one_checkpoint(c)
    shapes = check_same_shapes([cp])
    (width, vocabulary), device = shapes[cp.model], device_of(c)
    text = study_text(c, [cp])
    work = (
        3 * 8 * vocabulary * width
        + 8 * (min(ROWS, vocabulary) + 8 * width) * width
        + 4 * text.tokens * width
        + 16 * chunk_rows(vocabulary, device.type) * vocabulary
    )
    say_memory([cp], device, work)
    with loaded(cp, device, shapes) as backbone:
        trained = read_trained(s.curve, "study.curve", backbone.name, backbone.hash) if s.curve else None
        ranks = with_trained(ranks_of(s.ranks, width), trained, width)
        parts = Parts(folder, s.name, {**text.identity, "ranks": ranks, "dtype": c.backbone.dtype})
        # the theory is about softmax(W h): a bias or a cap has no place in it
        head = FullHead(backbone.head.W_VD.detach().float() * backbone.head.scale)
        if backbone.head.bias_V is not None or backbone.head.softcap is not None:
            log.warning("%s: the bias and cap of its head are left out, here and in the measured KL", backbone.name)
        with Steps(1, c.trainer.progress, "backbone") as steps:
            steps.begin(cp.label)
            key = f"{cp.label} {backbone.hash}"
            part = parts.get(key)
            kept = part is not None
            if part is None:
                hidden, done = [], 0
                for inputs, targets in text.batches(c.trainer.micro_batch_size):
                    hidden.append(backbone(inputs.to(device))[targets.to(device) != IGNORE].float())
                    done += len(inputs)
                    steps.at(0.4 * done / len(text))
                moments = calibrate(hidden, head)
                check_moments(cp, moments)
                t = theory_tails(head.W_VD, moments)
                steps.at(0.6)
                kl = divergence(truncated(head.W_VD, moments, ranks), torch.cat(hidden), head)
                part = parts.put(key, {**{k: getattr(t, k).tolist() for k in vars(t)}, "kl": kl})
            steps.end(
                f"KL of the truncated head of rank {ranks[0]}: {part['kl'][0]:.4g}, bound {part['bound'][ranks[0]]:.4g}",
                kept,
            )
        rows = []
        for r, kl in zip(ranks, part["kl"]):
            loss = trained.losses.get(r) if trained else None
            rows.append(
                {
                    "rank": r,
                    "tail_head": part["head"][r],
                    "tail_weighted": part["weighted"][r],
                    "bound": part["bound"][r],
                    "bound_head": part["bound_head"][r],
                    "second_order": part["second_order"][r],
                    "kl_truncated": kl,
                    "trained_loss": loss,
                    "trained_gap": None if loss is None else loss - trained.reference,
                }
            )
        return {
            "backbone": backbone.name,
            "backbone_hash": backbone.hash,
            "hidden_size": width,
            "vocab_size": vocabulary,
            "data": text.corpus.name,
            "tokens": text.tokens,
            "trained": trained
            and {"data": trained.data, "tokens": trained.tokens, "reference": trained.reference, "own": trained.own},
            "holds": holds(rows),
            "ranks": rows,
            "tails": {k: part[k] for k in ("head", "weighted", "second_order")},
        }


def holds(rows: list[dict[str, Any]]) -> bool:
    """Whether every measured KL is below its bound, and the bounds are ordered; float32 rounding of the logits is allowed for."""
    return all(
        row["kl_truncated"] <= row["bound"] * (1 + 1e-4) + 1e-5
        and row["bound"] <= row["bound_head"] * (1 + 1e-9) + 1e-9
        for row in rows
    )


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Left: bound, second-order form and measured gaps against rank. Right: the tails they come from, as shares of the energy."""
    figure, (left, right) = canvas(2)
    rows = content["ranks"]
    full = range(1, content["hidden_size"])

    def line(axes: Any, values: list[float], style: str, name: str, **kw: Any) -> None:
        axes.plot(list(full), [values[r] for r in full], style, lw=1.3, label=name, **kw)

    def shares(tail: list[float]) -> list[float]:
        return [x / (tail[0] or 1.0) for x in tail]

    t = content["tails"]
    line(left, [x / 4 for x in t["weighted"]], "-", "bound: ¼ Σ_{i>r} σ_i(W Σ^½)²", color="C0")
    line(left, t["second_order"], "--", "second order, Fisher-weighted", color="C1")
    for name, key, style in (
        ("KL of the truncated head", "kl_truncated", "oC2"),
        ("gap of the trained head", "trained_gap", "*C3"),
    ):
        points = [(row["rank"], row[key]) for row in rows if row[key] is not None and row[key] > 1e-5]
        if points:
            left.plot(*zip(*points), style, ms=5 if style[0] == "o" else 9, label=name)
    low = min(
        [row[k] for row in rows for k in ("kl_truncated", "trained_gap") if row[k] is not None and row[k] > 1e-5],
        default=1e-3,
    )
    left.set_ylim(bottom=low / 5)
    line(right, shares(t["head"]), "-", "W", color="C4")
    line(right, shares(t["weighted"]), "-", "W Σ^½", color="C0")
    line(right, shares(t["second_order"]), "--", "Q^½ W Σ^½", color="C1")
    left.set_ylabel("loss above the full head, nats a token")
    right.set_ylabel("tail energy Σ_{i>r} σ_i², share of all")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="rank r")
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle(as_text(f"{content['backbone']} on {content['data']}"), fontsize=10)
    save(figure, file)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The study. Returns: the content of theory.json."""
    content = measure(c, folder)
    for row in content["ranks"]:
        gap = "" if row["trained_gap"] is None else f", trained heads {row['trained_gap']:+.4f}"
        log.info(
            "rank %d: bound %.4g nats, second order %.4g, truncated head %.4g%s",
            row["rank"],
            row["bound"],
            row["second_order"],
            row["kl_truncated"],
            gap,
        )
    log.info(
        "the bound %s", "holds at every rank" if content["holds"] else "does NOT hold at every rank: please report this"
    )
    rows = [(content["backbone"], *(row[k] for k in COLUMNS[1:])) for row in content["ranks"]]
    return write(folder, c.study.name, content, COLUMNS, rows, lambda file: draw(content, file))

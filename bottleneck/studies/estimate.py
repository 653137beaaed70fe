"""The curve of Fig. 6 without training: closed-form heads of every rank, evaluated, beside a trained curve where there is one.

Dims: N sequences, T tokens of a sequence, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, BinaryIO, Iterable

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.heads import closed_forms as initial
from bottleneck.heads.bank import HeadKey
from bottleneck.heads.refine import refine
from bottleneck.losses.chunked import chunk_rows
from bottleneck.results.picture import as_text
from bottleneck.studies.agreement import NUMBERS, Agreement
from bottleneck.studies.config import Estimate, StudyConfig, ranks_of
from bottleneck.studies.output import Parts, Steps, canvas, save, write
from bottleneck.studies.series import check_moments, check_same_shapes, device_of, loaded, one_checkpoint, say_memory
from bottleneck.studies.text import StudyText, study_text
from bottleneck.studies.trained import Trained, read_trained, with_trained

log = logging.getLogger(__name__)
COLUMNS = (
    "backbone",
    "init",
    "rank",
    "parameters",
    "loss",
    "perplexity",
    *NUMBERS,
    "trained_loss",
    "trained_perplexity",
)


def start_heads(
    init: str,
    ranks: Iterable[int],
    seed: int,
    backbone: Backbone,
    hidden: list[Tensor],
    moments: initial.Calibration,
    passes: int,
) -> list[tuple[Tensor, Tensor]]:
    """A [V, R] and B [R, D] of every rank for one `head.init`, as train.py starts them; float32 on the backbone's device.

    Args:
        hidden: calibration states [N, T, D], which the refined start is taught on.
    """
    head = backbone.head
    start = initial.starts("fisher" if init == "refined" else init, head, moments)
    heads = [start(HeadKey(r, 1.0, seed)) for r in ranks]
    if init == "refined":
        heads = refine(heads, hidden, head, moments, passes)
    device = head.W_VD.device
    if init not in ("fisher", "svd"):
        return [(A.to(device, torch.float32), B.to(device, torch.float32)) for A, B in heads]
    # the closed forms of all ranks are slices of one: kept so, one matrix is held and not one a rank
    widest = max(heads, key=lambda pair: pair[0].shape[1])
    A, B = (x.to(device, torch.float32) for x in widest)
    return [(A[:, : b.shape[0]], B[: b.shape[0]]) for _, b in heads]


def evaluate(
    heads: list[tuple[Tensor, Tensor]], backbone: Backbone, text: StudyText, micro_batch: int, steps: Steps
) -> Agreement:
    """All heads over the text, one pass of the backbone."""
    device = backbone.lm_head.weight.device
    result, done = Agreement(heads), 0
    for inputs, targets in text.batches(micro_batch):
        y = targets.to(device).flatten()
        keep = y != IGNORE
        result.add(backbone(inputs.to(device)).flatten(0, 1)[keep], y[keep], backbone.head)
        done += len(inputs)
        steps.at(done / len(text))
    return result


def measure(c: StudyConfig, folder: Path) -> tuple[dict[str, Any], Trained | None]:
    """Every start at every rank. Returns: the content of estimate.json so far, and the trained curve."""
    s: Estimate = c.study
    cp = one_checkpoint(c)
    shapes = check_same_shapes([cp])
    (width, vocabulary), device = shapes[cp.model], device_of(c)
    ranks = ranks_of(s.ranks, width)
    text = study_text(c, [cp])
    # widest moments: two float64 matrices as large as W; refined: four copies of every rank's A
    work = (
        3 * 8 * vocabulary * width
        + 16 * sum(ranks) * vocabulary
        + 4 * s.calibration_tokens * width
        + 24 * chunk_rows(vocabulary, device.type) * vocabulary
    )
    say_memory([cp], device, work)
    settings = {
        "calibration_tokens": s.calibration_tokens,
        "passes": s.passes,
        "seed": s.seed,
        "data_seed": c.data.seed,
        "dtype": c.backbone.dtype,
    }
    heads: list[dict[str, Any]] = []
    with loaded(cp, device, shapes) as backbone:
        trained = read_trained(s.curve, "study.curve", backbone.name, backbone.hash) if s.curve else None
        ranks = with_trained(ranks, trained, width)
        parts = Parts(folder, s.name, {**text.identity, **settings, "ranks": ranks})
        if not backbone.head.plain:
            log.warning(
                "%s: its head has a bias, a scale or a cap; a bias and a cap have no low-rank form and are in the full head only",
                backbone.name,
            )
        hidden: list[Tensor] = []
        moments = None
        about: dict[str, Any] = {}
        with Steps(len(s.inits), c.trainer.progress, "start") as steps:
            for init in s.inits:
                steps.begin(init)
                key = f"{init} {backbone.hash}"
                part = parts.get(key)
                kept = part is not None
                if part is None:
                    began = time.monotonic()
                    if moments is None:
                        ids = text.calibration(s.calibration_tokens, c.data.seed)
                        hidden = [backbone(b[:, :-1].to(device)) for b in ids.split(c.trainer.micro_batch_size)]
                        moments = initial.calibrate(hidden, backbone.head)
                        check_moments(cp, moments)
                    started = start_heads(init, ranks, s.seed, backbone, hidden, moments, s.passes)
                    result = evaluate(started, backbone, text, c.trainer.micro_batch_size, steps)
                    del started
                    rows = [
                        {"init": init, "rank": r, "parameters": r * (vocabulary + width), **m}
                        for r, m in zip(ranks, result.means)
                    ]
                    part = parts.put(
                        key, {"heads": rows, "full_loss": result.full_loss, "seconds": time.monotonic() - began}
                    )
                check(
                    math.isfinite(part["full_loss"] or math.nan),
                    f"{cp.where}: its loss is not a number; are its weights whole?",
                )
                heads += part["heads"]
                about = {"loss": part["full_loss"], "perplexity": math.exp(part["full_loss"])}
                shown = [h for h in part["heads"] if h["perplexity"]]
                steps.end(", ".join(f"{h['perplexity']:.4g}" for h in shown) or "no finite perplexity", kept)
        content = {
            "backbone": backbone.name,
            "backbone_hash": backbone.hash,
            "hidden_size": width,
            "vocab_size": vocabulary,
        }
    return {
        **content,
        "data": text.corpus.name,
        "tokens": text.tokens,
        "calibration_tokens": s.calibration_tokens,
        "reference": about,
        "heads": heads,
    }, trained


def beside(heads: list[dict[str, Any]], own: float, trained: Trained | None) -> list[dict[str, Any]]:
    """Each head with the trained head of its rank: `trained_loss`, and `excess`, how much further above the own head's loss the
    estimate is, in nats. Both gaps are taken on their own text, since the run may have validated on another.

    Args:
        own: loss of the backbone's own head on this study's text.
    """
    out = []
    for h in heads:
        loss = trained.losses.get(h["rank"]) if trained else None
        excess = None if loss is None or h["loss"] is None else (h["loss"] - own) - (loss - trained.own)
        out.append({**h, "trained_loss": loss, "excess": excess})
    return out


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Left, Fig. 6 without training: perplexity against rank of every start. Right: KL to the full head, and disagreement."""
    figure, (left, right) = canvas(2)
    reference = content["reference"]["perplexity"]
    inits = list(dict.fromkeys(h["init"] for h in content["heads"]))
    shown = [reference]
    for i, init in enumerate(inits):
        own = [h for h in content["heads"] if h["init"] == init]
        fair = [h for h in own if h["perplexity"]]
        left.plot(
            [h["rank"] for h in fair], [h["perplexity"] for h in fair], "o-", ms=3.5, lw=1.3, color=f"C{i}", label=init
        )
        shown += [h["perplexity"] for h in fair if init in ("fisher", "refined")]
        positive = [h for h in own if h["kl"] and h["kl"] > 1e-6]
        right.plot(
            [h["rank"] for h in positive], [h["kl"] for h in positive], "o-", ms=3.5, lw=1.3, color=f"C{i}", label=init
        )
        wrong = [h for h in own if h["top1_agreement"] is not None and h["top1_agreement"] < 1]
        right.plot([h["rank"] for h in wrong], [1 - h["top1_agreement"] for h in wrong], ":", lw=1.2, color=f"C{i}")
    if content["trained"]:
        losses = content["trained"]["losses"]
        left.plot(
            [int(r) for r in losses],
            [math.exp(x) for x in losses.values()],
            "k*--",
            ms=7,
            lw=1,
            label=as_text(f"trained, {content['trained']['tokens']:,} tokens ({content['trained']['data']})"),
        )
    left.axhline(reference, color="0.4", ls="--", lw=1, label=f"own head ({reference:.4g})")
    ceiling = 30 * max(shown) if len(shown) > 1 else 1e6  # random starts are far above what is of interest
    left.set_ylim(
        reference / 1.3,
        min(ceiling, 1.5 * max([h["perplexity"] for h in content["heads"] if h["perplexity"]], default=1e6)),
    )
    for line in left.get_lines():  # a start of which nothing is to be seen
        if len(line.get_ydata()) and min(line.get_ydata()) > left.get_ylim()[1]:
            line.set_label(f"{line.get_label()} (above {left.get_ylim()[1]:,.0f})")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rank r of the head W = AB")
        axes.legend(fontsize=7, frameon=False)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    right.set_ylim(top=min(right.get_ylim()[1], 30.0))  # nats: literal N(0, 1) starts are hundreds away
    left.set_ylabel("perplexity, no training")
    right.set_ylabel("solid: KL from the full head, nats\ndotted: share of tokens with another top token")
    save(figure, file)


def show(content: dict[str, Any], console: Console) -> None:
    """The curves as a table: a row a rank, a column a start."""
    inits = list(dict.fromkeys(h["init"] for h in content["heads"]))
    table = Table(
        title=escape(f"{content['backbone']} on {content['data']}: perplexity without training"), title_justify="left"
    )
    trained = content["trained"]["losses"] if content["trained"] else {}
    for column in ("rank", *inits, *(["trained"] if trained else []), f"KL ({inits[0]})", "same top token"):
        table.add_column(column, justify="right")
    by = {(h["init"], h["rank"]): h for h in content["heads"]}
    for r in dict.fromkeys(h["rank"] for h in content["heads"]):
        first = by[inits[0], r]
        cells = ["–" if by[i, r]["perplexity"] is None else f"{by[i, r]['perplexity']:,.5g}" for i in inits]
        cells += [f"{math.exp(trained[r]):,.5g}" if r in trained else "–"] if trained else []
        cells += [
            "–" if first["kl"] is None else f"{first['kl']:.4f}",
            f"{100 * first['top1_agreement']:.1f} %" if first["top1_agreement"] is not None else "–",
        ]
        table.add_row(str(r), *cells)
    table.add_row("own", f"{content['reference']['perplexity']:,.5g}", style="bold")
    console.print(table)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The study. Returns: the content of estimate.json."""
    content, trained = measure(c, folder)
    content["heads"] = beside(content["heads"], content["reference"]["loss"], trained)
    content["trained"] = trained and {
        "data": trained.data,
        "tokens": trained.tokens,
        "losses": trained.losses,
        "own": trained.own,
    }
    rows = [
        (
            content["backbone"],
            h["init"],
            h["rank"],
            h["parameters"],
            h["loss"],
            h["perplexity"],
            *(h[n] for n in NUMBERS),
            h["trained_loss"],
            None if h["trained_loss"] is None else math.exp(h["trained_loss"]),
        )
        for h in content["heads"]
    ]
    result = write(folder, c.study.name, content, COLUMNS, rows, lambda file: draw(content, file))
    show(content, Console(width=max(110, Console().width)))
    return result

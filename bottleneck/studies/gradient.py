"""The head as a gradient bottleneck: how much of the logit gradient's norm reaches the hidden state, for the full head and each rank.

Godey & Artzi 2026 (arXiv 2603.10145): 95–99 % of it is lost in pretrained models. Low-rank heads are closed forms on the same hidden
states, each with its own softmax.

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.evaluation.agreement import band_names, bands_of
from bottleneck.heads import closed_forms as initial
from bottleneck.losses.chunked import chunk_rows
from bottleneck.results.picture import as_text
from bottleneck.studies.config import Gradient, StudyConfig, ranks_of
from bottleneck.studies.estimate import start_heads
from bottleneck.studies.output import Parts, Steps, canvas, save, write, write_table
from bottleneck.studies.reach import BINS, Reach
from bottleneck.studies.series import check_moments, check_same_shapes, device_of, loaded, one_checkpoint, say_memory
from bottleneck.studies.text import StudyText, study_text

log = logging.getLogger(__name__)
NUMBERS = ("share", "lost", "rms", "rank", "update_effective_rank", "update_stable_rank")
COLUMNS = ("backbone", "head", *NUMBERS, "chance")
TOKENS = "gradient_tokens.csv"  # target id and shares of every token: full head, each rank


def sweep(
    heads: list[tuple[torch.Tensor, torch.Tensor]], backbone: Backbone, text: StudyText, micro_batch: int, steps: Steps
) -> tuple[list[Reach], list[int]]:
    """The full head and low-rank ones (A [V, R], B [R, D]) over the text, one pass of the backbone; the full head first. And the targets."""
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
                found_logits = (h.float() @ B.T) @ A.T
                reach.add(torch.softmax(found_logits, -1), y_n, bands[y_n])
        goals += y.tolist()
        done += len(inputs)
        steps.at(done / len(text))
    return found, goals


def measure(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The content of gradient.json."""
    s: Gradient = c.study
    cp = one_checkpoint(c)
    shapes = check_same_shapes([cp])
    (width, vocabulary), device = shapes[cp.model], device_of(c)
    ranks = ranks_of(s.ranks, width)
    text = study_text(c, [cp])
    # chunks of logits; a closed form's two float64 matrices as large as W; every rank's A and Q, and the sums of D x D
    say_memory(
        [cp],
        device,
        16 * chunk_rows(vocabulary, device.type) * vocabulary
        + 3 * 8 * vocabulary * width
        + 8 * sum(ranks) * vocabulary
        + 16 * width * width,
    )
    identity = {
        "ranks": ranks,
        "init": s.init,
        "calibration_tokens": s.calibration_tokens,
        "data_seed": c.data.seed,
        "dtype": c.backbone.dtype,
    }
    parts = Parts(folder, s.name, {**text.identity, **identity})
    with Steps(1, c.trainer.progress, "pass") as steps, loaded(cp, device, shapes) as backbone:
        check(
            backbone.head.bias_V is None or bool(torch.isfinite(backbone.head.bias_V).all()),
            f"{cp.where}: its head's bias is not a number",
        )
        if backbone.head.softcap is not None:
            log.warning("%s: its head has a soft cap; the gradient is taken before it", backbone.name)
        steps.begin(cp.label)
        part = parts.get(backbone.hash)
        kept = part is not None
        if part is None:
            ids = text.calibration(s.calibration_tokens, c.data.seed)
            hidden = [backbone(b[:, :-1].to(device)) for b in ids.split(c.trainer.micro_batch_size)]
            moments = initial.calibrate(hidden, backbone.head)
            check_moments(cp, moments)
            reached, goals = sweep(
                start_heads(s.init, ranks, 0, backbone, hidden, moments, 2),
                backbone,
                text,
                c.trainer.micro_batch_size,
                steps,
            )
            found = [r.result for r in reached]
            part = parts.put(
                backbone.hash,
                {
                    "targets": goals,
                    "full": found[0],
                    "heads": [{"rank_of_head": r, **m} for r, m in zip(ranks, found[1:])],
                },
            )
        full = part["full"]
        check(
            full["share"] is not None and math.isfinite(full["share"]),
            f"{cp.where}: its gradients are not numbers; are its weights whole?",
        )
        steps.end(f"the full head lets {100 * full['share']:.1f} % through", kept)
        about = {
            "backbone": backbone.name,
            "backbone_hash": backbone.hash,
            "hidden_size": width,
            "vocab_size": vocabulary,
        }
    return {
        **about,
        "data": text.corpus.name,
        "tokens": text.tokens,
        "init": s.init,
        "band_names": band_names(),
        **part,
    }


def chance(rank: int, vocabulary: int) -> float:
    """Root mean square share for a gradient that knows nothing of W: √(rank / V)."""
    return math.sqrt(rank / vocabulary)


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Share against rank beside chance; its distribution over tokens; by frequency of the target."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    figure, (left, middle, right) = canvas(3, width=5.2)
    V, heads, full = content["vocab_size"], content["heads"], content["full"]
    ranks = [h["rank_of_head"] for h in heads]
    left.plot(ranks, [h["share"] for h in heads], "o-", ms=4, label=f"heads of rank r ({content['init']})")
    left.axhline(full["share"], ls="--", color="C1", label=f"full head ({full['share']:.3f})")
    left.plot(ranks, [chance(r, V) for r in ranks], ":", color="0.4", label="chance, √(r/V)")
    left.set(xscale="log", yscale="log", xlabel="rank r of the head", ylabel="share of the logit gradient's norm")
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xticks(
        ranks, [str(r) if all(s <= r or s > 1.3 * r for s in ranks) else "" for r in ranks]
    )  # of near ones the last
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    middle.stairs(
        [n / sum(full["histogram"]) for n in full["histogram"]],
        [i / BINS for i in range(BINS + 1)],
        fill=True,
        alpha=0.6,
    )
    middle.set(
        xlim=(0, max(i for i, n in enumerate(full["histogram"], 1) if n) / BINS),
        xlabel="share that reaches the hidden state",
        ylabel="share of tokens",
        title=as_text(f"{content['backbone']}, full head"),
    )
    places = range(len(content["band_names"]))
    for label, row in (
        ("full head", full),
        *((f"rank {h['rank_of_head']}", h) for h in heads[:: max(1, len(heads) // 3)]),
    ):
        right.plot(places, [b["share"] for b in row["bands"]], "o-", ms=4, label=label)
    right.set_xticks(places, content["band_names"], rotation=20, fontsize=8)
    right.set(xlabel="place of the target by frequency", ylabel="share that reaches the hidden state")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
    save(figure, file)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The study. Returns: the content of gradient.json."""
    content = measure(c, folder)
    V = content["vocab_size"]
    named = [("full", content["full"]), *((str(h["rank_of_head"]), h) for h in content["heads"])]
    rows = [(content["backbone"], name, *(r[n] for n in NUMBERS), chance(r["rank"], V)) for name, r in named]
    # by token apart: it is long, and goes into a table of its own
    tokens = {"target": content.pop("targets"), **{f"share_{name}": r.pop("tokens") for name, r in named}}
    write_table(folder / TOKENS, list(tokens), zip(*tokens.values()))
    result = write(
        folder, c.study.name, {**content, "by_token": TOKENS}, COLUMNS, rows, lambda file: draw(content, file)
    )
    table = Table(
        title=escape(f"{content['backbone']}: share of the logit gradient's norm that reaches the hidden state"),
        title_justify="left",
    )
    for column in ("head", "reaches it", "lost", "chance", "effective rank of the update"):
        table.add_column(column, justify="right")
    for name, r in named:
        update = r["update_effective_rank"]
        table.add_row(
            name,
            f"{r['share']:.4f}",
            f"{100 * r['lost']:.1f} %",
            f"{chance(r['rank'], V):.4f}",
            "–" if update is None else f"{update:.1f}",
        )
    Console(width=max(100, Console().width)).print(table)
    return result

"""Fig. 7: how well matrices of rank d can hold the 5-grams of a text, for every d up to the vocabulary.

Beside the paper's error, every context alike, stands the one with contexts weighted by how often they occur, which is closer to what a
language model is trained on. Other runs of this study, on other texts or tokenizers, are drawn beside with `study.beside`.

Dims: V vocabulary.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import torch

from bottleneck.backbone.model import label, load_tokenizer
from bottleneck.core.errors import UserError, check
from bottleneck.data.prepare import prepare
from bottleneck.results.picture import as_text
from bottleneck.studies.config import Ngrams, StudyConfig
from bottleneck.studies.counts import BUCKET, MOST_VOCAB, STRIP, gram, w_error
from bottleneck.studies.output import Parts, Steps, canvas, save, write
from bottleneck.studies.series import device_of
from bottleneck.studies.text import entries_of

log = logging.getLogger(__name__)
COLUMNS = ("d", "w_error", "w_error_weighted")
LEVELS = (0.5, 0.25, 0.1, 0.05)


def smallest(errors: list[float], level: float) -> int:
    """The smallest d whose error is at most `level`."""
    return int(np.searchsorted(-np.asarray(errors), -level))


def eigenvalues(matrix: np.ndarray, device: torch.device) -> np.ndarray:
    """Of a symmetric V x V matrix, in its precision; on a GPU where there is one, since the work is (4/3) V³."""
    if device.type != "cpu":
        try:
            return torch.linalg.eigvalsh(torch.from_numpy(matrix).to(device)).cpu().numpy()
        except (
            RuntimeError
        ) as error:  # too little memory, or CUDA's solver before version 13, which counts entries in 32 bits
            log.warning(
                "the GPU cannot take a matrix of %d x %d (%s); the CPU does", *matrix.shape, str(error).split("\n")[0]
            )
    return torch.linalg.eigvalsh(torch.from_numpy(matrix)).numpy()


def room(vocab: int, precision: str, device: torch.device) -> None:
    """Say how much memory the study takes, and refuse what this machine has not. Raises UserError."""
    one = np.dtype(precision).itemsize * vocab**2
    on_cpu = device.type == "cpu"
    # while counting: the matrix, a bucket, a strip; then the matrix and, on a CPU, the solver's copy
    need = max(one + 100 * BUCKET + 30 * STRIP, 2 * one if on_cpu else 0)
    free = psutil.virtual_memory().available
    log.info(
        "memory: about %.1f GiB, %.1f GiB are free%s",
        need / 2**30,
        free / 2**30,
        "" if on_cpu else f"; {2 * one / 2**30:.1f} GiB on the GPU",
    )
    less = "; study.precision=float32 takes half" if precision == "float64" else ""
    check(
        need <= free,
        f"backbone: 5-gram matrices of {vocab} x {vocab} tokens take {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free{less}",
    )


def beside(paths: list[str]) -> list[dict[str, Any]]:
    """Results of other runs. Raises UserError for what is not one."""
    out = []
    for path in map(Path, paths):
        file = path if path.is_file() else path / "ngrams.json"
        try:
            content = json.loads(file.read_text())
            out.append({k: content[k] for k in ("name", "vocab", "w_error", "w_error_weighted")})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"study.beside={path}: not a result of study=ngrams: {type(error).__name__}: {error}"
            ) from error
    return out


def draw(lines: list[dict[str, Any]], widths: list[int], file: BinaryIO) -> None:
    """W-error against d, solid; weighted by frequency, dotted."""
    figure, (axes,) = canvas(1, width=7.0)
    for i, line in enumerate(lines):
        axes.plot(range(len(line["w_error"])), line["w_error"], color=f"C{i}", label=as_text(line["name"]))
        axes.plot(
            range(len(line["w_error_weighted"])),
            line["w_error_weighted"],
            ":",
            color=f"C{i}",
            label=as_text(f"{line['name']}, contexts by frequency"),
        )
    for d in widths:
        axes.axvline(d, color="0.7", lw=0.8, ls="--")
    axes.set(
        xscale="symlog",
        xlabel="rank d (dashed: hidden sizes 512 … 4,096)",
        ylabel="W-error of the best rank-d matrix",
        ylim=(0, 1.02),
        xlim=(0, None),
    )
    axes.legend(fontsize=7, frameon=False)
    save(figure, file)


def one(
    tokens: np.ndarray, V: int, eos: int, weighted: bool, precision: str, device: torch.device, name: str, steps: Steps
) -> dict[str, Any]:
    """Counts and errors of one of the two matrices. `trace_error`: how far, as a share, its eigenvalues add up beside its trace."""
    # how much of the work counting is, roughly: for the time left
    counting, solving = len(tokens) / 8e5, 4 / 3 * V**3 / (1e11 if device.type == "cpu" else 5e12)
    began = time.monotonic()
    g = gram(
        tokens,
        V,
        eos,
        weighted,
        np.dtype(precision).type,
        lambda share: steps.at(share * counting / (counting + solving)),
    )
    check(
        g.ngrams > 0,
        f"data: {name} has no 5-gram in {len(tokens)} training tokens: among any five in a row a text ends",
    )
    seconds = time.monotonic() - began
    log.info(
        "%s 5-grams after %s contexts, counted in %.0f s; now the spectrum of %d x %d",
        f"{g.ngrams:,}",
        f"{g.contexts:,}",
        seconds,
        V,
        V,
    )
    values = eigenvalues(g.matrix, device)
    return {
        "ngrams": g.ngrams,
        "contexts": g.contexts,
        "distinct": g.distinct,
        "counting_seconds": seconds,
        "solving_seconds": time.monotonic() - began - seconds,
        "trace_error": abs(float(values.sum(dtype=float)) / g.energy - 1),
        "errors": w_error(values).tolist(),
    }


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The study. Returns: the content of ngrams.json."""
    s: Ngrams = c.study
    others = beside(s.beside)
    tokenizer = load_tokenizer(c.backbone)
    V = entries_of(tokenizer)
    check(V <= MOST_VOCAB, f"backbone: its tokenizer has {V} entries; 5-grams are counted for up to {MOST_VOCAB}")
    device = device_of(c)
    room(V, s.precision, device)
    corpus = prepare(c.data, tokenizer)
    tokens = corpus.train[: s.max_tokens]
    check(len(tokens) >= 5, f"data: {corpus.name} has {len(tokens)} training tokens, 5 are needed")
    # where the stream was prepared elsewhere its end of text is the manifest's
    eos = int(corpus.manifest.get("eos", tokenizer.eos_token_id))
    parts = Parts(
        folder,
        s.name,
        {"data": corpus.fingerprint, "tokens": len(tokens), "vocab": V, "eos": eos, "precision": s.precision},
    )
    found = {}
    # one after the other: a matrix of 50,000 tokens takes 20 GB, counting again takes minutes
    with Steps(2, c.trainer.progress, "matrix") as steps:
        for name, weighted in (("w_error", False), ("w_error_weighted", True)):
            steps.begin(name)
            part = parts.get(name)
            kept = part is not None
            if part is None:
                part = parts.put(name, one(tokens, V, eos, weighted, s.precision, device, corpus.name, steps))
            found[name] = part
            steps.end(", ".join(f"{level:g}: d = {smallest(part['errors'], level):,}" for level in LEVELS), kept)
    errors = {name: part["errors"] for name, part in found.items()}
    counted = {k: v for k, v in found["w_error"].items() if k not in ("errors", "trace_error")}
    content = {
        "name": f"{corpus.name}, {Path(c.backbone.tokenizer).name if c.backbone.tokenizer else label(c.backbone)}, V = {V:,}",
        "data": corpus.name,
        "data_hash": corpus.fingerprint,
        "vocab": V,
        "tokens": len(tokens),
        **counted,
        "precision": s.precision,
        "trace_error": max(part["trace_error"] for part in found.values()),
        "smallest_d": {f"{level:g}": {n: smallest(e, level) for n, e in errors.items()} for level in LEVELS},
        **errors,
    }
    widths = [d for d in (512, 1024, 2048, 4096) if d < V]
    return write(
        folder,
        s.name,
        content,
        COLUMNS,
        list(zip(range(V + 1), *errors.values())),
        lambda file: draw([content, *others], widths, file),
    )

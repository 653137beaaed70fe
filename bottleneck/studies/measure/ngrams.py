"""Counts and spectra of the 5-gram matrices of a text.

Dims: V vocabulary.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bottleneck.backbone.model import label, load_tokenizer
from bottleneck.core.errors import check
from bottleneck.data.prepare import prepare
from bottleneck.studies.formulas.counts import BUCKET, MOST_VOCAB, STRIP, gram, w_error
from bottleneck.studies.shared.config import StudyConfig
from bottleneck.studies.shared.loading import device_of
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.text import entries_of

log = logging.getLogger(__name__)
LEVELS = (0.5, 0.25, 0.1, 0.05)


def smallest(errors: list[float], level: float) -> int:
    """The smallest d whose error is at most `level`."""
    return int(np.searchsorted(-np.asarray(errors), -level))


def eigenvalues(matrix: np.ndarray, device: torch.device) -> np.ndarray:
    """Eigenvalues of a symmetric V x V matrix in its precision, on a GPU if there is one: the work is (4/3) V³."""
    if device.type != "cpu":
        try:
            return torch.linalg.eigvalsh(torch.from_numpy(matrix).to(device)).cpu().numpy()
        except (
            RuntimeError
        ) as error:  # too little memory; or cuSOLVER before version 13, which counts entries in 32 bits
            said = "the GPU cannot take a matrix of %d x %d (%s); using the CPU"
            log.warning(said, *matrix.shape, str(error).split("\n")[0])
    return torch.linalg.eigvalsh(torch.from_numpy(matrix)).numpy()


def check_memory(vocab: int, precision: str, device: torch.device) -> None:
    """Log how much memory the study needs. Raises: UserError if this machine has less."""
    one = np.dtype(precision).itemsize * vocab**2
    on_cpu = device.type == "cpu"
    # while counting the matrix, a bucket and a strip are held; then the matrix and, on a CPU, the solver's copy
    need = max(one + 100 * BUCKET + 30 * STRIP, 2 * one if on_cpu else 0)
    free = psutil.virtual_memory().available
    on_gpu = "" if on_cpu else f"; {2 * one / 2**30:.1f} GiB on the GPU"
    log.info("memory: about %.1f GiB, %.1f GiB are free%s", need / 2**30, free / 2**30, on_gpu)
    less = "; study.precision=float32 takes half" if precision == "float64" else ""
    takes = f"5-gram matrices of {vocab} x {vocab} tokens take {need / 2**30:.1f} GiB of memory"
    check(need <= free, f"backbone: {takes}, {free / 2**30:.1f} GiB are free{less}")


@dataclass
class Stream:
    """A token stream to count: ids, vocabulary size, id of the end of text, and the corpus's name for messages."""

    tokens: np.ndarray
    vocab: int
    eos: int
    name: str


def one(
    stream: Stream, *, weighted: bool, precision: str, device: torch.device, progress: StudyProgress
) -> dict[str, Any]:
    """Counts and W-errors of one of the two matrices.

    Returns: counts, seconds, `errors` for d = 0 … V, and `trace_error`: relative difference of its trace and the sum
        of its eigenvalues.
    """
    V, tokens = stream.vocab, stream.tokens
    # rough shares of the two parts of the work, to estimate the remaining time
    counting, solving = len(tokens) / 8e5, 4 / 3 * V**3 / (1e11 if device.type == "cpu" else 5e12)
    began = time.monotonic()

    def at(share: float) -> None:
        progress.at(share * counting / (counting + solving))

    g = gram(tokens, V, stream.eos, weighted, np.dtype(precision).type, at)
    empty = f"{stream.name} has no 5-gram in {len(tokens)} training tokens: its documents are too short"
    check(g.ngrams > 0, f"data: {empty}")
    seconds = time.monotonic() - began
    said = "%s 5-grams after %s contexts, counted in %.0f s; now the spectrum of %d x %d"
    log.info(said, f"{g.ngrams:,}", f"{g.contexts:,}", seconds, V, V)
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


def measure(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Both matrices of the text. Returns: the content of ngrams.json."""
    s = c.study
    tokenizer = load_tokenizer(c.backbone)
    V = entries_of(tokenizer)
    check(V <= MOST_VOCAB, f"backbone: its tokenizer has {V} entries; 5-grams are counted for up to {MOST_VOCAB}")
    device = device_of(c)
    check_memory(V, s.precision, device)
    corpus = prepare(c.data, tokenizer)
    tokens = corpus.train[: s.max_tokens]
    check(len(tokens) >= 5, f"data: {corpus.name} has {len(tokens)} training tokens, 5 are needed")
    # a prepared stream from elsewhere has its own end of text
    eos = int(corpus.manifest.get("eos", tokenizer.eos_token_id))
    stream = Stream(tokens, V, eos, corpus.name)
    identity = {"data": corpus.fingerprint, "tokens": len(tokens), "vocab": V, "eos": eos, "precision": s.precision}
    parts = PartialResults(folder, s.name, identity)
    found = {}
    # one after the other, since a matrix of 50,000 tokens takes 20 GB; counting again takes minutes
    with StudyProgress(2, c.trainer.progress, "matrix") as progress:
        for name, weighted in (("w_error", False), ("w_error_weighted", True)):
            progress.begin(name)
            part = parts.get(name)
            kept = part is not None
            if part is None:
                result = one(stream, weighted=weighted, precision=s.precision, device=device, progress=progress)
                part = parts.put(name, result)
            found[name] = part
            progress.end(", ".join(f"{level:g}: d = {smallest(part['errors'], level):,}" for level in LEVELS), kept)
    errors = {name: part["errors"] for name, part in found.items()}
    counted = {k: v for k, v in found["w_error"].items() if k not in ("errors", "trace_error")}
    tokenizer_name = Path(c.backbone.tokenizer).name if c.backbone.tokenizer else label(c.backbone)
    return {
        "name": f"{corpus.name}, {tokenizer_name}, V = {V:,}",
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

"""Fig. 7: how well matrices of rank d can represent the 5-grams of a text, for every d up to the vocabulary.

Besides the paper's error, in which every context counts alike, the study computes the error with contexts weighted by
how often they occur, which is closer to what a language model is trained on. `study.beside` draws other runs of this
study, on other texts or tokenizers, in the same picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_count, as_list
from bottleneck.core.errors import UserError, check
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text
from bottleneck.studies.shared.config import StudyConfig, StudyKeys
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

COLUMNS = ("d", "w_error", "w_error_weighted")


@dataclass(frozen=True)
class Ngrams(StudyKeys):
    """Fig. 7: 5-gram matrices of a text and their best low-rank approximations."""

    max_tokens: int = key(150_000_000, "Training tokens to count, at most.", read=Any)
    precision: Literal["float64", "float32"] = key(
        "float64",
        "Precision of matrix and spectrum: float64, or float32 in half the memory and less time, W-errors within 1e-4.",
    )
    beside: list[str] = key(
        [],
        "Folders of other runs of this study (other texts, other tokenizers) to draw as well: one or a list.",
        read=Any,
    )


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Ngrams`."""
    keys.max_tokens = as_count("study.max_tokens", keys.max_tokens, 5)
    known = keys.precision in ("float64", "float32")
    check(known, f"study.precision={keys.precision}: must be float64 or float32")
    keys.beside = [] if keys.beside is None else [str(b) for b in as_list(keys.beside)]


def other_results(paths: list[str]) -> list[dict[str, Any]]:
    """Results of other runs. Raises: UserError for a file or folder that is not one."""
    out = []
    for path in map(Path, paths):
        file = path if path.is_file() else path / "ngrams.json"
        try:
            content = json.loads(file.read_text())
            out.append({k: content[k] for k in ("name", "vocab", "w_error", "w_error_weighted")})
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"study.beside={path}: not a result of study=ngrams: {reason}") from error
    return out


def draw(lines: list[dict[str, Any]], widths: list[int], file: BinaryIO) -> None:
    """W-error against d, solid; weighted by frequency, dotted."""
    figure, (axes,) = canvas(1, width=7.0)
    for i, line in enumerate(lines):
        plain, weighted, name = line["w_error"], line["w_error_weighted"], line["name"]
        axes.plot(range(len(plain)), plain, color=f"C{i}", label=as_text(name))
        label = as_text(f"{name}, contexts by frequency")
        axes.plot(range(len(weighted)), weighted, ":", color=f"C{i}", label=label)
    for d in widths:
        axes.axvline(d, color="0.7", lw=0.8, ls="--")
    axes.set(xscale="symlog", xlabel="rank d (dashed: hidden sizes 512 … 4,096)", ylim=(0, 1.02), xlim=(0, None))
    axes.set_ylabel("W-error of the best rank-d matrix")
    axes.legend(fontsize=7, frameon=False)
    save(figure, file)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of ngrams.json."""
    from bottleneck.studies.measure.ngrams import measure  # here, so that --help loads no torch

    others = other_results(c.study.beside)
    content = measure(c, folder)
    V = content["vocab"]
    widths = [d for d in (512, 1024, 2048, 4096) if d < V]
    rows = list(zip(range(V + 1), content["w_error"], content["w_error_weighted"]))
    lines = [content, *others]
    return write(folder, c.study.name, content, columns=COLUMNS, rows=rows, draw=lambda f: draw(lines, widths, f))


RUNS = tuple((d, b) for d in ("pile", "imdb", "wikitext103") for b in ("pythia-160m", "llama-2-7b"))
STUDIES.register(
    Study(
        name="ngrams",
        summary="error of the best rank-d matrix for the 5-grams of a text, every d (study.beside=FOLDERS of others)",
        figure="Fig. 7",
        schema=Ngrams,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                8,
                "Fig. 7",
                "W-error of 5-grams, two tokenizers, three texts",
                (
                    *(f"{STUDY} study=ngrams data={d} backbone={b} hydra.run.dir=paper/{d}-{b}" for d, b in RUNS[1:]),
                    f"{STUDY} study=ngrams data={RUNS[0][0]} backbone={RUNS[0][1]} "
                    f"'study.beside=[{','.join(f'paper/{d}-{b}' for d, b in RUNS[1:])}]'",
                ),
                "0.1 h each, computed: (4/3) V³ operations, twice; without a GPU 0.75 h on two cores, measured "
                "(study.precision=float32)",
            ),
        ),
    )
)

"""The commands for every figure of the paper and of the debate since, with the GPU hours of each: `python -m bottleneck.study experiment=paper`.

Hours are of one H200. Heads: tokens over the measured tokens/s (launch/LOG.md), for sizes that were not run the measured parts added
up. Checkpoints: counted, see `visiting`.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple

SIZES = {
    "14m": 14e6,
    "31m": 31e6,
    "70m": 70e6,
    "160m": 162e6,
    "410m": 405e6,
    "1b": 1.01e9,
    "1.4b": 1.41e9,
    "2.8b": 2.78e9,
    "6.9b": 6.86e9,
    "12b": 11.8e9,
}  # Pythia's parameters
SMALL = ("14m", "31m", "70m", "160m", "410m")
CHECKPOINTS = 154  # of each Pythia model
BYTES_PER_SECOND = 1e9  # of weights into a GPU, from a local cache of the Hub
SECONDS = 5.0  # beside reading: building a model, proving its hidden states, 50,000 tokens through it


class Figure(NamedTuple):
    """name: as in the paper; hours: of one GPU, with how they were found."""

    name: str
    about: str
    commands: tuple[str, ...]
    hours: str


def visiting(sizes: tuple[str, ...], checkpoints: int = CHECKPOINTS) -> tuple[float, float]:
    """GPU hours and gigabytes of weights (two bytes a parameter) of a study that visits checkpoints of Pythia models."""
    weights = checkpoints * sum(2 * SIZES[s] for s in sizes)
    return (weights / BYTES_PER_SECOND + checkpoints * len(sizes) * SECONDS) / 3600, weights / 1e9


def _visit(sizes: tuple[str, ...]) -> str:
    hours, size = visiting(sizes)
    return f"{hours:.1f} h, counted: {CHECKPOINTS} checkpoints x {len(sizes)} models, {size:,.0f} GB to download"


def _models(names: tuple[str, ...]) -> str:
    return f"'study.models=[{','.join(names)}]'"


def _pythia(sizes: tuple[str, ...]) -> str:
    return _models(tuple(f"EleutherAI/pythia-{s}" for s in sizes))


STUDY = "python -m bottleneck.study experiment=paper"
FAMILIES = (
    tuple(f"openai-community/{n}" for n in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")),
    tuple(f"facebook/opt-{n}" for n in ("125m", "350m", "1.3b", "2.7b", "6.7b")),
    tuple(f"EleutherAI/pythia-{n}" for n in SIZES),
    ("google/gemma-2b",),
)
FIGURE7 = tuple((d, b) for d in ("pile", "imdb", "wikitext103") for b in ("pythia-160m", "llama-2-7b"))

FIGURES = (
    Figure(
        "Fig. 1a, 1b",
        "loss of every checkpoint; the scaling law",
        (
            f"{STUDY} study=saturation data=pile study.steps=pythia {_pythia(tuple(SIZES))} hydra.run.dir=paper/saturation",
        ),
        _visit(tuple(SIZES)),
    ),
    Figure(
        "Table 1",
        "best against final checkpoint, from the results that EleutherAI published",
        (
            "git clone https://github.com/EleutherAI/pythia",
            f"{STUDY} study=downstream study.results=pythia/evals/pythia-v1/pythia-160m/zero-shot 'study.tasks=[lambada_openai,arc_easy,sciq]'",
        ),
        "none",
    ),
    Figure(
        "Fig. 2",
        "anisotropy of every layer, a command a family: tokenizers differ",
        tuple(f"{STUDY} study=anisotropy data=pile data.block_size=1024 {_models(family)}" for family in FAMILIES),
        "0.1 h, counted: 20 models, 80 GB to download",
    ),
    Figure(
        "Fig. 3",
        "anisotropy along training",
        (f"{STUDY} study=anisotropy data=pile study.steps=pythia {_pythia(SMALL)} hydra.run.dir=paper/anisotropy",),
        _visit(SMALL),
    ),
    Figure(
        "Fig. 4, 5",
        "singular values and entropy of the head along training (study.hidden=false: the head alone is read, no GPU)",
        (f"{STUDY} study=spectrum data=pile study.steps=pythia {_pythia(SMALL)} hydra.run.dir=paper/spectrum",),
        _visit(SMALL),
    ),
    Figure(
        "Fig. 6",
        "perplexity of rank-constrained heads",
        (
            "python train.py -m experiment=figure6 backbone=pythia-70m,pythia-160m,pythia-410m,pythia-1b hydra.sweep.dir=paper/figure6",
            "python train.py experiment=figure6 backbone=pythia-1b trainer=ddp trainer.devices=2",
        ),
        "160m 0.08 h, 1b 0.29 h, measured; 70m 0.05 h, 410m 0.15 h, counted",
    ),
    Figure(
        "Fig. 11",
        "learning rate of each rank; the paper's literal start is head=normal",
        (
            "python train.py experiment=figure6 backbone=pythia-160m optim=grid 'optim.lrs=[1e-3,2e-3,5e-3,1e-2,2e-2,5e-2]'",
        ),
        "0.35 h, counted: 48 heads on one forward",
    ),
    Figure(
        "Fig. 7",
        "W-error of 5-grams, two tokenizers, three texts",
        (
            *(f"{STUDY} study=ngrams data={d} backbone={b} hydra.run.dir=paper/{d}-{b}" for d, b in FIGURE7[1:]),
            f"{STUDY} study=ngrams data={FIGURE7[0][0]} backbone={FIGURE7[0][1]} 'study.beside=[{','.join(f'paper/{d}-{b}' for d, b in FIGURE7[1:])}]'",
        ),
        "0.1 h each, counted: (4/3) V³ operations, twice; without a GPU 0.75 h on two cores, measured (study.precision=float32)",
    ),
    Figure(
        "Sec. 5.2",
        "tail energy, bound, and what heads cost",
        (f"{STUDY} study=theory data=pile backbone=pythia-1b study.curve=paper/figure6/3",),
        "under 0.05 h",
    ),
    Figure(
        "the curve without training",
        "closed forms, KL and agreement",
        (f"{STUDY} study=estimate data=pile backbone=pythia-1b study.calibration_tokens=65536",),
        "under 0.05 h",
    ),
    Figure(
        "2603.10145",
        "share of the logit gradient that reaches the hidden state",
        tuple(
            f"{STUDY} study=gradient data=pile data.block_size=1024 backbone={b}"
            for b in ("gpt2", "pythia-1b", "llama-2-7b")
        ),
        "under 0.05 h each",
    ),
    Figure(
        "2602.20433",
        "the metrics above beside the loss",
        (f"{STUDY} study=geometry 'study.results=[paper/saturation,paper/anisotropy,paper/spectrum]'",),
        "none",
    ),
)


def listing() -> str:
    """All of it as text: figure, hours, commands to copy."""
    lines = [
        "The commands for every figure, by Hub names; hours of one H200. What is stopped goes on with the same command and hydra.run.dir.",
        "",
    ]
    for f in FIGURES:
        lines += [
            f"{f.name}: {f.about}",
            *textwrap.wrap(f"GPU: {f.hours}", 130, initial_indent="  ", subsequent_indent="  "),
            *(f"    {c}" for c in f.commands),
            "",
        ]
    return "\n".join(lines)

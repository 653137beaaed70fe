"""The commands that reproduce every figure, with their GPU hours: `python -m bottleneck.study experiment=paper`.

Hours are of one H200. Training: tokens over the measured tokens/s (docs/log.md); sizes that were not run are
interpolated from measured parts. Visits to checkpoints are computed, see `visiting`.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Iterable

STUDY = "python -m bottleneck.study experiment=paper"
# parameters of Pythia's models
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
}
SMALL = ("14m", "31m", "70m", "160m", "410m")
CHECKPOINTS = 154  # of each Pythia model
BYTES_PER_SECOND = 1e9  # of weights into a GPU, from a local cache of the Hub
SECONDS = 5.0  # besides reading: building a model, verifying its hidden states, 50,000 tokens through it


@dataclass(frozen=True)
class Figure:
    """One figure and the commands that reproduce it.

    Attributes:
        place: position in the listing, rising: the paper's own order, then later work.
        name: as in the paper.
        hours: of one GPU, and how they were determined.
    """

    place: float
    name: str
    about: str
    commands: tuple[str, ...]
    hours: str


# figures of heads that train.py trains; every study declares its own
TRAINING = (
    Figure(
        6,
        "Fig. 6",
        "perplexity of rank-constrained heads",
        (
            "python train.py -m experiment=figure6 backbone=pythia-70m,pythia-160m,pythia-410m,pythia-1b "
            "hydra.sweep.dir=paper/figure6",
            "python train.py experiment=figure6 backbone=pythia-1b trainer=ddp trainer.devices=2",
        ),
        "160m 0.08 h, 1b 0.29 h, measured; 70m 0.05 h, 410m 0.15 h, interpolated",
    ),
    Figure(
        7,
        "Fig. 11",
        "learning rate of each rank; the paper's literal start is head=normal",
        (
            "python train.py experiment=figure6 backbone=pythia-160m optim=grid "
            "'optim.lrs=[1e-3,2e-3,5e-3,1e-2,2e-2,5e-2]'",
        ),
        "0.35 h, computed: 48 heads on one forward",
    ),
)


def visiting(sizes: tuple[str, ...], checkpoints: int = CHECKPOINTS) -> tuple[float, float]:
    """GPU hours and gigabytes of weights (two bytes a parameter) of a study that visits Pythia's checkpoints."""
    weights = checkpoints * sum(2 * SIZES[s] for s in sizes)
    return (weights / BYTES_PER_SECOND + checkpoints * len(sizes) * SECONDS) / 3600, weights / 1e9


def visit_hours(sizes: tuple[str, ...]) -> str:
    """`visiting` in words."""
    hours, size = visiting(sizes)
    return f"{hours:.1f} h, computed: {CHECKPOINTS} checkpoints x {len(sizes)} models, {size:,.0f} GB to download"


def models(names: Iterable[str]) -> str:
    """The override `study.models` for several Hub names, quoted for a shell."""
    return f"'study.models=[{','.join(names)}]'"


def pythia(sizes: Iterable[str]) -> str:
    """The override `study.models` for several Pythia models."""
    return models(f"EleutherAI/pythia-{s}" for s in sizes)


def listing(figures: Iterable[Figure]) -> str:
    """All figures as text: name, hours, commands to copy."""
    lines = [
        "The commands for every figure, with Hub names and hours of one H200. "
        "To resume an interrupted command, repeat it with the same hydra.run.dir.",
        "",
    ]
    for f in sorted((*figures, *TRAINING), key=lambda f: f.place):
        lines.append(f"{f.name}: {f.about}")
        lines += textwrap.wrap(f"GPU: {f.hours}", 120, initial_indent="  ", subsequent_indent="  ")
        lines += [*(f"    {c}" for c in f.commands), ""]
    return "\n".join(lines)

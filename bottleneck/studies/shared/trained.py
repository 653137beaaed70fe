"""The trained heads of a backbone, by rank, from a run of train.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from bottleneck.core.errors import check
from bottleneck.heads.key import MATRICES
from bottleneck.results import curve


@dataclass
class Trained:
    """The best trained head of each rank.

    Attributes:
        losses: by rank, nats a token.
        own: loss of the original head.
        full: loss of the trained head of rank d, if there is one.
    """

    data: str
    tokens: int
    losses: dict[int, float]
    own: float
    full: Optional[float]

    @property
    def reference(self) -> float:
        """The loss that gaps are measured from: the lower of the original head's and the trained full-rank head's."""
        return self.own if self.full is None else min(self.own, self.full)


def with_trained(ranks: list[int], trained: Optional[Trained], hidden_size: int) -> list[int]:
    """The ranks of a study and those of the trained curve, up to the hidden size, rising."""
    return sorted({*ranks, *(r for r in (trained.losses if trained else ()) if r <= hidden_size)})


def read_trained(path: str, key: str, backbone: str, backbone_hash: str) -> Trained:
    """The curve of a backbone in a curve.json or in a run's folder.

    Args:
        key: config key, for messages.
    Raises: UserError if there is no curve of this backbone (by the hash of its weights), or several.
    """
    file = Path(path).expanduser()
    check(file.exists(), f"{key}={path}: no such file or folder")
    lines = curve.merge(curve.read([file]))
    own = [line for line in lines if line["backbone_hash"] == backbone_hash]
    others = ", ".join(sorted({line["backbone"] for line in lines}))
    check(bool(own), f"{key}={path}: no curve of {backbone} there (weights {backbone_hash}); it has {others}")
    several = f"{len(own)} curves of {backbone} with different text, budget or recipe; give one run"
    check(len(own) == 1, f"{key}={path}: {several}")
    (line,) = own
    losses: dict[int, float] = {}
    for h in line["heads"]:
        if h["best"] and h.get("kind", "low_rank") in MATRICES:  # the formulas are about matrices
            losses[h["rank"]] = min(h["loss"], losses.get(h["rank"], float("inf")))
    full = line["trained_reference"] and line["trained_reference"]["loss"]
    return Trained(line["data"], line["tokens"], dict(sorted(losses.items())), line["reference"]["loss"], full)

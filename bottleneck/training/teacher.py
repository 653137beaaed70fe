"""head.teacher=FOLDER: a head of an earlier run is the teacher of this run's heads, and closed forms approximate it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from bottleneck.backbone.model import Backbone, FullHead
from bottleneck.config.schema import TrainConfig
from bottleneck.core.errors import check
from bottleneck.heads.key import LOW_RANK, HeadKey
from bottleneck.training.finished_run import FinishedRun, open_run


class EarlierHead(NamedTuple):
    """A finished run and its best head of the highest rank."""

    run: FinishedRun
    row: dict[str, Any]

    @property
    def name(self) -> str:
        """The head's name with the hash of its file. It identifies the teacher independently of the folder's path."""
        return f"{HeadKey.of(self.row).name}:{self.run.hash(self.row)}"

    def check_shape(self, hidden_size: int, vocab_size: int) -> None:
        """Raises UserError if this run's backbone has another shape. Needs no weights."""
        theirs, ours = [self.run.curve["vocab_size"], self.run.curve["hidden_size"]], [vocab_size, hidden_size]
        about = f"its heads are for a vocabulary and hidden size of {theirs}, this backbone's are {ours}"
        check(theirs == ours, f"head.teacher={self.run.folder}: {about}")

    @torch.no_grad()
    def head(self, backbone: Backbone) -> FullHead:
        """The head as a `FullHead` on the device and in the dtype of the original head.

        Raises UserError for another backbone.
        """
        theirs = self.run.curve["backbone_hash"]
        about = f"its heads were trained on backbone {theirs}, this run's is {backbone.hash}"
        check(theirs == backbone.hash, f"head.teacher={self.run.folder}: {about}")
        original = backbone.lm_head.weight
        if HeadKey.of(self.row).kind != LOW_RANK:
            return FullHead(self.run.dense(self.row).to(original))
        A, B = (t.to(original.device) for t in self.run.factors(self.row))
        return FullHead((A @ B).to(original.dtype))


def resolve(c: TrainConfig) -> tuple[TrainConfig, Optional[EarlierHead]]:
    """The earlier head that head.teacher=FOLDER names, and the config with its name in place of the folder.

    Recipes and checkpoints hold that name, so the folder may move. Raises UserError as `open_teacher`.
    """
    found = open_teacher(c.head.teacher)
    if found is None:
        return c, None
    return dataclasses.replace(c, head=dataclasses.replace(c.head, teacher=found.name)), found


def open_teacher(value: str) -> Optional[EarlierHead]:
    """The head in a folder, or None where `value` is own or trained.

    Raises UserError where it is not a finished run's.
    """
    if value in ("own", "trained"):
        return None
    run = open_run(Path(value).expanduser())
    check(bool(run.ranks), f"head.teacher={value}: all heads there diverged")
    return EarlierHead(run, run.pick(run.ranks[-1]))

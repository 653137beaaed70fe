"""A head of an earlier run that teaches this run's, and that they start from: head.teacher=FOLDER."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from bottleneck.backbone.model import Backbone, FullHead
from bottleneck.core.errors import check
from bottleneck.heads.bank import HeadKey
from bottleneck.training.finished_run import Run, open_run


class Teacher(NamedTuple):
    """The best head of the highest rank of a finished run, and that run."""

    run: Run
    row: dict[str, Any]

    @property
    def name(self) -> str:
        """Which head it is, wherever its folder lies: its name and the hash of its file. What a run is resumed and compared by."""
        return f"{HeadKey(self.row['rank'], self.row['lr'], self.row['seed']).name}:{self.run.hash(self.row)}"

    def check_shape(self, hidden_size: int, vocab_size: int) -> None:
        """Raises UserError where this run's backbone is of another shape; before its weights are loaded."""
        theirs = [self.run.curve["vocab_size"], self.run.curve["hidden_size"]]
        check(
            theirs == [vocab_size, hidden_size],
            f"head.teacher={self.run.folder}: its heads are for a vocabulary and hidden size of {theirs}, this backbone's are {[vocab_size, hidden_size]}",
        )

    @torch.no_grad()
    def head(self, backbone: Backbone) -> FullHead:
        """W = A B as the backbone's own head would be held, in its dtype. Raises UserError where it was trained on another backbone."""
        theirs = self.run.curve["backbone_hash"]
        check(
            theirs == backbone.hash,
            f"head.teacher={self.run.folder}: its heads were trained on backbone {theirs}, this run's is {backbone.hash}",
        )
        own = backbone.lm_head.weight
        A, B = (t.to(own.device) for t in self.run.factors(self.row))
        return FullHead((A @ B).to(own.dtype))


def open_teacher(value: str) -> Optional[Teacher]:
    """None where `value` is not a folder but own or trained. Raises UserError where the folder is not that of a finished run."""
    if value in ("own", "trained"):
        return None
    run = open_run(Path(value).expanduser())
    check(bool(run.ranks), f"head.teacher={value}: all heads there diverged")
    return Teacher(run, run.pick(run.ranks[-1]))

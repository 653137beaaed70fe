"""Teachers from outside the run.

head.teacher=FOLDER: a head of an earlier run teaches this run's heads, and closed forms approximate it.
head.teacher=model:PATH: another model, the target of speculative decoding, teaches them; it is run on the same tokens.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch

from bottleneck.backbone.model import DTYPES, Backbone, FullHead, label, load_shape, load_tokenizer
from bottleneck.backbone.target import Target, in_its_words, target_config
from bottleneck.config.checks import MODEL
from bottleneck.config.schema import BackboneConfig, TrainConfig
from bottleneck.core.errors import UserError, check
from bottleneck.data.cache import tokenizer_hash
from bottleneck.heads.key import LOW_RANK, HeadKey
from bottleneck.training.finished_run import FinishedRun, open_run
from bottleneck.training.run_folder import has_checkpoint, has_results

log = logging.getLogger(__name__)


class EarlierHead(NamedTuple):
    """A finished run and its best head of the highest rank, among those that are one matrix."""

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


@dataclasses.dataclass
class TargetModel:
    """The model of head.teacher=model:PATH.

    Attributes:
        named: the option that names it, for messages; None: head.teacher.
        loaded: the model, once its weights are in memory.
    """

    config: BackboneConfig
    named: Optional[str] = None
    loaded: Optional[Target] = None

    def check_fits(self, tokenizer: Any, vocab_size: int, block_size: int) -> None:
        """Raises UserError unless it reads the run's tokens as they are meant. Needs no weights."""
        name = self.named or f"head.teacher=model:{label(self.config)}"
        try:
            theirs, (_, context, rows) = load_tokenizer(self.config), load_shape(self.config)
        except UserError as error:
            raise in_its_words(self.config, error, self.named) from error
        same = tokenizer_hash(theirs) == tokenizer_hash(tokenizer)
        check(same, f"{name}: its tokenizer is not the backbone's; a target and its draft need the same vocabulary")
        entries = max(tokenizer.get_vocab().values()) + 1
        few = f"its head has {rows} rows, its tokenizer {entries} entries"
        check(rows >= entries or rows >= vocab_size, f"{name}: {few}")
        long = f"data.block_size={block_size}: longer than the context of {name}; allowed are 2 to {context}"
        check(context is None or block_size <= context, long)

    def load(self, vocab_size: int, device_type: str, *, block_size: int) -> Target:
        """The model on the CPU, in the dtype that it has on the device. Raises UserError where it cannot be loaded."""
        if self.loaded is None:
            dtype = self.config.dtype
            kind = dtype if dtype != "auto" else ("bfloat16" if device_type == "cuda" else "float32")
            assert kind in DTYPES
            cfg = dataclasses.replace(self.config, dtype=kind)
            self.loaded = Target.load(cfg, vocab_size, block_size=block_size, named=self.named)
            log.info("target: %s, weights %s", self.loaded.name, self.loaded.hash)
        return self.loaded


Teacher = Union[EarlierHead, TargetModel, None]


def resolve(c: TrainConfig, run_dir: Path, device_type: str) -> tuple[TrainConfig, Teacher]:
    """The teacher that head.teacher names, and the config with the teacher's identity in place of a folder or path.

    Recipes and checkpoints hold that identity, so the folder may move. A model's identity is read from its weights:
    here only where it must be compared with that of an earlier run, else by `identified`, when all else is checked.
    Raises UserError as `open_teacher`.
    """
    if c.head.teacher.startswith(MODEL):
        model = TargetModel(target_config(c.head.teacher.removeprefix(MODEL), c.backbone.dtype))
        begun = c.ckpt_path is not None or has_checkpoint(run_dir) or has_results(run_dir)
        return (identified(c, model, device_type) if begun else c), model
    found = open_teacher(c.head.teacher)
    return (c if found is None else _named(c, found.name)), found


def identified(c: TrainConfig, teacher: Teacher, device_type: str) -> TrainConfig:
    """The config with the hash of the target's weights in place of its path. Loads the target."""
    if not isinstance(teacher, TargetModel):
        return c
    vocab_size = load_shape(c.backbone)[2]
    return _named(c, MODEL + teacher.load(vocab_size, device_type, block_size=c.data.block_size).hash)


def _named(c: TrainConfig, name: str) -> TrainConfig:
    return dataclasses.replace(c, head=dataclasses.replace(c.head, teacher=name))


def open_teacher(value: str) -> Optional[EarlierHead]:
    """The head in a folder, or None where `value` is own or trained.

    Raises UserError where it is not a finished run's.
    """
    if value in ("own", "trained"):
        return None
    run = open_run(Path(value).expanduser())
    check(bool(run.ranks), f"head.teacher={value}: all heads there diverged")
    return EarlierHead(run, run.matrices()[-1])

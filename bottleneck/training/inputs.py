"""Inputs of a run: the backbone's shape, the text and the heads' keys, and then the backbone itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Optional

import pytorch_lightning as pl
import torch

from bottleneck.backbone import sharding
from bottleneck.backbone.documents import Documents
from bottleneck.backbone.model import Backbone, label, load_shape, load_tokenizer
from bottleneck.config import checks
from bottleneck.config.schema import DataConfig, TrainConfig
from bottleneck.core.errors import check
from bottleneck.data.cache import Corpus
from bottleneck.data.module import TextData, leading_bos
from bottleneck.data.prepare import prepare
from bottleneck.heads.key import HeadKey, full_rank_index
from bottleneck.training import recipe
from bottleneck.training.optim import bank_keys
from bottleneck.training.teacher import EarlierHead, TargetModel, Teacher

log = logging.getLogger(__name__)
FEW = 4096  # fewer validation tokens than this give uncertain perplexities


@dataclass(frozen=True)
class Inputs:
    """What is known before any weights are loaded.

    Attributes:
        keys: of the run's heads: ranks x rates x seeds.
        teacher: of head.teacher=FOLDER or model:PATH.
    """

    hidden_size: int
    vocab_size: int
    keys: list[HeadKey]
    corpus: Corpus
    data: TextData
    teacher: Teacher

    def facts(self, c: TrainConfig) -> dict[str, dict[str, Any]]:
        """Identifying facts of each head, by head name, for trackers."""
        shape: dict[str, Any] = {"hidden_size": self.hidden_size, "vocab_size": self.vocab_size}
        names: dict[str, Any] = {"data": self.corpus.name, "backbone": label(c.backbone)}
        return {key.name: recipe.head_facts(c, key, **shape, **names) for key in self.keys}


def load_inputs(c: TrainConfig, teacher: Teacher) -> Inputs:
    """Read the backbone's config and prepare the text. Raises UserError if they do not fit the run or each other."""
    hidden_size, context, vocab_size = load_shape(c.backbone)
    groups = checks.check_shapes(c, hidden_size, context)
    keys = bank_keys(c.optim, c.head.init, groups, c.seed, hidden_size, vocab_size)
    if isinstance(teacher, EarlierHead):
        teacher.check_shape(hidden_size, vocab_size)
    if c.head.teacher == "trained":
        full_rank_index(keys, hidden_size)
    tokenizer = load_tokenizer(c.backbone)
    if isinstance(teacher, TargetModel):
        teacher.check_fits(tokenizer, vocab_size, c.data.block_size)
    corpus = prepare(c.data, tokenizer)
    top = max(int(corpus.train.max()), int(corpus.validation.max()))
    check(top < vocab_size, f"backbone.tokenizer: makes id {top}, the backbone's vocabulary ends at {vocab_size - 1}")
    if len(corpus.validation) - 1 < FEW:
        advice = "give data.validation_files, more text, or a larger data.validation_fraction"
        few = f"{len(corpus.validation) - 1:,} validation tokens, which is few: perplexities are uncertain"
        log.info("%s has %s; %s", corpus.name, few, advice)
    data = TextData(
        corpus,
        c.data.block_size,
        batch=c.batch_size,
        steps=checks.total_steps(c),
        micro_batch=c.trainer.micro_batch_size,
        seed=c.data.seed,
        bos=leading_bos(tokenizer),
        epochs=c.data.epochs,
    )
    return Inputs(hidden_size, vocab_size, keys=keys, corpus=corpus, data=data, teacher=teacher)


def separate_documents(backbone: Backbone, data: DataConfig, corpus: Corpus, bos: Optional[int]) -> None:
    """Keep the documents of a text apart as its config asks. Raises UserError if the backbone cannot.

    Args: bos: the id that the tokenizer puts before every text, see `data.module.leading_bos`.
    """
    if data.reset_positions or data.mask_documents:
        documents = Documents(int(corpus.manifest["eos"]), data.reset_positions, data.mask_documents, bos)
        backbone.separate(documents, data.block_size)


def load_backbone(c: TrainConfig, inputs: Inputs, *, trainer: pl.Trainer) -> Backbone:
    """The frozen backbone on the trainer's device, whole or this process's shard, compiled where it pays."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for kernels that use the current device; Lightning sets it in fit
    if c.trainer.shard in checks.SHARDED:
        sharding.connect(trainer.strategy)
        backbone = sharding.load(c.backbone, c.trainer.shard, device, block_size=c.data.block_size)
    else:
        backbone = Backbone.load(c.backbone, device, block_size=c.data.block_size)
    separate_documents(backbone, c.data, inputs.corpus, inputs.data.bos)
    found, wanted = [backbone.vocab_size, backbone.hidden_size], [inputs.vocab_size, inputs.hidden_size]
    check(found == wanted, f"backbone {backbone.name}: its head is {found}, its config says {wanted}")
    heads = f"{len(inputs.keys)} head{'s' * (len(inputs.keys) > 1)}"
    steps = f"{checks.total_steps(c)} steps of {c.batch_size * c.data.block_size} tokens"
    log.info("%s: d = %d, V = %d; %s, %s", backbone.name, inputs.hidden_size, inputs.vocab_size, heads, steps)
    if checks.compiles(c, device.type):
        rows = min(c.trainer.micro_batch_size, c.batch_size // (c.trainer.devices * c.trainer.num_nodes))
        compiled = backbone.compile_layers((rows, c.data.block_size))
        unknown = f"family {backbone.family} does not name its layers, not compiled"
        log.info("backbone: %s", "layers are compiled" if compiled else unknown)
    return backbone

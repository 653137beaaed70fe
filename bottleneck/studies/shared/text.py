"""The text of a study: the same validation tokens for every checkpoint, and training tokens for calibration.

Dims: N sequences, T tokens predicted per sequence.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Optional

import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone, load_shape, load_tokenizer
from bottleneck.core.errors import check
from bottleneck.data.cache import tokenizer_hash
from bottleneck.data.module import IGNORE, StepBatches, ValidationBlocks, leading_bos
from bottleneck.data.prepare import Corpus, prepare
from bottleneck.studies.shared.config import ONE_TEXT, StudyConfig
from bottleneck.studies.shared.series import Checkpoint

log = logging.getLogger(__name__)


@dataclass
class StudyText:
    """Blocks of the validation stream, spread evenly over it.

    Attributes:
        tokens: number of predicted tokens, over all blocks.
        entries: of the tokenizer; rows of a head from there on are padding.
    """

    corpus: Corpus
    block: int
    bos: Optional[int]
    indices: list[int]
    tokens: int
    entries: int

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, micro_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [N, T] and targets [N, T], IGNORE where nothing is predicted."""
        blocks, left = ValidationBlocks(self.corpus, self.block, self.bos), self.tokens
        for start in range(0, len(self.indices), micro_batch):
            inputs, targets = map(torch.stack, zip(*(blocks[i] for i in self.indices[start : start + micro_batch])))
            counted = (targets != IGNORE).flatten().cumsum(0).view_as(targets)
            targets = targets.masked_fill(counted > left, IGNORE)
            left -= int((targets != IGNORE).sum())
            yield inputs, targets

    def read_by(self, backbone: Backbone) -> dict[str, Any]:
        """The first keys of a result: whose numbers they are, and on which text."""
        return {
            "backbone": backbone.name,
            "backbone_hash": backbone.hash,
            "hidden_size": backbone.hidden_size,
            "vocab_size": backbone.vocab_size,
            "data": self.corpus.name,
        }

    def calibration(self, tokens: int, seed: int) -> Tensor:
        """Token ids [N, T+1] of the first training sequences in the order of `data.seed`, as train.py takes them."""
        order = StepBatches(self.corpus, self.block, 1, 1, seed, self.bos)
        have = len(order.order) * self.block
        if have < tokens:
            said = "%s has %d training tokens in whole blocks, %d were requested: all are used"
            log.warning(said, self.corpus.name, have, tokens)
        return order.calibration(tokens)

    @property
    def identity(self) -> dict[str, Any]:
        """What measured numbers depend on."""
        return {"data": self.corpus.fingerprint, "block_size": self.block, "tokens": self.tokens}


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of 0 … count−1, evenly spread, rising; all of them if there are no more."""
    if wanted >= count:
        return list(range(count))
    return sorted({(2 * i + 1) * count // (2 * wanted) for i in range(wanted)})


def entries_of(tokenizer: Any) -> int:
    """The largest id that the tokenizer has a token for, plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def _stored(cp: Checkpoint) -> Optional[bytes]:
    file = Path(cp.backbone.path).expanduser() / "tokenizer.json"
    return file.read_bytes() if file.is_file() else None


def _check_same_tokenizer(cp: Checkpoint, first: Checkpoint, tokenizer: Any) -> None:
    same = tokenizer_hash(load_tokenizer(cp.backbone)) == tokenizer_hash(tokenizer)
    check(same, f"{cp.where}: its tokenizer is not that of {first.where}; losses are compared on the same tokens only")


def _check_models(c: StudyConfig, series: list[Checkpoint], tokenizer: Any) -> None:
    """Raise UserError if a tokenizer differs from the first one, or the blocks exceed a model's context."""
    first = {cp.model: cp for cp in reversed(series)}  # of each model its first checkpoint
    for cp in first.values():
        _, context, _ = load_shape(cp.backbone)
        fits = context is None or c.data.block_size <= context
        allowed = f"longer than the context of {cp.label}; allowed are 2 to {context}"
        check(fits, f"data.block_size={c.data.block_size}: {allowed}")
        if cp.model != series[0].model and not c.backbone.tokenizer:
            _check_same_tokenizer(cp, series[0], tokenizer)
    if not c.backbone.tokenizer:
        stored = _stored(first[series[0].model])
        for cp in series:  # along a series, files of equal bytes are proof enough
            if cp is not first[cp.model] and _stored(cp) not in (None, stored):
                _check_same_tokenizer(cp, series[0], tokenizer)


def study_text(c: StudyConfig, series: list[Checkpoint]) -> StudyText:
    """Prepare the text with the first checkpoint's tokenizer.

    Raises: UserError where another checkpoint's tokenizer differs, or the blocks are longer than a model's context.
    """
    tokenizer = load_tokenizer(series[0].backbone)
    _check_models(c, series, tokenizer)
    apart = c.data.mask_documents or c.data.reset_positions
    check(not apart, "data.mask_documents, data.reset_positions: studies read joined text as it is; leave them out")
    check(not c.data.mix, ONE_TEXT)
    check(c.data.packing == "join", "data.packing=rows: studies read joined text; give data.packing=join")
    corpus = prepare(dataclasses.replace(c.data, validation_tokens=max(c.data.validation_tokens, c.tokens)), tokenizer)
    for cp in {cp.model: cp for cp in reversed(series)}.values():
        top = int(corpus.validation.max())
        size = load_shape(cp.backbone)[2]
        check(top < size, f"{cp.where}: its vocabulary ends at {size - 1}, the tokenizer makes id {top}")
    have, block = len(corpus.validation) - 1, c.data.block_size
    if have < c.tokens:
        log.warning("tokens=%d: %s has %d validation tokens, all are used", c.tokens, corpus.name, have)
    tokens = min(have, c.tokens)
    full = have // block  # blocks of the full length; the shorter last one is used only if all are
    wanted = math.ceil(tokens / block)
    indices = list(range(math.ceil(have / block))) if wanted > full else spread(full, wanted)
    return StudyText(corpus, block, leading_bos(tokenizer), indices, tokens, entries_of(tokenizer))

"""Prepared tokens as batches: one training batch is one process's share of one optimizer step.

The sequences of a step depend on `data.seed`, `data.epochs` and the global batch size, not on the number of processes
or the micro-batch size. Dims: N sequences, T tokens predicted per sequence.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from bottleneck.data.cache import Corpus
from bottleneck.data.order import Plan

IGNORE = -100  # a target that does not count


class StepBatches(Dataset):
    """Item `step` is this process's share of the sequences of that step, [N, T+1] ids: inputs and targets overlap.

    With several epochs the first steps / epochs of them read all of the text, and each further epoch reads it in an
    order of its own.

    Raises: UserError if an epoch needs more tokens than the corpus has.
    """

    def __init__(
        self,
        corpus: Corpus,
        block: int,
        batch: int,
        steps: int,
        seed: int,
        bos: Optional[int],
        rank: int = 0,
        world: int = 1,
        epochs: int = 1,
    ):
        self.corpus, self.block, self.batch, self.steps, self.bos = corpus, block, batch, steps, bos
        self.rank, self.share = rank, batch // world
        if corpus.own_epochs:
            order: Any = corpus.order(seed, block, epochs)  # type: ignore[call-arg]
            epochs = 1
        else:
            order = corpus.order(seed, block)
        self.order = order
        needed = math.ceil(steps / epochs) * batch  # blocks of one epoch
        corpus.check_budget(order, needed, block, epochs)
        self.plan = Plan(order, needed, epochs, seed)

    def __len__(self) -> int:
        return self.steps

    def blocks(self, indices: np.ndarray) -> Tensor:
        """Token ids [len(indices), T+1] of some blocks of the stream, or of some rows."""
        ids = torch.from_numpy(self.corpus.read(indices, self.block))
        if self.bos is not None:
            ids[:, 0] = self.bos
        return ids

    def __getitem__(self, step: int) -> Tensor:
        first = step * self.batch + self.rank * self.share
        return self.blocks(self.plan[first : first + self.share])

    def calibration(self, tokens: int) -> Tensor:
        """The first sequences of the training order [N, T+1]: at least `tokens` tokens, if there are as many."""
        count = min(math.ceil(tokens / self.block), len(self.order))
        return self.blocks(self.order[:count])


class ValidationBlocks(Dataset):
    """Items (inputs [T], targets [T]) in which all processes together predict every validation token exactly once."""

    def __init__(self, corpus: Corpus, block: int, bos: Optional[int], rank: int = 0, world: int = 1):
        self.parts, self.block, self.bos = corpus.validation_parts(block), block, bos
        self.ends = np.cumsum([part.blocks for part in self.parts])
        self.indices = range(rank, int(self.ends[-1]), world)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        i = int(np.searchsorted(self.ends, self.indices[item], side="right"))
        part = self.parts[i]
        start = (self.indices[item] - int(self.ends[i]) + part.blocks) * part.stride
        ids = torch.from_numpy(part.tokens[start : start + self.block + 1].astype(np.int64))
        inputs = torch.full((self.block,), int(ids[0]))
        targets = torch.full((self.block,), IGNORE)
        inputs[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
        if self.bos is not None:
            inputs[0] = self.bos
        return inputs, targets


def leading_bos(tokenizer: Any) -> Optional[int]:
    """The id that a tokenizer puts before every text (Llama, Gemma, OPT), or None (Pythia, GPT-2).

    Backbones that were trained with it need it, Gemma above all. So every block begins with it; it is never a target.
    """
    ids = tokenizer("a")["input_ids"]
    return ids[0] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else None


class TextData(pl.LightningDataModule):
    """The batches of a run. The stateful loader saves and restores the exact position.

    Raises: UserError if an epoch of the budget needs more tokens than the corpus has.
    """

    def __init__(
        self,
        corpus: Corpus,
        block: int,
        batch: int,
        steps: int,
        micro_batch: int,
        seed: int,
        bos: Optional[int],
        epochs: int = 1,
    ):
        super().__init__()
        self.corpus, self.block, self.batch, self.steps = corpus, block, batch, steps
        self.micro_batch, self.seed, self.bos, self.epochs = micro_batch, seed, bos, epochs
        self._steps(0, 1)  # checks the budget now, before any weights are loaded

    def _steps(self, rank: int, world: int) -> StepBatches:
        return StepBatches(
            self.corpus, self.block, self.batch, self.steps, self.seed, self.bos, rank, world, self.epochs
        )

    def calibration(self, tokens: int) -> Tensor:
        """The first sequences of the training order, see `StepBatches.calibration`."""
        return self._steps(0, 1).calibration(tokens)

    def domains(self) -> list[tuple[str, int]]:
        """Name and number of validation blocks of each text of a mix; nothing of a single text."""
        parts = self.corpus.validation_parts(self.block)
        return [(part.name, part.blocks) for part in parts] if len(parts) > 1 else []

    def train_dataloader(self) -> StatefulDataLoader:
        trainer = self.trainer
        assert trainer is not None, "Lightning attaches the trainer before it asks for batches"
        pin = trainer.strategy.root_device.type == "cuda"
        return StatefulDataLoader(self._steps(trainer.global_rank, trainer.world_size), batch_size=None, pin_memory=pin)

    def validation_batches(self, rank: int = 0, world: int = 1) -> DataLoader:
        """Batches (inputs [N, T], targets [N, T]) of this process's share of the validation text."""
        return DataLoader(ValidationBlocks(self.corpus, self.block, self.bos, rank, world), batch_size=self.micro_batch)

"""An ordinary script without this project: Lightning trains one low-rank head on a frozen backbone.

Eager logits and `F.cross_entropy`, AdamW, mixed precision, gradients accumulated by Lightning; one run per rank.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Blocks(Dataset):
    """Sequences of T + 1 token ids in a row of prepared tokens."""

    def __init__(self, path: str, block: int):
        dtype = json.loads(Path(path).with_name("manifest.json").read_text())["dtype"]
        self.tokens, self.block = np.memmap(path, dtype=np.dtype(dtype), mode="r"), block

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.block

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.tokens[i * self.block : (i + 1) * self.block + 1].astype(np.int64))


class StockHead(pl.LightningModule):
    """A frozen backbone and one head of a rank."""

    def __init__(self, model: Any, rank: int, lr: float):
        super().__init__()
        self.body, self.lr = model.base_model.requires_grad_(False).eval(), lr
        d, V = model.config.hidden_size, model.config.vocab_size
        self.head = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, V, bias=False))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        with torch.no_grad():
            hidden = self.body(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        logits = self.head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1)


class StepTimes(pl.Callback):
    """Times at which optimizer steps ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step > len(self.ends):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())


def step_seconds(
    model: nn.Module, rank: int, tokens: str, block: int, batch: int, micro: int, steps: int
) -> list[float]:
    """Return the seconds of every optimizer step but the first."""
    gpu = torch.cuda.is_available()
    times = StepTimes()
    trainer = pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if gpu else "32-true",
        max_steps=steps,
        accumulate_grad_batches=batch // micro,
        gradient_clip_val=1.0,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Blocks(tokens, block), batch_size=micro, num_workers=2 if gpu else 0, pin_memory=gpu)
    trainer.fit(StockHead(model, rank, 1e-3), loader)
    return [later - earlier for earlier, later in zip(times.ends, times.ends[1:])]

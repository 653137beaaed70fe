"""The file format of checkpoints: written atomically, with a checksum of the content, and read without running code."""

from __future__ import annotations

import hashlib
import time
import zipfile
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from bottleneck.core.errors import UserError, check
from bottleneck.core.files import write_atomic
from bottleneck.training.run_folder import LAST, PREVIOUS

EVERY, SHARE = 50, 0.05  # of trainer.checkpoint_every=auto
CHECKSUM = "checksum"  # in checkpoint["bottleneck"]; checkpoints of earlier versions have none


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, renamed into place from the checkpoint's own folder.

    Lightning's writer goes through the system's temporary folder, and moving a file from another disk is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        """Write the checkpoint with its checksum. Raises UserError on a full disk, and then keeps the earlier file."""
        path = Path(path)
        about = {k: v for k, v in checkpoint["bottleneck"].items() if k != CHECKSUM}
        content = checkpoint | {"bottleneck": about}
        content["bottleneck"] = about | {CHECKSUM: content_checksum(content)}
        keep = path.with_name(PREVIOUS.name) if path.name == LAST.name else None
        write_atomic(path, lambda part: torch.save(content, part), keep)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: Optional[bool] = None
    ) -> dict[str, Any]:
        """Read a checkpoint. Raises UserError where it is damaged."""
        return read_checkpoint(Path(path))


def content_checksum(content: Any) -> str:
    """SHA-256 of a tree of dicts, lists, tensors and plain values. It depends on the content, not on the file's bytes.

    The order of a dict's keys counts, since the order of optimizer state matters.
    """
    digest = hashlib.sha256()

    def add(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            flat = node.detach().cpu().contiguous().reshape(-1)
            digest.update(f"tensor {node.dtype} {tuple(node.shape)} ".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(node, dict):
            digest.update(f"dict {len(node)} ".encode())
            for key, value in node.items():
                digest.update(f"{key!r} ".encode())
                add(value)
        elif isinstance(node, (list, tuple)):
            digest.update(f"{type(node).__name__} {len(node)} ".encode())
            for value in node:
                add(value)
        else:
            digest.update(f"{node!r} ".encode())

    add(content)
    return digest.hexdigest()


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content. Raises UserError if the file is missing, damaged, or not written by this project.

    Args: mmap: leave the tensors on disk until they are used.
    """
    check(path.is_file(), f"ckpt_path={path}: no such file")
    try:
        with zipfile.ZipFile(path) as parts:  # torch does not compare checksums
            damaged = parts.testzip()
        check(damaged is None, f"checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged zip, a foreign pickle: torch raises many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"ckpt_path={path}: damaged or not a checkpoint: {first[:200]}") from error
    about = checkpoint.get("bottleneck") if isinstance(checkpoint, dict) else None
    step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
    ours = isinstance(about, dict) and isinstance(about.get("config"), dict) and type(step) is int
    check(ours, f"ckpt_path={path}: not a checkpoint of bottleneck")
    assert isinstance(about, dict)
    if CHECKSUM in about:
        rest = {k: v for k, v in about.items() if k != CHECKSUM}
        same = content_checksum(checkpoint | {"bottleneck": rest}) == about[CHECKSUM]
        check(same, f"ckpt_path={path}: damaged: its content does not match its checksum")
    return checkpoint


class SaveLast(pl.Callback):
    """Writes checkpoints/last.ckpt every so many steps and at the end; keeps the one before as previous.ckpt.

    Args: every: steps, or "auto": EVERY of them, and more where writing takes over SHARE of the run's time, since a
        checkpoint of many heads is gigabytes.
    """

    def __init__(self, run_dir: Path, every: str | int):
        self.path = run_dir / LAST
        self.every = EVERY if every == "auto" else int(every)
        self.share = SHARE if every == "auto" else None
        self.step = self.asked = -1
        self.due = float("-inf")  # time.monotonic() from which the next one does not take more than its share

    def save(self, trainer: pl.Trainer) -> None:
        """Save this step, once."""
        if self.step == trainer.global_step:
            return
        begin = time.monotonic()
        trainer.save_checkpoint(self.path)
        end = time.monotonic()
        self.step = trainer.global_step
        if self.share is not None:
            self.due = end + (end - begin) * (1 / self.share - 1)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps or self._now(trainer):
            self.save(trainer)

    def _now(self, trainer: pl.Trainer) -> bool:
        """Whether a checkpoint is due after this step: the first process decides, since saving is a common act."""
        if trainer.global_step % self.every or trainer.global_step == self.asked:
            return False
        self.asked = trainer.global_step
        return self.share is None or bool(trainer.strategy.broadcast(time.monotonic() >= self.due))

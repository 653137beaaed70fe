"""Checkpoints and head files: written whole or not at all, read without running foreign code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import zipfile
from pathlib import Path
from typing import Any, Iterator, Optional

import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout
from pytorch_lightning.plugins.io import TorchCheckpointIO
from safetensors.torch import save

from bottleneck.config.schema import TrainConfig
from bottleneck.core.errors import UserError, check
from bottleneck.core.files import write_atomic
from bottleneck.heads.bank import HeadBank

log = logging.getLogger(__name__)
LAST = Path("checkpoints") / "last.ckpt"
PREVIOUS = Path("checkpoints") / "previous.ckpt"
LOCK = ".lock"
LOCK_SECONDS = 60


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files. Its own writer goes through the system's temporary folder, and moving a file from
    another disk is not atomic; this one stays in the checkpoint's folder. Reading is limited to tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        path = Path(path)
        write_atomic(
            path,
            lambda part: torch.save(checkpoint, part),
            path.with_name(PREVIOUS.name) if path.name == LAST.name else None,
        )

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: Optional[bool] = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Raises UserError where the file is missing, damaged, or not one of ours.

    Args: mmap: leave the tensors on disk until they are used, for a look at the rest.
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
    ours = (
        isinstance(about, dict)
        and isinstance(about.get("config"), dict)
        and isinstance(checkpoint.get("global_step"), int)
    )
    check(ours, f"ckpt_path={path}: not a checkpoint of bottleneck")
    return checkpoint


@contextlib.contextmanager
def alone(run_dir: Path, rank: int) -> Iterator[None]:
    """Only one run works in a folder: process 0 waits for one that is ending. Raises UserError where it does not end."""
    if rank:
        yield
        return
    lock = FileLock(run_dir / LOCK)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(f"hydra.run.dir={run_dir}: another run is at work there") from None
    except (OSError, NotImplementedError) as error:  # file systems without locks
        check(run_dir.is_dir(), f"hydra.run.dir={run_dir}: cannot be written: {error}")
    try:
        yield
    finally:
        lock.release()


def newest(run_dir: Path) -> Optional[tuple[Path, dict[str, Any]]]:
    """The newest checkpoint of a run that is whole, and what it holds; None where there is none.

    Raises: UserError where there are some and none is whole.
    """
    fault: Optional[UserError] = None
    for path in (run_dir / LAST, run_dir / PREVIOUS):
        if path.exists():
            try:
                found = read_checkpoint(path, mmap=True)
            except UserError as error:
                fault = fault or error
                continue
            if fault is not None:
                log.warning("%s; going on from the one before, %s, step %d", fault, path.name, found["global_step"])
            return path, found
    if fault is not None:
        raise fault
    return None


def find_checkpoint(ckpt_path: Optional[str], run_dir: Path) -> Optional[tuple[Path, dict[str, Any]]]:
    """The file to go on from and what it holds, or None to start at step 0.

    `last` without a checkpoint starts anew, so a command with ckpt_path=last can be repeated until it is through; where the
    last one is damaged the one before it is used. Raises UserError where a folder already holds a run that would be overwritten.
    """
    last = run_dir / LAST
    if ckpt_path not in (None, "last"):
        check(Path(ckpt_path).is_file(), f"ckpt_path={ckpt_path}: no such file; give last or a checkpoint file")
    if ckpt_path != "last" and (ckpt_path is None or Path(ckpt_path).resolve() != last.resolve()):
        check(
            not (last.exists() or (run_dir / PREVIOUS).exists()),
            f"hydra.run.dir={run_dir}: holds a run already; give ckpt_path=last to go on with it, or another folder",
        )
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        return newest(run_dir)
    return Path(ckpt_path), read_checkpoint(Path(ckpt_path), mmap=True)


def wanted(ckpt_path: Optional[str], run_dir: Path, restarted: bool) -> Optional[str]:
    """`ckpt_path` as it is, or `last` for a job that is tried again and has a checkpoint of its own by now."""
    own = (run_dir / LAST).exists() or (run_dir / PREVIOUS).exists()
    return "last" if restarted and (ckpt_path is None or own) else ckpt_path


def set_damaged_aside(run_dir: Path, used: Path) -> None:
    """Where a run goes on from its previous.ckpt, a last.ckpt beside it is damaged: as last.ckpt.damaged it is kept, and does
    not take the place of the good one when the next is saved."""
    last = run_dir / LAST
    if used == run_dir / PREVIOUS and last.exists():
        last.replace(last.with_name(last.name + ".damaged"))


# What may change between a run and its resumption: where things are, what they run on, who watches. That weights and
# text are the same is checked by their hashes when the checkpoint is loaded.
FREE = (
    "trainer.",
    "logger.",
    "ckpt_path",
    "data.cache_dir",
    "data.files",
    "data.validation_files",
    "data.prepared",
    "data.name",
    "backbone.path",
    "backbone.name",
    "backbone.tokenizer",
)


def check_same_run(stored: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """A resumed run must be the run that was stored. Raises UserError naming the first key that differs.

    A key that did not exist when the run began has for it the value that changes nothing, its default.
    """
    a, b, defaults = map(_flat, (stored, current, dataclasses.asdict(TrainConfig())))
    a = {key: defaults[key] for key in b if key in defaults} | a
    for key in sorted(a.keys() | b.keys()):
        if key.startswith(FREE):
            continue
        check(
            a.get(key) == b.get(key),
            f"{key}={b.get(key)}: the run in {path} has {a.get(key)}; a run is resumed with the settings it began with",
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def save_heads(bank: HeadBank, folder: Path, metadata: dict[str, str]) -> None:
    """Final heads as `<key>.safetensors` with tensors A [V, r] and B [r, d]; equal heads are equal files."""
    for key in bank.keys:
        tensors = {name: t.cpu().contiguous() for name, t in zip("AB", bank.factors(key))}
        about = metadata | {"rank": key.rank, "lr": key.lr, "seed": key.seed}
        # one metadata entry: safetensors writes several in random order
        content = save(tensors, metadata={"bottleneck": json.dumps(about, sort_keys=True)})
        write_atomic(folder / f"{key.name}.safetensors", lambda part: part.write_bytes(content))


class SaveLast(pl.Callback):
    """checkpoints/last.ckpt every `every` steps and after the last one; the one before stays as previous.ckpt."""

    def __init__(self, run_dir: Path, every: int):
        self.path, self.every = run_dir / LAST, every
        self.step = -1

    def save(self, trainer: pl.Trainer) -> None:
        """Save this step, once."""
        if self.step != trainer.global_step:
            trainer.save_checkpoint(self.path)
            self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.save(trainer)

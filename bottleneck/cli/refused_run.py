"""A refused run leaves nothing in a new folder and changes nothing in an existing one."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from bottleneck.core.held_log import drop_held_logs

HYDRA = ".hydra"  # Hydra's folder in a run's folder: the composed config, the overrides
LOCK = ".lock"
# files of a run that are no results: a folder in which nothing else is new belongs to a refused run
ABOUT = {HYDRA, LOCK, "wandb", "wandb.json"}


@dataclass(frozen=True)
class FolderBefore:
    """A job's folder before the job.

    Attributes:
        names: of the files in it.
        absent: the folder and those above it that did not exist, the deepest first.
    """

    folder: Path
    names: frozenset[str]
    absent: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path) -> FolderBefore:
        """The present state of a folder."""
        folder = folder.absolute()
        names = frozenset(p.name for p in folder.iterdir()) if folder.is_dir() else frozenset()
        return cls(folder, names, tuple(p for p in (folder, *folder.parents) if not p.exists()))

    def restore(self) -> None:
        """Remove what a refused job wrote, unless it has results, or another run is using the folder."""
        drop_held_logs()
        if not self.folder.is_dir():
            return
        new = {p.name for p in self.folder.iterdir()} - self.names
        if any(name not in ABOUT and not name.endswith(".log") for name in new):
            return
        with contextlib.suppress(OSError, Timeout, NotImplementedError):
            with FileLock(self.folder / LOCK, timeout=0) if LOCK in new else contextlib.nullcontext():
                for path in (self.folder / name for name in sorted(new)):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for folder in self.absent:
                folder.rmdir()  # fails if it holds something


_before: Optional[FolderBefore] = None


class NoteFolder(Callback):
    """A Hydra callback, set in conf/: notes the state of a single run's folder before Hydra creates the folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _before
        _before = FolderBefore.of(Path(config.hydra.run.dir))


def folder_before_job() -> FolderBefore:
    """The state of the running job's folder before the job. Called before the job writes."""
    folder = Path(HydraConfig.get().runtime.output_dir).absolute()
    if _before is not None and _before.folder == folder:
        return _before
    found = FolderBefore.of(folder)  # a job of a multirun: Hydra has just made its folder
    # and may work in it, with hydra.job.chdir: then it stays, empty
    made = () if found.names or HydraConfig.get().job.chdir else (folder,)
    return FolderBefore(folder, found.names, made)

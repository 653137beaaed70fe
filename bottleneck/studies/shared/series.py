"""The backbones that a study visits: one model, or checkpoints along the training of one or several models."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from bottleneck.backbone.model import label, load_shape
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import check
from bottleneck.studies.shared.config import StudyConfig
from bottleneck.studies.shared.steps import step_number

log = logging.getLogger(__name__)
Shapes = dict[str, tuple[int, int]]  # hidden size and vocabulary size of each model


@dataclass(frozen=True)
class Checkpoint:
    """One backbone of a series. `step` is None if the model has no checkpoints."""

    model: str
    step: Optional[int]
    backbone: BackboneConfig

    @property
    def label(self) -> str:
        return self.model if self.step is None else f"{self.model}@step{self.step}"

    @property
    def where(self) -> str:
        """The folder, or the Hub name and revision, for messages."""
        return self.backbone.path + (f" (revision {self.backbone.revision})" if self.backbone.revision else "")

    @property
    def key(self) -> str:
        """Key of its partial results: label, place, and for a folder the sizes and times of its weight files."""
        folder = Path(self.backbone.path).expanduser()
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        weights = [(p.name, p.stat()) for p in files if p.suffix in (".safetensors", ".bin", ".gguf")]
        return " ".join([self.label, self.where, *(f"{n}:{s.st_size}:{s.st_mtime_ns}" for n, s in weights)])


def checkpoints(c: StudyConfig) -> list[Checkpoint]:
    """The backbones of a study, model by model, steps rising.

    Raises: UserError if a folder holds no checkpoints or the same step twice, or two models have the same name.
    """
    models = getattr(c.study, "models", None)
    steps = getattr(c.study, "steps", None)
    found: list[Checkpoint] = []
    for path in models or [c.backbone.path]:
        backbone = c.backbone if models is None else dataclasses.replace(c.backbone, path=path, name=None)
        name = label(dataclasses.replace(backbone, revision=None))
        unique = all(cp.model != name for cp in found)
        check(unique, f"study.models: two models are called {name}; give folders of different names")
        found += _series(backbone, name, steps)
    return found


def one_checkpoint(c: StudyConfig) -> Checkpoint:
    """The backbone of a study of a single model. Raises: UserError for a folder of several checkpoints.

    A folder with config.json is a model itself, even if a trainer left checkpoints below it.
    """
    if (Path(c.backbone.path).expanduser() / "config.json").is_file():
        return Checkpoint(label(c.backbone), None, c.backbone)
    found = checkpoints(c)
    taken = f"study={c.study.name} takes one; give {found[-1].backbone.path}"
    check(len(found) == 1, f"backbone.path={c.backbone.path}: holds {len(found)} checkpoints, {taken}")
    return found[0]


def _series(backbone: BackboneConfig, name: str, steps: Optional[list[int]]) -> list[Checkpoint]:
    folder = Path(backbone.path).expanduser()
    if not folder.is_dir():
        if steps is None:
            return [Checkpoint(name, step_number(backbone.revision or ""), backbone)]
        named = (
            f"backbone.revision={backbone.revision}: study.steps={steps[0]}, … names the revisions; give one of them"
        )
        check(backbone.revision is None, named)
        return [Checkpoint(name, s, dataclasses.replace(backbone, revision=f"step{s}")) for s in steps]
    subfolders = {} if backbone.gguf_file else _numbered(folder)
    if not subfolders and steps is None:
        whole = (folder / "config.json").is_file() or bool(backbone.gguf_file)
        check(whole, f"{folder}: no checkpoints there; it holds neither config.json nor subfolders such as step1000")
        return [Checkpoint(name, None, backbone)]
    if (folder / "config.json").is_file():
        names = ", ".join(p.name for p in subfolders.values())
        log.info("%s: its checkpoints %s are visited, not the model in the folder itself", folder, names)
    absent = [s for s in steps or [] if s not in subfolders]
    present = ", ".join(map(str, sorted(subfolders))) or "none"
    check(
        not absent,
        f"study.steps: {folder} has no subfolder for step {absent[0] if absent else ''}; there are {present}",
    )
    out = []
    for number in steps or sorted(subfolders):
        sub = subfolders[number]
        check((sub / "config.json").is_file(), f"{sub}: not a checkpoint (no config.json)")
        out.append(Checkpoint(name, number, dataclasses.replace(backbone, path=str(sub), name=f"{name}@step{number}")))
    return out


def _numbered(folder: Path) -> dict[int, Path]:
    """Subfolders by the step in their names. Raises: UserError where two have the same step."""
    found: dict[int, Path] = {}
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        number = step_number(sub.name)
        if number is None:
            continue
        other = found.get(number, sub)
        check(number not in found, f"{folder}: step {number} exists twice, as {other.name} and {sub.name}")
        found[number] = sub
    return found


def check_same_shapes(series: list[Checkpoint]) -> Shapes:
    """Hidden size and vocabulary size of each model.

    Of a Hub model only the first checkpoint is read here, since each needs a request; the others are compared when
    loaded.
    Raises: UserError if a local checkpoint differs from its model's first.
    """
    shapes: Shapes = {}
    for cp in series:
        if cp.model in shapes and not Path(cp.backbone.path).expanduser().is_dir():
            continue
        width, _, vocabulary = load_shape(cp.backbone)
        check_shape(cp, shapes.setdefault(cp.model, (width, vocabulary)), (width, vocabulary))
    return shapes


def check_shape(cp: Checkpoint, first: tuple[int, int], found: tuple[int, int]) -> None:
    """Raise UserError if a checkpoint's hidden size or vocabulary differs from its model's first checkpoint."""
    for what, a, b in zip(("hidden size", "vocabulary"), found, first):
        of_first = f"that of the first checkpoint of {cp.model} is {b}; one series is one model"
        check(a == b, f"{cp.where}: its {what} is {a}, {of_first}")

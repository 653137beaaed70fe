"""A series of checkpoints: which backbones a study visits, loading one at a time, or only its head.

Dims: D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from bottleneck.backbone.model import Backbone, label, load_shape
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.environment import cores
from bottleneck.core.errors import UserError, check
from bottleneck.studies.config import StudyConfig, step_number

log = logging.getLogger(__name__)
# how checkpoints call their heads, and the embeddings that tied models have in their place
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Checkpoint:
    """One backbone of a series. `step` is None where there is only the one model."""

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
        """What stored results are found by: label, place, and for a folder the sizes and times of its weights."""
        folder = Path(self.backbone.path).expanduser()
        files = (
            sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))
            if folder.is_dir()
            else []
        )
        return " ".join(
            [self.label, self.where, *(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)]
        )


def checkpoints(c: StudyConfig) -> list[Checkpoint]:
    """The backbones of a study, model by model, steps rising.

    Raises: UserError where a folder holds no checkpoints or one step twice, or two models have one name.
    """
    models = getattr(c.study, "models", None)
    steps = getattr(c.study, "steps", None)
    found: list[Checkpoint] = []
    for path in models or [c.backbone.path]:
        backbone = c.backbone if models is None else dataclasses.replace(c.backbone, path=path, name=None)
        name = label(dataclasses.replace(backbone, revision=None))
        check(
            all(cp.model != name for cp in found),
            f"study.models: two models are called {name}; give folders of different names",
        )
        found += _series(backbone, name, steps)
    return found


def one_checkpoint(c: StudyConfig) -> Checkpoint:
    """The backbone of a study that takes one. Raises UserError for a folder of several checkpoints.

    A folder that is a model is that model, whatever checkpoints a trainer left below it.
    """
    if (Path(c.backbone.path).expanduser() / "config.json").is_file():
        return Checkpoint(label(c.backbone), None, c.backbone)
    found = checkpoints(c)
    check(
        len(found) == 1,
        f"backbone.path={c.backbone.path}: holds {len(found)} checkpoints, study={c.study.name} takes one; give {found[-1].backbone.path}",
    )
    return found[0]


def _series(backbone: BackboneConfig, name: str, steps: Optional[list[int]]) -> list[Checkpoint]:
    folder = Path(backbone.path).expanduser()
    if not folder.is_dir():
        if steps is None:
            return [Checkpoint(name, step_number(backbone.revision or ""), backbone)]
        check(
            backbone.revision is None,
            f"backbone.revision={backbone.revision}: study.steps={steps[0]}, … says which revisions to visit; give one of them",
        )
        return [Checkpoint(name, s, dataclasses.replace(backbone, revision=f"step{s}")) for s in steps]
    subfolders: dict[int, Path] = {}
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()) if not backbone.gguf_file else []:
        number = step_number(sub.name)
        if number is None:
            continue
        check(
            number not in subfolders,
            f"{folder}: step {number} is there twice, as {subfolders.get(number, sub).name} and {sub.name}",
        )
        subfolders[number] = sub
    if not subfolders and steps is None:
        whole = (folder / "config.json").is_file() or bool(backbone.gguf_file)
        check(whole, f"{folder}: no checkpoints there; it holds neither config.json nor subfolders such as step1000")
        return [Checkpoint(name, None, backbone)]
    if (folder / "config.json").is_file():
        log.info(
            "%s: its checkpoints %s are visited, not the model in the folder itself",
            folder,
            ", ".join(p.name for p in subfolders.values()),
        )
    absent = [s for s in steps or [] if s not in subfolders]
    check(
        not absent,
        f"study.steps: {folder} has no subfolder for step {absent[0] if absent else ''}; there are {', '.join(map(str, sorted(subfolders))) or 'none'}",
    )
    out = []
    for number in steps or sorted(subfolders):
        sub = subfolders[number]
        check((sub / "config.json").is_file(), f"{sub}: not a checkpoint (no config.json)")
        out.append(Checkpoint(name, number, dataclasses.replace(backbone, path=str(sub), name=f"{name}@step{number}")))
    return out


def check_same_shapes(series: list[Checkpoint]) -> dict[str, tuple[int, int]]:
    """Hidden size and vocabulary of each model. Raises UserError where a local checkpoint differs from its model's first.

    On the Hub only the first is looked at here, since each needs a request; the rest are compared when they are loaded.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for cp in series:
        if cp.model in shapes and not Path(cp.backbone.path).expanduser().is_dir():
            continue
        width, _, vocabulary = load_shape(cp.backbone)
        compare(cp, shapes.setdefault(cp.model, (width, vocabulary)), (width, vocabulary))
    return shapes


def compare(cp: Checkpoint, first: tuple[int, int], own: tuple[int, int]) -> None:
    """Raises UserError where a checkpoint's hidden size or vocabulary is not that of its model's first checkpoint."""
    for what, a, b in zip(("hidden size", "vocabulary"), own, first):
        check(
            a == b,
            f"{cp.where}: its {what} is {a}, that of the first checkpoint of {cp.model} is {b}; one series is one model",
        )


def device_of(c: StudyConfig) -> torch.device:
    """What the study runs on; sets the CPU threads. Raises UserError for a GPU that is not there."""
    kind = c.trainer.accelerator
    check(
        kind != "gpu" or torch.cuda.is_available(),
        "trainer.accelerator=gpu: there is no CUDA GPU here; allowed are auto, cpu",
    )
    torch.set_num_threads(c.trainer.threads or cores())
    return torch.device("cuda" if kind != "cpu" and torch.cuda.is_available() else "cpu")


def say_memory(series: list[Checkpoint], device: torch.device, work_bytes: float) -> None:
    """One line on the memory that the study will hold beside Python itself: the largest model, and what it works on."""
    largest = 0.0
    for cp in {cp.model: cp for cp in series}.values():
        kwargs = {"revision": cp.backbone.revision, "trust_remote_code": cp.backbone.trust_remote_code}
        kwargs |= {"gguf_file": cp.backbone.gguf_file} if cp.backbone.gguf_file else {}
        try:
            config = AutoConfig.from_pretrained(cp.backbone.path, **{k: v for k, v in kwargs.items() if v is not None})
            with torch.device("meta"):
                count = sum(
                    p.numel()
                    for p in AutoModelForCausalLM.from_config(
                        config, trust_remote_code=cp.backbone.trust_remote_code
                    ).parameters()
                )
        except (
            Exception
        ) as error:  # families whose own code needs more than a config; loading will tell what is wrong, if anything is
            log.info("memory: the size of %s is not known before it is loaded (%s)", cp.label, type(error).__name__)
            continue
        wide = cp.backbone.dtype == "float32" or (cp.backbone.dtype == "auto" and device.type == "cpu")
        # GGUF is unpacked to float32 beside the model that takes it
        largest = max(largest, count * ((4 if wide else 2) + (4 if cp.backbone.gguf_file else 0)))
    log.info(
        "memory: up to %.2f GiB for one model's weights and %.2f GiB to work on, beside about 0.6 GiB of Python",
        largest / 2**30,
        work_bytes / 2**30,
    )


@contextlib.contextmanager
def loaded(cp: Checkpoint, device: torch.device, shapes: dict[str, tuple[int, int]]) -> Iterator[Backbone]:
    """The checkpoint's backbone on a device, gone from memory afterwards.

    Raises: UserError where it cannot be loaded, has NaN weights, or is of another shape than its model's first.
    """
    try:
        backbone = Backbone.load(cp.backbone, device)
    except UserError:
        bad = _first_bad_tensor(cp.backbone)  # NaN fails the proof that the hidden states are right, in other words
        check(bad is None, f"{cp.where}: its weights are not numbers: {bad} holds NaN or infinity")
        raise
    compare(cp, shapes[cp.model], (backbone.hidden_size, backbone.vocab_size))
    check_finite(cp, backbone.head.W_VD)
    try:
        yield backbone
    finally:
        del backbone
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def visit(
    cp: Checkpoint, device: torch.device, shapes: dict[str, tuple[int, int]], work: Callable[[Backbone], Any]
) -> Any:
    """`work(backbone)` of one checkpoint. Its weights are gone when this returns, so that a series never holds two models: a
    name bound by `with loaded(…)` in a loop would keep one while the next is loaded.
    """
    try:
        with loaded(cp, device, shapes) as backbone:
            return work(backbone)
    finally:
        backbone = None
        gc.collect()


def check_finite(cp: Checkpoint, W_VD: Tensor) -> None:
    """Raises UserError for a head with NaN or infinity."""
    rows = (~torch.isfinite(W_VD).all(dim=1)).nonzero()[:1].flatten().tolist()
    check(not rows, f"{cp.where}: its head holds NaN or infinity, first in row {rows[0] if rows else ''}")


def check_moments(cp: Checkpoint, moments: Any) -> None:
    """Raises UserError where the moments of its hidden states (`initial.Calibration`) are not numbers."""
    check(
        bool(torch.isfinite(moments.cov_DD).all()),
        f"{cp.where}: its hidden states are not numbers; are its weights whole?",
    )


def _files(backbone: BackboneConfig) -> list[Path]:
    """Its safetensors files: of a folder, or of the Hub through its cache; none where it has only other kinds."""
    if backbone.gguf_file:
        return []

    def find(name: str) -> Optional[Path]:
        quietly = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
            "_raise_exceptions_for_gated_repo": False,
        }
        try:
            path = cached_file(backbone.path, name, revision=backbone.revision, **quietly)
        except OSError:
            return None
        return Path(path) if path else None

    index = find("model.safetensors.index.json")
    if index is None:
        single = find("model.safetensors")
        return [single] if single else []
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [path for path in map(find, names) if path]


def _first_bad_tensor(backbone: BackboneConfig) -> Optional[str]:
    try:
        for file in _files(backbone):
            with safe_open(file, "pt") as f:
                for name in f.keys():
                    if not torch.isfinite(f.get_tensor(name).float()).all():
                        return f"{name} in {file.name}"
    except (OSError, ValueError, KeyError, SafetensorError):  # then the first complaint was the right one
        return None
    return None


@dataclass
class Head:
    """The head of a checkpoint, float32 on the CPU: W [V, D], and whether the embeddings are the same tensor."""

    W_VD: Tensor
    tied: bool


def is_tied(backbone: BackboneConfig) -> bool:
    kwargs = {
        "revision": backbone.revision,
        "trust_remote_code": backbone.trust_remote_code,
        "gguf_file": backbone.gguf_file,
    }
    config = AutoConfig.from_pretrained(backbone.path, **{k: v for k, v in kwargs.items() if v is not None})
    return bool(config.get_text_config().tie_word_embeddings)


def stored_head(cp: Checkpoint, shapes: dict[str, tuple[int, int]]) -> Optional[Head]:
    """The head as it stands in the safetensors files, in their precision; None where it cannot be told which tensor it is.

    A model may say that it is tied and hold two different matrices all the same; Transformers then reads the head's own.
    Raises: UserError for another shape than its model's first, files that cannot be read, NaN.
    """
    width, _, vocabulary = load_shape(cp.backbone)
    compare(cp, shapes[cp.model], (width, vocabulary))
    tied = is_tied(cp.backbone)
    own, embeddings = (_read(cp, names, (vocabulary, width)) for names in (HEADS, EMBEDDINGS if tied else ()))
    W = own if own is not None else embeddings
    if W is None:
        return None
    check_finite(cp, W)
    return Head(W, tied and (own is None or embeddings is None or torch.equal(own, embeddings)))


def load_head(cp: Checkpoint, shapes: dict[str, tuple[int, int]]) -> Head:
    """Only the head, read from its place in the safetensors file where that can be told, else through the whole model.

    Raises: UserError as `loaded` does.
    """
    head = stored_head(cp, shapes)
    if head is None:
        head = visit(
            cp,
            torch.device("cpu"),
            shapes,
            lambda backbone: Head(backbone.head.W_VD.detach().float().clone(), is_tied(cp.backbone)),
        )
    return head


def _read(cp: Checkpoint, names: tuple[str, ...], shape: tuple[int, int]) -> Optional[Tensor]:
    try:
        hits = []
        for file in _files(cp.backbone) if names else []:
            with safe_open(file, "pt") as f:
                hits += [
                    (file, key)
                    for key in f.keys()
                    if key.endswith(names) and tuple(f.get_slice(key).get_shape()) == shape
                ]
        if len(hits) != 1:
            return None
        with safe_open(hits[0][0], "pt") as f:
            return f.get_tensor(hits[0][1]).float()
    except SafetensorError as error:
        raise UserError(f"{cp.where}: its weights cannot be read: {error}") from error

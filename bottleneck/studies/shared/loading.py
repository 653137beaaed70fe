"""Load the backbones of a study one after the other, on its device, and refuse weights that are not numbers."""

from __future__ import annotations

import contextlib
import gc
import logging
from typing import Any, Callable, Iterator, Optional, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from bottleneck.backbone.model import Backbone
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.environment import cores
from bottleneck.core.errors import UserError, check
from bottleneck.studies.shared.config import StudyConfig
from bottleneck.studies.shared.series import Checkpoint, Shapes, check_shape
from bottleneck.studies.shared.stored_head import Head, check_finite, is_tied, stored_head, weight_files

log = logging.getLogger(__name__)
T = TypeVar("T")


def device_of(c: StudyConfig) -> torch.device:
    """The device of the study; sets the number of CPU threads. Raises: UserError if the GPU asked for is missing."""
    kind = c.trainer.accelerator
    usable = kind != "gpu" or torch.cuda.is_available()
    check(usable, "trainer.accelerator=gpu: there is no CUDA GPU here; allowed are auto, cpu")
    torch.set_num_threads(c.trainer.threads or cores())
    return torch.device("cuda" if kind != "cpu" and torch.cuda.is_available() else "cpu")


def log_memory(series: list[Checkpoint], device: torch.device, work_bytes: float) -> None:
    """Log the memory that the study will need: the largest model's weights and its working memory."""
    largest = 0.0
    for cp in {cp.model: cp for cp in series}.values():
        try:
            count = _parameters(cp.backbone)
        except Exception as error:  # families raise many kinds; loading reports the error
            log.info("memory: the size of %s is unknown before it is loaded (%s)", cp.label, type(error).__name__)
            continue
        wide = cp.backbone.dtype == "float32" or (cp.backbone.dtype == "auto" and device.type == "cpu")
        # GGUF is unpacked to float32 while the model is also in memory
        largest = max(largest, count * ((4 if wide else 2) + (4 if cp.backbone.gguf_file else 0)))
    log.info(
        "memory: up to %.2f GiB for one model's weights and %.2f GiB to work with, besides about 0.6 GiB of Python",
        largest / 2**30,
        work_bytes / 2**30,
    )


def _parameters(backbone: BackboneConfig) -> int:
    """Number of parameters, from the config alone."""
    options = {
        "revision": backbone.revision,
        "trust_remote_code": backbone.trust_remote_code,
        "gguf_file": backbone.gguf_file or None,
    }
    given = {k: v for k, v in options.items() if v is not None}
    config = AutoConfig.from_pretrained(backbone.path, **given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=backbone.trust_remote_code)
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def loaded(cp: Checkpoint, device: torch.device, shapes: Shapes) -> Iterator[Backbone]:
    """The checkpoint's backbone on a device; its memory is freed afterwards.

    Raises: UserError if it cannot be loaded, has NaN weights, or has another shape than its model's first
        checkpoint.
    """
    try:
        backbone = Backbone.load(cp.backbone, device)
    except UserError:
        bad = _first_bad_tensor(cp.backbone)  # NaN also fails the check of the hidden states, whose message misleads
        check(bad is None, f"{cp.where}: its weights are not numbers: {bad} holds NaN or infinity")
        raise
    check_shape(cp, shapes[cp.model], (backbone.hidden_size, backbone.vocab_size))
    check_finite(cp, backbone.head.W_VD)
    try:
        yield backbone
    finally:
        del backbone
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def visit(cp: Checkpoint, device: torch.device, shapes: Shapes, work: Callable[[Backbone], T]) -> T:
    """`work(backbone)` of one checkpoint, whose weights are freed before this returns.

    In a loop use this, not `with loaded(…) as backbone`: the bound name would hold one model while the next one is
    loaded.
    """
    backbone: Optional[Backbone] = None
    try:
        with loaded(cp, device, shapes) as backbone:
            return work(backbone)
    finally:
        backbone = None
        gc.collect()


def load_head(cp: Checkpoint, shapes: Shapes) -> Head:
    """The head alone, read from the safetensors files if its tensor can be identified, else through the whole model.

    Raises: UserError as `loaded` does.
    """
    head = stored_head(cp, shapes)
    if head is not None:
        return head
    W_VD = visit(cp, torch.device("cpu"), shapes, lambda backbone: backbone.head.W_VD.detach().float().clone())
    return Head(W_VD, is_tied(cp.backbone))


def check_moments(cp: Checkpoint, moments: Any) -> None:
    """Raise UserError if the moments of its hidden states (`heads.calibration.Calibration`) are not finite."""
    finite = bool(torch.isfinite(moments.cov_DD).all())
    check(finite, f"{cp.where}: its hidden states are not numbers; are its weights damaged?")


def _first_bad_tensor(backbone: BackboneConfig) -> Optional[str]:
    """The first stored tensor with NaN or infinity; None without one, or if the files cannot be read."""
    try:
        for file in weight_files(backbone):
            with safe_open(file, "pt") as f:
                for name in f.keys():
                    if not torch.isfinite(f.get_tensor(name).float()).all():
                        return f"{name} in {file.name}"
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return None

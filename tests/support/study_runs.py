"""Helpers of the studies' tests: a study in this process, a series of toy checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from bottleneck.studies.shared.config import register
from bottleneck.study import own_words, study
from conftest import ROOT

QUICK = [
    "data.block_size=64",
    "tokens=1500",
    "data.validation_tokens=3000",
    "data.validation_fraction=0.2",
    "trainer=cpu",
    "trainer.micro_batch_size=4",
    "trainer.progress=false",
]


def composed(*overrides: str):
    """The config that `python -m bottleneck.study OVERRIDES` sees."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("study", overrides=own_words(overrides))


def run_study(folder: Path, *overrides: str) -> dict:
    """Run a study in this process. Returns: the content of NAME.json."""
    cfg = composed(*overrides)
    study(cfg, folder)
    name = cfg.study.name
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and (folder / f"{name}.csv").stat().st_size > 20
    return json.loads((folder / f"{name}.json").read_text())


def shell(*overrides: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `python -m bottleneck.study OVERRIDES` in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "bottleneck.study", *map(str, overrides)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def toy_series(backbone: Path, folder: Path, noises: dict[str, float]) -> Path:
    """Checkpoints of a toy, one folder for each name: noise of so many standard deviations is added to its head."""
    for i, (name, noise) in enumerate(noises.items()):
        shutil.copytree(backbone, folder / name)
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        (key,) = [k for k in tensors if k in ("embed_out.weight", "lm_head.weight")]
        W = tensors[key]
        tensors[key] = W + noise * W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(i))
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def edit_head(folder: Path, change) -> None:
    """Apply `change` to a checkpoint's head tensor in place."""
    tensors = load_file(folder / "model.safetensors")
    (key,) = [k for k in tensors if k in ("embed_out.weight", "lm_head.weight")]
    tensors[key] = change(tensors[key].clone())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

"""Folders of finished runs, for tests of commands that use heads: made up, or trained in two seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import save_file

from bottleneck.heads.bank import HeadKey
from bottleneck.results import curve
from conftest import composed


def row(rank: int, loss: float = 2.0, **changes) -> dict:
    base = {
        "rank": rank,
        "lr": 0.1,
        "seed": 0,
        "init": "fisher",
        "parameters": 1,  # `finished` knows the shape
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 2,
        "initial_loss": 3.0,
        "status": "ok",
        "best": False,
    }
    return base | changes


def finished(folder: Path, backbone: str, V: int, D: int, digest: str, rows: list[dict], **source) -> Path:
    """A run's folder with random heads, as a run without checkpoints leaves it."""
    numbers = {"loss": 2.0, "perplexity": math.exp(2.0), "bits_per_byte": 1.0}
    rows = [h | {"parameters": h["rank"] * (V + D)} for h in rows]
    content = curve.finish(
        {
            "schema": curve.SCHEMA,
            "backbone": "toy",
            "backbone_hash": digest,
            "hidden_size": D,
            "vocab_size": V,
            "tokens": 1,
            "data": "text",
            "data_hash": "d",
            "validation_tokens": 1,
            "recipe": {},
            "reference": numbers,
            "heads": rows,
        }
    )
    (folder / "heads").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    (folder / "curve.json").write_text(json.dumps(content))
    OmegaConf.save({"backbone": {"path": backbone, **source}}, folder / ".hydra" / "config.yaml")
    for h in rows:
        key = HeadKey(h["rank"], h["lr"], h["seed"])
        torch.manual_seed(h["rank"])
        tensors = {"A": torch.randn(V, h["rank"]), "B": torch.randn(h["rank"], D)}
        save_file(
            tensors,
            folder / "heads" / f"{key.name}.safetensors",
            metadata={"bottleneck": json.dumps({"backbone_hash": digest})},
        )
    return folder


@pytest.fixture(scope="module")
def swept(toy, tmp_path_factory):
    """A run of three ranks at two rates, with its checkpoint."""
    from train import train

    return train(composed([*toy, "optim.lrs=[1e-3,1e-2]"]), tmp_path_factory.mktemp("swept") / "run")


def best(content: dict, rank: int) -> dict:
    return next(h for h in content["heads"] if h["rank"] == rank and h["best"])


def heads_loss(model, batches) -> float:
    """Mean cross-entropy of a plain model over the validation blocks, each token once."""
    total = count = 0
    with torch.no_grad():
        for inputs, targets in batches:
            logits = model(input_ids=inputs).logits.double()
            total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum").item()
            count += (targets != -100).sum().item()
    return total / count

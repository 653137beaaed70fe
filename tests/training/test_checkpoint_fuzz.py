"""Random damage to a checkpoint: it is refused with a reason, or its content is what the run wrote, bit for bit."""

from __future__ import annotations

import copy
import io
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment

from bottleneck.config.checks import check_config, total_steps
from bottleneck.config.schema import TrainConfig
from bottleneck.core.errors import UserError
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.key import HeadKey
from bottleneck.training import resume
from bottleneck.training.checkpoint import CHECKSUM, content_checksum, read_checkpoint
from bottleneck.training.optim import build_optimizer, clip_per_head, schedule
from bottleneck.training.run_folder import LAST
from conftest import composed

JUNK: tuple[Any, ...] = (None, True, 0, 1, -1, 10**30, 0.5, math.nan, math.inf, "", "x", [], {}, [1], torch.zeros(2))


@pytest.fixture(scope="module")
def run_folder(toy, tmp_path_factory) -> Path:
    from train import train

    folder = tmp_path_factory.mktemp("fuzz") / "run"
    train(composed([*toy, "trainer.checkpoint_every=7"]), folder)
    return folder


def whole_content(path: Path) -> dict[str, Any]:
    content = torch.load(path, weights_only=True)
    return content | {"bottleneck": {k: v for k, v in content["bottleneck"].items() if k != CHECKSUM}}


def damaged_bytes(rng: random.Random, raw: bytes) -> bytes:
    at, kind = rng.randrange(len(raw)), rng.randrange(5)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
    if kind == 2:  # a block of the disk that was never written
        return raw[:at] + b"\0" * len(raw[at : at + 512]) + raw[at + 512 :]
    if kind == 3:
        return raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:]
    return raw[:at] + raw[at + rng.randrange(1, 65) :]


def places(node: Any, path: tuple = ()) -> list[tuple]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


def damaged_tensor(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    flat = t.clone().reshape(-1)
    kind = rng.randrange(5)
    if kind == 0 and t.is_floating_point() and t.numel():
        flat[rng.randrange(len(flat))] = rng.choice([math.nan, math.inf, -math.inf])
        return flat.reshape(t.shape)
    if kind == 1:
        return t.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]))
    if kind == 2:
        return flat[:-1]
    if kind == 3:
        return t.unsqueeze(0)
    return t.clone().zero_() + 1


def damaged_tree(rng: random.Random, content: Any) -> Any:
    """One random change of a copy."""
    c = copy.deepcopy(content)
    path = rng.choice([p for p in places(c) if p])
    parent = c
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    kind = rng.randrange(4)
    if isinstance(old, torch.Tensor) and kind < 3:
        parent[key] = damaged_tensor(rng, old)
    elif kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(old, (int, float)) and not isinstance(old, bool):
        parent[key] = rng.choice([old + 1, -old - 1, old * 10 + 1, old + 0.5])
    elif kind == 2 and isinstance(parent, dict):
        other = rng.choice(list(parent))
        parent[key], parent[other] = parent[other], old
    else:
        parent[key] = rng.choice(JUNK)
    return c


def restore(c: TrainConfig, keys: list[HeadKey], saved: dict[str, Any]) -> None:
    """What a resumed run does with a checkpoint's content; raises where that fails."""
    bank = HeadBank(keys, 320, 32)
    bank.load_state_dict({name.removeprefix("bank."): t for name, t in saved["state_dict"].items()})
    optimizer = build_optimizer(bank, c.optim)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(c.optim, total_steps(c)))
    optimizer.load_state_dict(saved["optimizer_states"][0])
    rates.load_state_dict(saved["lr_schedulers"][0])
    for p in bank.parameters():
        p.grad = torch.zeros_like(p)
    losses = torch.zeros(len(keys), dtype=torch.float64)
    optimizer.divisors = clip_per_head(bank, c.optim.clip, losses, optimizer.norms())[1]
    optimizer.step()
    rates.step()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", plugins=[LightningEnvironment()], **quiet)
    trainer.fit_loop.load_state_dict(saved["loops"]["fit_loop"])
    about = saved["bottleneck"]
    assert all(isinstance(about["initial"][key.name], float) for key in keys) and about["step_tokens"] > 0


def check_fuzz(folder: Path, target: Path, toy: list[str], seed: int, cases: int) -> Counter:
    rng, found = random.Random(seed), Counter()
    raw, content = (folder / LAST).read_bytes(), torch.load(folder / LAST, weights_only=True)
    whole = content_checksum(whole_content(folder / LAST))
    c = check_config(composed([*toy, "trainer.checkpoint_every=7", "ckpt_path=last"]))
    keys = [HeadKey.of(row) for row in json.loads((folder / "curve.json").read_text())["heads"]]
    (target / "checkpoints").mkdir(parents=True, exist_ok=True)
    for case in range(cases):
        damage = rng.choice(["bytes", "tree", "tree without a checksum"])
        damaged = damaged_bytes(rng, raw) if damage == "bytes" else damaged_tree(rng, content)
        if damage == "tree without a checksum" and isinstance(damaged.get("bottleneck"), dict):
            damaged["bottleneck"].pop(CHECKSUM, None)
        if damage != "bytes":
            buffer = io.BytesIO()
            torch.save(damaged, buffer)
            damaged = buffer.getvalue()
        (target / LAST).write_bytes(damaged)
        try:
            outcome = "refused"
            begun = resume.find(resume.as_begun(c, target), target)
            bank = HeadBank(keys, 320, 32)
            resume.verify(begun, c, run_dir=target, bank=bank)
            saved = read_checkpoint(target / LAST)
            outcome = "whole" if content_checksum(whole_content(target / LAST)) == whole else "other"
            if damage == "tree without a checksum" and outcome == "other":  # values of which nothing tells
                restore(c, keys, saved)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 700
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}: {damage}") from error
        assert outcome != "other" or damage == "tree without a checksum", (seed, case)
        found[damage, outcome] += 1
    return found


def test_random_damage(run_folder, toy, tmp_path):
    """Without a checksum, as in checkpoints of earlier versions, settings of the optimizer and counters of the loops
    once ended in tracebacks, or in a kernel that wrote beyond a tensor.
    """
    found = check_fuzz(run_folder, tmp_path, toy, 0, 60)
    assert sum(count for (_, outcome), count in found.items() if outcome == "refused") > 30, found
    assert found["tree without a checksum", "whole"] > 0, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_more_random_damage(run_folder, toy, tmp_path, seed):
    found = check_fuzz(run_folder, tmp_path, toy, seed, 500)
    assert found["bytes", "refused"] > 100 and found["tree without a checksum", "refused"] > 60, found

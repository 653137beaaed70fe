"""Faults in what a checkpoint without a checksum gives to the optimizer, the schedule and Lightning's loops.

All of it follows from the run's config and the step. Values of another kind end in tracebacks, or let torch's fused
kernel write beyond a tensor.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, Optional

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment

from bottleneck.config.schema import OptimConfig
from bottleneck.heads.bank import HeadBank
from bottleneck.training.optim import build_optimizer, schedule


def unproven_fault(saved: dict[str, Any], bank: HeadBank, steps: int) -> Optional[str]:
    """The first difference from what the run itself would have saved at the checkpoint's step, or None.

    Args: bank: may be on the meta device; steps: of the whole run.
    """
    stored = saved["bottleneck"]["config"]["optim"]
    names = {f.name for f in dataclasses.fields(OptimConfig)}
    c = OptimConfig(**{name: value for name, value in stored.items() if name in names})
    step, factor = saved["global_step"], schedule(c, steps)
    rates = [key.lr * factor(step) for key in bank.keys]
    wanted = build_optimizer(bank, c)
    torch.optim.lr_scheduler.LambdaLR(wanted, factor)
    groups = [group | {"lr": rate} for group, rate in zip(wanted.state_dict()["param_groups"], rates)]
    rest = {"base_lrs": [key.lr for key in bank.keys], "_last_lr": rates, "last_epoch": step, "_step_count": step + 1}
    rest |= {"lr_lambdas": [None] * len(rates)}
    tensors = saved["optimizer_states"][0]["state"].values()
    differences = [
        *_differences(saved["optimizer_states"][0]["param_groups"], groups, "the optimizer's group"),
        *_differences(saved["lr_schedulers"][0], rest, "the schedule"),
        *(f"the optimizer's step is {t['step']!r}" for t in tensors if not _is_step(t["step"])),
        *_loop_differences(saved, step),
        *(
            f"initial loss {name} is {v!r}"
            for name, v in saved["bottleneck"]["initial"].items()
            if type(v) is not float
        ),
    ]
    lacking = [key.name for key in bank.keys if key.name not in saved["bottleneck"]["initial"]]
    differences += [f"the initial loss of {name} is missing" for name in lacking]
    differences += ["bottleneck.step_tokens is not above 0"] * (saved["bottleneck"]["step_tokens"] <= 0)
    return next(iter(differences), None)


def _is_step(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.dim() == 0


def _differences(found: Any, wanted: Any, where: str) -> Iterator[str]:
    """Entries of a wanted tree that are missing or have another value; more entries may be there."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name, value in wanted.items():
            if name not in found:
                yield f"{where}: {name} is missing"
            else:
                yield from _differences(found[name], value, f"{where}: {name}")
    elif isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)) and len(found) == len(wanted):
        for index, value in enumerate(wanted):
            yield from _differences(found[index], value, f"{where} {index}")
    elif type(found) is not type(wanted) or found != wanted:
        yield f"{where} is {found!r}, not {wanted!r}"


def _loop_differences(saved: dict[str, Any], step: int) -> Iterator[str]:
    """Counters of Lightning's training loop; of another version's loop, which Lightning converts, only the position."""
    loop = saved["loops"]["fit_loop"]
    for part in ("total", "current"):
        ready = loop["epoch_loop.batch_progress"][part]["ready"]
        yield from _differences(ready, step, f"the training loop: {part} batches")
    states = (name for name in loop if name.endswith("state_dict") and not isinstance(loop[name], dict))
    yield from (f"the training loop: {name} is not a dict" for name in states)
    for loader in loop["state_dict"]["combined_loader"]:
        yield from _differences(loader, {"_num_yielded": step, "_sampler_iter_yielded": step}, "the data loader")
    if saved["pytorch-lightning_version"] == pl.__version__:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        fresh = pl.Trainer(accelerator="cpu", plugins=[LightningEnvironment()], **quiet).fit_loop.state_dict()
        yield from _other_kinds(loop, {k: v for k, v in fresh.items() if not k.endswith("state_dict")}, "the loop")


def _other_kinds(found: Any, wanted: Any, where: str) -> Iterator[str]:
    if type(found) is not type(wanted):
        yield f"{where} is {found!r}, not {type(wanted).__name__}"
    elif isinstance(wanted, dict):
        for name, value in wanted.items():
            if name not in found:
                yield f"{where}: {name} is missing"
            else:
                yield from _other_kinds(found[name], value, f"{where}: {name}")
    elif isinstance(wanted, int) and found < 0:
        yield f"{where} is {found}"

"""What a run ends with: the content of curve.json, from the module after its last validation."""

from __future__ import annotations

import math
from typing import Any

from bottleneck.config.schema import TrainConfig
from bottleneck.core.environment import environment
from bottleneck.data.cache import Corpus
from bottleneck.evaluation.sums import derived, finite
from bottleneck.results import curve
from bottleneck.training.module import HeadSweep

DIVERGED = 1.5  # times the loss before training, or that of a uniform guess


def build_curve(c: TrainConfig, module: HeadSweep, corpus: Corpus) -> dict[str, Any]:
    """The content of curve.json (schema 1)."""
    backbone, bank, tokens = module.backbone, module.bank, module.validation_tokens
    diverged = bank.diverged.tolist()
    heads = []
    for i, key in enumerate(bank.keys):
        numbers = derived(module.final[key.name], tokens, corpus.validation_bytes)
        # worse by half than what it began with, and than knowing nothing: it was thrown out, whatever it still learned
        start = finite(module.initial.get(key.name))
        ok = (
            not diverged[i]
            and numbers["loss"] is not None
            and numbers["loss"] <= DIVERGED * max(start or 0.0, math.log(backbone.vocab_size))
        )
        heads.append(
            {
                "rank": key.rank,
                "lr": key.lr,
                "seed": key.seed,
                "init": c.head.init,
                "parameters": bank[key].parameters_count,
                **numbers,
                "initial_loss": finite(module.initial.get(key.name)),
                "status": "ok" if ok else "diverged",
                "best": False,
                **module.details["heads"][key.name],
            }
        )
    o = c.optim
    recipe = {
        "batch_size": c.batch_size,
        "block_size": c.data.block_size,
        "data_seed": c.data.seed,
        "weight_decay": o.weight_decay,
        "betas": list(o.betas),
        "eps": o.eps,
        "warmup": o.warmup,
        "lr_final": o.lr_final,
        "clip": o.clip,
        "calibration_tokens": c.head.calibration_tokens,
        "dtype": str(backbone.lm_head.weight.dtype).removeprefix("torch."),
    }
    if c.head.init == "refined":
        recipe["passes"] = c.head.passes
    if c.data.epochs > 1:
        recipe["epochs"] = c.data.epochs
    if c.head.whiten:
        recipe["whiten"] = True
    if o.lr_ratio != 1:
        recipe["lr_ratio"] = o.lr_ratio
    if c.head.objective != "ce":
        recipe |= {"objective": c.head.objective, "temperature": c.head.temperature}
    if c.head.objective == "mixed":
        recipe["mix"] = c.head.mix
    if c.head.teacher != "own":
        recipe["teacher"] = c.head.teacher
    return curve.finish(
        {
            "schema": curve.SCHEMA,
            "backbone": backbone.name,
            "backbone_hash": backbone.hash,
            "hidden_size": backbone.hidden_size,
            "vocab_size": backbone.vocab_size,
            "tokens": module.steps * c.batch_size * c.data.block_size,
            "data": corpus.name,
            "data_hash": corpus.fingerprint,
            "validation_tokens": tokens,
            "recipe": recipe,
            "reference": derived(module.reference, tokens, corpus.validation_bytes) | module.details["reference"],
            "heads": heads,
            "versions": environment(module.trainer.strategy.root_device),
        }
    )

"""The content of curve.json, from the module after its last validation."""

from __future__ import annotations

import math
from typing import Any

from bottleneck.config.schema import TrainConfig
from bottleneck.core.environment import environment
from bottleneck.data.cache import Corpus
from bottleneck.evaluation.sums import derived, finite
from bottleneck.results import curve
from bottleneck.results.cost import LINEAR
from bottleneck.training.module import HeadSweep
from bottleneck.training.recipe import recipe

DIVERGED = 1.5  # a head diverged if its loss is above this times max(its initial loss, log V)


def build_curve(c: TrainConfig, module: HeadSweep, corpus: Corpus) -> dict[str, Any]:
    """The content of curve.json (schema 1)."""
    backbone, tokens = module.backbone, module.validation_tokens
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
            "recipe": recipe(c, str(backbone.lm_head.weight.dtype).removeprefix("torch.")),
            "reference": derived(module.reference, tokens, corpus.validation_bytes)
            | _with_domains(module.details["reference"], corpus, c.data.block_size),
            **({"target": module.details["target"]} if "target" in module.details else {}),
            "heads": _heads(c, module, corpus),
            "versions": environment(module.trainer.strategy.root_device),
        }
    )


def _heads(c: TrainConfig, module: HeadSweep, corpus: Corpus) -> list[dict[str, Any]]:
    """One row per head."""
    rows = []
    for key, flag in zip(module.bank.keys, module.bank.diverged.tolist()):
        numbers = derived(module.final[key.name], module.validation_tokens, corpus.validation_bytes)
        initial = finite(module.initial.get(key.name))
        limit = DIVERGED * max(initial or 0.0, math.log(module.backbone.vocab_size))
        ok = not flag and numbers["loss"] is not None and numbers["loss"] <= limit
        head = module.bank[key]
        costs = {"bytes_per_token": 2 * head.parameters_count, "flops_per_token": head.flops_per_token}
        rows.append(
            {
                **key.facts,
                **(costs if key.kind not in LINEAR else {}),
                "rank": key.rank,
                "lr": key.lr,
                "seed": key.seed,
                "init": c.head.init,
                "parameters": head.parameters_count,
                **numbers,
                "initial_loss": initial,
                "status": "ok" if ok else "diverged",
                "best": False,
                **_with_domains(module.details["heads"][key.name], corpus, c.data.block_size),
            }
        )
    return rows


def _with_domains(details: dict[str, Any], corpus: Corpus, block: int) -> dict[str, Any]:
    """Details of a head with perplexity and bits per byte of each text of a mix."""
    if "domains" not in details:
        return details
    sizes = {part.name: part.bytes for part in corpus.validation_parts(block)}
    rows = [d | derived(d["loss"], d["tokens"], sizes[d["domain"]]) for d in details["domains"]]
    return details | {"domains": rows}

"""The settings that describe a run: one list, used for the recipe in curve.json and for the facts of a head in W&B.

Heads with different recipes are drawn as different curves. A recipe omits settings that the run does not use. It also
omits settings that earlier versions did not have, as long as they have their default value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional

from bottleneck.config.head_options import all_options, head_options
from bottleneck.config.schema import TrainConfig
from bottleneck.core.environment import commit
from bottleneck.core.extensions import OBJECTIVES, STARTS
from bottleneck.heads.head import count_parameters
from bottleneck.heads.key import HeadKey

ALWAYS = object()  # equals no value of a setting, so the setting is always in the recipe


@dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Attributes:
        value: from the checked config.
        used: whether the run uses it; None: every run does.
        silent: the value at which the recipe omits the setting.
    """

    name: str
    value: Callable[[TrainConfig], Any]
    used: Optional[Callable[[TrainConfig], bool]] = None
    silent: Any = ALWAYS

    def applies(self, c: TrainConfig) -> bool:
        return self.used is None or self.used(c)


def _taught(c: TrainConfig) -> bool:
    return OBJECTIVES[c.head.objective].teacher


SETTINGS = (
    Setting("batch_size", lambda c: c.batch_size),
    Setting("block_size", lambda c: c.data.block_size),
    Setting("data_seed", lambda c: c.data.seed),
    Setting("weight_decay", lambda c: c.optim.weight_decay),
    Setting("betas", lambda c: list(c.optim.betas)),
    Setting("eps", lambda c: c.optim.eps),
    Setting("warmup", lambda c: c.optim.warmup),
    Setting("lr_final", lambda c: c.optim.lr_final),
    Setting("clip", lambda c: c.optim.clip),
    Setting("calibration_tokens", lambda c: c.head.calibration_tokens),
    Setting("dtype", lambda c: c.backbone.dtype),
    Setting("epochs", lambda c: c.data.epochs, silent=1),
    Setting("packing", lambda c: c.data.packing, silent="join"),
    Setting("order", lambda c: c.data.order, silent="shuffled"),
    Setting("skip", lambda c: c.data.skip, silent=0),
    Setting("mask_documents", lambda c: c.data.mask_documents, silent=False),
    Setting("reset_positions", lambda c: c.data.reset_positions, silent=False),
    Setting("mix", lambda c: c.data.mix, silent={}),
    Setting("whiten", lambda c: c.head.whiten, silent=False),
    Setting("lr_ratio", lambda c: c.optim.lr_ratio, silent=1),
    Setting("objective", lambda c: c.head.objective, silent="ce"),
    Setting("teacher", lambda c: c.head.teacher, used=_taught, silent="own"),
)


def recipe(c: TrainConfig, dtype: str) -> dict[str, Any]:
    """The recipe in curve.json. Args: dtype: of the backbone as it was loaded, such as float32."""
    found = {s.name: s.value(c) for s in SETTINGS if s.applies(c) and s.value(c) != s.silent}
    for declared in (STARTS[c.head.init], OBJECTIVES[c.head.objective]):  # a kind's options are in the heads' rows
        found |= head_options(c.head, declared.options)
    return found | {"dtype": dtype}


def head_facts(
    c: TrainConfig, key: HeadKey, *, hidden_size: int, vocab_size: int, data: str, backbone: str
) -> dict[str, Any]:
    """Identifying facts of a head, the same whether it trains alone or with others. None for unused settings.

    Args: data, backbone: labels of the text and the backbone.
    """
    step_tokens = c.batch_size * c.data.block_size
    return {
        "rank": key.rank,
        "parameters": count_parameters(key, vocab_size, hidden_size),
        "lr": key.lr,
        "seed": key.seed,
        "init": c.head.init,
        "backbone": backbone,
        "revision": c.backbone.revision,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "data": data,
        "tokens": c.tokens // step_tokens * step_tokens,
        **{s.name: s.value(c) if s.applies(c) else None for s in SETTINGS},
        **all_options(c.head),
        **key.facts,
        "git_commit": commit(),
    }

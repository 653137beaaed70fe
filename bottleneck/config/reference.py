"""The configuration reference: every key with its type, its default and what it means. The docs print it."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, NamedTuple

from bottleneck.config.declare import described
from bottleneck.config.literal import literal
from bottleneck.config.schema import TrainConfig
from bottleneck.core import extensions


class Key(NamedTuple):
    """One key: `optim.lr_rule`; `power | table | grid`; `power`; one sentence."""

    name: str
    type: str
    default: str
    sentence: str


def keys(schema: type = TrainConfig, prefix: str = "") -> list[Key]:
    """Every key of a schema, in its order. Choices that plugins add are listed where a plugin is loaded."""
    hints = typing.get_type_hints(schema)
    out: list[Key] = []
    for f in dataclasses.fields(schema):
        hint, name = hints[f.name], f"{prefix}{f.name}"
        if dataclasses.is_dataclass(hint):
            out += keys(typing.cast(type, hint), f"{name}.")
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        registry = f.metadata.get("registry")
        words = (_names(registry) if registry else "") or described(hint)
        out.append(Key(name, " | ".join(words.split(", ")), _default(default), f.metadata.get("sentence", "")))
    return out


def _names(registry: str) -> str:
    return ", ".join(getattr(extensions, registry).names())


def _default(value: Any) -> str:
    if isinstance(value, str):
        return "(none)" if value == "???" else value
    return literal(value)

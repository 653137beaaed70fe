"""The options that the chosen head kind, start and objective declare, and their values in a config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from bottleneck.config.schema import HeadConfig
from bottleneck.core.errors import check
from bottleneck.core.extensions import HEAD_KINDS, OBJECTIVES, STARTS, HeadKind, Objective, Start

FIELDS = {f.name: f for f in dataclasses.fields(HeadConfig)}  # options with a key of their own


def chosen(h: HeadConfig) -> dict[str, Start | HeadKind | Objective]:
    """The declared objects of a run by the key that chooses them. Raises UserError for a name that does not exist."""
    return {
        "head.kind": HEAD_KINDS[h.kind],
        "head.init": STARTS[h.init],
        "head.objective": OBJECTIVES[h.objective],
    }


def head_options(h: HeadConfig, declared: Mapping[str, Any]) -> dict[str, Any]:
    """The values of declared options: from `head.NAME` or `head.options.NAME`, else the declared default."""
    given = {name: getattr(h, name) for name in declared if name in FIELDS} | dict(h.options)
    return {name: as_declared(given.get(name, default), default) for name, default in declared.items()}


def as_declared(value: Any, default: Any) -> Any:
    """A value of the default's type: 10 and 10.0 are one limit, and name one head."""
    return float(value) if type(default) is float and type(value) is int else value


def all_options(h: HeadConfig) -> dict[str, Any]:
    """Values of all options that have a key of their own or that this run uses; None for an option it does not use."""
    used: dict[str, Any] = {}
    for item in chosen(h).values():
        used |= head_options(h, item.options)
    return dict.fromkeys(sorted(_with_keys())) | used


def check_options(h: HeadConfig) -> None:
    """Raises UserError for an option that is given but that nothing in this run reads."""
    used = {name: key for key, item in chosen(h).items() for name in item.options}
    defaults = HeadConfig()
    for name, (key, users) in _with_keys().items():
        value = getattr(h, name)
        check(
            name in used or value == getattr(defaults, name),
            f"head.{name}={value}: {key}={chosen(h)[key].name} does not use it; {', '.join(users)} {_verb(users)}",
        )
    check(isinstance(h.options, Mapping), f"head.options={h.options}: must be options by name, such as {{rows: 512}}")
    own = sorted(used.keys() - FIELDS.keys())
    for name in h.options:
        check(
            name in own,
            f"head.options.{name}: not an option of this run's kind, start and objective; "
            f"they have {', '.join(own) or 'none'}",
        )
    for item in chosen(h).values():
        check_option_types("head.options", h.options, item.options)
    for item in (HEAD_KINDS[h.kind], OBJECTIVES[h.objective]):
        reason = item.refuses(**head_options(h, item.options)) if item.refuses else None
        check(reason is None, f"head.options.{reason}")


def check_option_types(where: str, given: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
    """Values are of the types of the declared defaults; a whole number passes for a number.

    Args: where: the key that holds them, for messages.
    """
    for name in given.keys() & declared.keys():
        _check_type(f"{where}.{name}", given[name], declared[name])


def _check_type(key: str, value: Any, default: Any) -> None:
    kind = type(default)
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", list: "a list"}
    fits = type(value) is kind or (kind is float and type(value) is int) or (kind is list and isinstance(value, tuple))
    fits = fits and (not isinstance(value, float) or math.isfinite(value))
    check(fits or kind not in words, f"{key}={value}: must be {words.get(kind)}")


def _verb(users: list[str]) -> str:
    return "does" if len(users) == 1 else "do"


def _with_keys() -> dict[str, tuple[str, list[str]]]:
    """Options with a key of their own: the key that decides whether they are used, and the names that use them."""
    out: dict[str, tuple[str, list[str]]] = {}
    for key, items in (
        ("head.kind", [*HEAD_KINDS]),
        ("head.init", [*STARTS]),
        ("head.objective", [*OBJECTIVES]),
    ):
        for item in items:
            for name in item.options:
                if name in FIELDS:
                    out.setdefault(name, (key, []))[1].append(item.name)
    return out

"""The configuration reference: every key with its type, its default and what it means. The docs print it, and

python -m bottleneck.config.reference [WORD]      every key, or those whose line has the word
"""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap
import typing
from typing import Any, NamedTuple

from bottleneck.config.declare import described
from bottleneck.config.literal import literal
from bottleneck.config.schema import TrainConfig
from bottleneck.core import extensions
from bottleneck.core.errors import UserError


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


def lines(word: str = "") -> list[str]:
    """Every key as `NAME=DEFAULT  (TYPE)` and an indented sentence, or those with a word. Raises UserError for none."""
    found = [k for k in keys() if word.lower() in " ".join(k).lower()]
    if not found:
        raise UserError(f"{word}: in no key's name, type, default or sentence; without a word all keys are listed")
    out = []
    for k in found:
        out.append(f"{k.name}={k.default}" + (f"  ({k.type})" if k.type != k.default else ""))
        out += textwrap.wrap(k.sentence, 112, initial_indent="    ", subsequent_indent="    ")
    return out


def main(argv: list[str]) -> int:
    """Print the keys. Returns the exit code: 2 for a word that none has."""
    try:
        print("\n".join(lines(" ".join(argv))), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

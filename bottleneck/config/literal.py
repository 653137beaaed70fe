"""Values as the command line takes them: what a message or a command prints can be pasted after KEY=."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

OTHERS = ("null", "true", "false", "nan", "inf")  # words that Hydra reads as other things than texts


def literal(value: Any) -> str:
    """A Python value as Hydra reads it: `[{kind: mos, rank: 64}]`, `null`, `"a=b.txt"`."""
    if hasattr(value, "tolist"):  # of NumPy or PyTorch
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple, range)):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, (int, float)):
        return repr(value)
    text = str(value)
    plain = text.isidentifier() and text.isascii() and text.lower() not in OTHERS
    return text if plain else in_quotes(text)


def in_quotes(value: str) -> str:
    """A text in the quotes of Hydra's grammar, where a backslash quotes a quote and is doubled before one."""
    escaped = re.sub(r'(\\*)"', r"\1\1\"", value)
    escaped += "\\" * (len(escaped) - len(escaped.rstrip("\\")))
    return f'"{escaped}"'

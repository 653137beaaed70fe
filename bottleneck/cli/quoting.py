"""Quote values that Hydra's grammar cannot parse unquoted, such as a path with `=` or an accent."""

from __future__ import annotations

import re
import shlex
from typing import Any, Optional, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from bottleneck.config.literal import in_quotes
from bottleneck.core.errors import UserError
from bottleneck.core.paths import CONF


def parsed(override: str) -> Optional[str]:
    """The value of an override as Hydra parses it, as text. None if it does not parse or is not a single value."""
    value = _read(override)
    return str(value) if isinstance(value, (str, int, float)) else None


def _read(override: str) -> Any:
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException:
        return None


def quoted(override: str) -> Optional[str]:
    """The override with its value in Hydra's quotes, quoted again for the shell: `'data.files="a=b.txt"'`.

    Returns: None if the override has no value, or if quoting does not make it valid.
    """
    key, equals, value = override.partition("=")
    if not equals or not value:
        return None
    if value[0] == "[" and value[-1] == "]":  # a list: its elements are quoted, not the whole
        elements = value[1:-1].split(",")
        line = f"{key}=[{','.join(e if _plain(e) else in_quotes(e) for e in elements)}]"
        return shlex.quote(line) if all(elements) and _read(line) is not None else None
    line = f"{key}={in_quotes(value)}"
    return shlex.quote(line) if parsed(line) == value else None


def _plain(element: str) -> bool:
    """Whether Hydra reads an element of a list without more quotes."""
    return parsed(f"key={element}") is not None


def unreadable(override: str, reason: str) -> str:
    """The error message for an override that Hydra cannot parse: the cause, and how to quote the value."""
    key, _, value = override.partition("=")
    line = quoted(override)
    closing = {"[": "]", "{": "}"}.get(value[:1], "")
    if closing and not value.endswith(closing):
        text = f"; for a value that begins with {value[0]}, write {line}" if line else ""
        return f"{override}: the closing {closing} is missing{text}"
    if line is None or not key.strip("+~"):
        return f"{override}: cannot be read as KEY=VALUE: {reason}"
    if closing:
        value = value[1:-1]
    special = sorted(set(re.sub(r"[A-Za-z0-9_/.,:*?@%+|\- \\$]", "", value)))
    what = f"the value contains {' '.join(special)}, so it" if special else "the value"
    return f"{override}: {what} must be quoted, for Hydra and for the shell: {line}"


def check_choices(words: Sequence[str]) -> None:
    """Raises UserError if a choice of a config group is a number or another value that is no name.

    Hydra ends in a TypeError or a ValueError that names neither the group nor the value.
    """
    for word in words:
        group = word.partition("=")[0].lstrip("+").partition("@")[0]
        value = _read(word) if "=" in word and re.fullmatch(r"\w+(/\w+)*", group) else None
        names = value if isinstance(value, list) else [value]
        wrong = [n for n in names if isinstance(n, (bool, int, float, dict, list))]
        if wrong and (CONF / group).is_dir():
            allowed = ", ".join(sorted(p.stem for p in (CONF / group).glob("*.yaml")))
            raise UserError(f"{word}: {wrong[0]} is not a name of a choice; allowed are {allowed}")

"""How to write a value that Hydra's grammar cannot read unquoted, such as a path with `=` or an accent."""

from __future__ import annotations

import re
import shlex
from typing import Optional

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException


def parsed(override: str) -> Optional[str]:
    """The text that Hydra reads an override's value as; None where it cannot be read or is no single value."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except OverrideParseException:
        return None
    return str(value) if isinstance(value, (str, int, float)) else None


def quoted(override: str) -> Optional[str]:
    """The override with its value in Hydra's quotes, quoted again for the shell: `'data.files="a=b.txt"'`.

    Returns: None where the override has no value, or where quotes do not help.
    """
    key, equals, value = override.partition("=")
    if not equals or not value:
        return None
    escaped = re.sub(r'(\\*)"', r"\1\1\"", value)  # Hydra: \" is a quote, and backslashes before a quote are doubled
    escaped += "\\" * (len(escaped) - len(escaped.rstrip("\\")))
    line = f'{key}="{escaped}"'
    return shlex.quote(line) if parsed(line) == value else None


def unreadable(override: str, reason: str) -> str:
    """The message for an override that Hydra cannot read: what it is, and how to quote it."""
    key, _, value = override.partition("=")
    line = quoted(override)
    closing = {"[": "]", "{": "}"}.get(value[:1], "")
    if closing and not value.endswith(closing):
        text = f"; for a value that begins with {value[0]}, write {line}" if line else ""
        return f"{override}: the closing {closing} is missing{text}"
    if line is None or not key.strip("+~"):
        return f"{override}: cannot be read as KEY=VALUE: {reason}"
    special = sorted(set(re.sub(r"[A-Za-z0-9_/.,:*?@%+|\- \\$]", "", value)))
    what = f"the value has {' '.join(special)} in it, so it" if special else "the value"
    return f"{override}: {what} must be quoted, for Hydra and for the shell: {line}"

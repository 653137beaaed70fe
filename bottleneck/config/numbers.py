"""Values of keys as counts, rates and lists, which the command line gives in several forms."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import ListConfig

from bottleneck.core.errors import check


def as_list(value: Any) -> list:
    """One value or a list, as a list."""
    return list(value) if isinstance(value, (list, tuple, ListConfig)) else [value]


def as_count(key: str, value: Any, minimum: int = 1) -> int:
    """A whole number; 150e6 is accepted for 150000000. Raises UserError naming `key`."""
    whole = not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
    )
    check(whole and value >= minimum, f"{key}={value!r}: must be a whole number of at least {minimum}")
    check(value < 2**63, f"{key}={value}: too large")
    return int(value)


def as_rate(key: str, value: Any) -> float:
    """A positive, finite number. Raises UserError naming `key`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    check(number and math.isfinite(value) and value > 0, f"{key}={value!r}: must be a number above 0")
    return float(value)


def unique(key: str, values: list) -> list:
    """The values. Raises UserError for none, and for a value that is listed twice."""
    check(len(values) > 0, f"{key}=[]: give at least one value")
    for i, v in enumerate(values):
        check(v not in values[:i], f"{key}: {v} is listed twice; give every value once")
    return values

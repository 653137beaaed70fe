"""The key that was probably meant by one that does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

FOREIGN = {"trainer.precision": "backbone.dtype", "data.path": "data.files"}  # what other projects call a key
CUTOFF = 0.8  # nearness from which on a key is named
BONUS = 0.15  # for the same group, and for a name that begins with the other


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """The known keys with the name of `key`, in whatever group; else the one with the nearest name; else none."""
    if FOREIGN.get(key) in known:
        return [FOREIGN[key]]
    same = [other for other in known if _split(other)[1] == _split(key)[1]]
    if same or not known:
        return same
    near, best = max((_nearness(key, other), other) for other in known)
    return [best] if near >= CUTOFF else []


def _split(key: str) -> tuple[str, str]:
    group, _, name = key.rpartition(".")
    return group, name


def _nearness(key: str, other: str) -> float:
    """Names are compared without their groups: a long group in common makes keys alike whatever their names are."""
    (group, name), (its_group, its_name) = _split(key), _split(other)
    begins = len(min(name, its_name, key=len)) > 2 and (name.startswith(its_name) or its_name.startswith(name))
    return SequenceMatcher(None, name, its_name).ratio() + BONUS * (group == its_group) + BONUS * begins

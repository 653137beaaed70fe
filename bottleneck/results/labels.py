"""Names of the lines of a picture, and text that Matplotlib draws as it stands."""

from __future__ import annotations

from typing import Any

from bottleneck.core.extensions import STARTS
from bottleneck.results.schema import series


def as_text(name: Any) -> str:
    """A name that Matplotlib draws as it stands; it would read text between two dollar signs as mathematics."""
    return str(name).replace("$", r"\$")


def kind_of(h: dict[str, Any]) -> str:
    """A head's kind with its options, such as mos components=4; empty for W = A B."""
    return series(h).partition(", ")[2]


def closed_form(init: str) -> bool:
    """Whether a start is a closed form, so that its loss before training is informative about the rank."""
    return init in STARTS and STARTS[init].closed_form


def labels(curves: list[dict[str, Any]]) -> list[str]:
    """Names of curves: the backbone, and whatever else distinguishes them."""
    parts = [[c["backbone"]] for c in curves]
    starts = [tuple(sorted({series(h) for h in c.get("heads", ())})) for c in curves]
    if len(set(starts)) > 1:
        for part, names in zip(parts, starts):
            part += names if len(names) == 1 else []  # each of several starts is a separate line
    for key in ("data", "tokens"):
        if len({c[key] for c in curves}) > 1:
            for part, c in zip(parts, curves):
                part.append(_count(c[key]) if key == "tokens" else str(c[key]))
    for key in sorted({k for c in curves for k in c["recipe"]}):
        if len({str(c["recipe"].get(key)) for c in curves}) > 1:
            for part, c in zip(parts, curves):
                # a temperature of 1 is the usual one
                if key in c["recipe"] and (key, c["recipe"][key]) != ("temperature", 1.0):
                    part.append(f"{key} {c['recipe'][key]}")
    # different weights, texts or targets under one name
    hashes = [(c.get("backbone_hash"), c.get("data_hash"), (c.get("target") or {}).get("hash")) for c in curves]
    for i, words in enumerate(("", "", "target ")):
        shared = [tuple(part) for part in parts]
        for part, name, found in zip(parts, shared, hashes):
            if len({other[i] for other, n in zip(hashes, shared) if n == name}) > 1:
                part.append(f"{words}{str(found[i])[:6]}")
    return [", ".join(part) for part in parts]


def _count(tokens: int) -> str:
    return f"{tokens / 1e6:.4g}M tokens" if tokens >= 1e6 else f"{tokens:,} tokens"

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


def line_names(curves: list[dict[str, Any]]) -> dict[str, str]:
    """What to call each line (`schema.series`) of some curves: its start where starts differ, its kind where kinds
    differ."""
    found = {s: s.partition(", ") for s in sorted({series(h) for c in curves for h in c.get("heads", ())})}
    kinds = len({kind for _, _, kind in found.values()}) > 1
    starts = len({start for start, _, _ in found.values()}) > 1
    if kinds:
        return {s: f"{start}, " * starts + (kind or "low_rank") for s, (start, _, kind) in found.items()}
    return {s: start if starts else s for s, (start, _, _) in found.items()}


def labels(curves: list[dict[str, Any]]) -> list[str]:
    """Names of curves: the backbone, and whatever else distinguishes them."""
    return [", ".join(part) for part in label_parts(curves)]


def label_parts(curves: list[dict[str, Any]], with_lines: bool = True) -> list[list[str]]:
    """The words of which `labels` are made: for each curve, the backbone first.

    Args: with_lines: a curve that has one line is named by it, too, where others have another.
    """
    parts = [[c["backbone"]] for c in curves]
    names = line_names(curves)
    kinds = {s.partition(", ")[2] for s in names}
    for part in parts if len(kinds) == 1 else ():
        part += kinds - {""}  # heads of one kind that is not low_rank
    lines = [tuple(sorted({series(h) for h in c.get("heads", ())})) for c in curves]
    if with_lines and len(set(lines)) > 1:
        for part, mine in zip(parts, lines):
            part += [names[s] for s in mine] if len(mine) == 1 else []  # each of several lines is named by itself
    for key in ("data", "tokens"):
        if len({c[key] for c in curves}) > 1:
            for part, c in zip(parts, curves):
                part.append(token_words(c[key]) if key == "tokens" else str(c[key]))
    for key in sorted({k for c in curves for k in c["recipe"]}):
        if len({str(c["recipe"].get(key)) for c in curves}) > 1:
            for part, c in zip(parts, curves):
                # a temperature of 1 is the usual one
                if key in c["recipe"] and (key, c["recipe"][key]) != ("temperature", 1.0):
                    part.append(f"{key} {c['recipe'][key]}")
    # different weights, texts or targets under one name
    hashes = [(c.get("backbone_hash"), c.get("data_hash"), (c.get("target") or {}).get("hash")) for c in curves]
    if len({c.get("data_hash") for c in curves}) > 1 and len({c.get("validation_tokens") for c in curves}) > 1:
        for part, c in zip(parts, curves):
            part.append(f"{c.get('validation_tokens') or 0:,} validation tokens")
    for i, words in enumerate(("weights", "text", "target")):
        shared = [tuple(part) for part in parts]
        for part, name, found in zip(parts, shared, hashes):
            if len({other[i] for other, n in zip(hashes, shared) if n == name}) > 1:
                part.append(f"{words} {str(found[i])[:6]}")
    return parts


def token_words(tokens: int) -> str:
    """The training tokens of a curve, as its label says them."""
    return f"{tokens / 1e6:.4g}M tokens" if tokens >= 1e6 else f"{tokens:,} tokens"

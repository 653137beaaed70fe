"""The metrics that curves hold: the registered ones, and those that a file from another installation declares."""

from __future__ import annotations

from typing import Any, NamedTuple

from bottleneck.core.extensions import Metric, metrics

BUILT_IN = "bottleneck."
LINES = ("solid", "dashed", "dotted")
SCALES = ("linear", "log", "share")


class Column(NamedTuple):
    """How a metric is shown; fields as in `bottleneck.core.extensions.Metric`."""

    name: str
    title: str
    unit: str
    better: str = "lower"
    form: str = ".4f"
    scale: str = "linear"
    line: str = "solid"
    table: bool = True
    picture: bool = True


def _column(m: Metric) -> Column:
    return Column(*(getattr(m, field) for field in Column._fields))


def from_plugins(heads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A curve's declarations of metrics of plugins, so that it can be read without the plugin."""
    outside = [m for m in metrics() if not m.measure.__module__.startswith(BUILT_IN)]
    return [_column(m)._asdict() for m in outside if any(m.name in h for h in heads)]


def columns(curves: list[dict[str, Any]]) -> list[Column]:
    """The built-in metrics and those of plugins that some head of the curves has, in the order of listing."""
    known = {m.name: _column(m) for m in metrics()}
    always = {m.name for m in metrics() if m.measure.__module__.startswith(BUILT_IN)}
    for c in curves:
        for given in c.get("metrics", ()):
            column = _described(given)
            if column is not None:
                known.setdefault(column.name, column)
    return [m for m in known.values() if m.name in always or any(m.name in h for c in curves for h in c["heads"])]


def _described(given: dict[str, Any]) -> Column | None:
    """A column from a file; None if the declaration is incomplete."""
    kinds = {f: type(d) for f, d in Column._field_defaults.items()} | {"name": str, "title": str, "unit": str}
    fields = {f: given[f] for f, kind in kinds.items() if isinstance(given.get(f), kind)}
    if not {"name", "title", "unit"} <= fields.keys():
        return None
    for field, allowed in (("line", LINES), ("scale", SCALES), ("better", ("lower", "higher"))):
        if fields.get(field) not in allowed:
            fields.pop(field, None)
    try:
        format(0.5, fields.get("form", ".4f"))
    except ValueError:
        fields.pop("form")
    return Column(**fields)

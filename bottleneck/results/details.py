"""details.png: the metrics of the heads, and the excess loss by frequency of the target, against rank."""

from __future__ import annotations

from typing import Any, BinaryIO, NamedTuple

from bottleneck.results.cost import AXES
from bottleneck.results.labels import as_text, labels
from bottleneck.results.metric_names import Column, columns
from bottleneck.results.picture import pyplot, rank_axis
from bottleneck.results.schema import series

MARKS = {"solid": "-", "dashed": "--", "dotted": ":"}


class Panel(NamedTuple):
    """Metrics that share a panel: they have one unit and one scale."""

    unit: str
    scale: str
    metrics: list[Column]


class Line(NamedTuple):
    """The best heads of one curve and start that have metrics."""

    name: str
    curve: dict[str, Any]
    heads: list[dict[str, Any]]


def panels(curves: list[dict[str, Any]]) -> list[Panel]:
    """The metrics of some curves that pictures show, by panel, in the order of listing."""
    found: dict[tuple[str, str], list[Column]] = {}
    heads = [h for c in curves for h in c["heads"]]
    for m in columns(curves):
        if m.picture and any(h.get(m.name) is not None for h in heads):
            found.setdefault((m.unit, m.scale), []).append(m)
    # the solid line first: it names the panel in a legend
    return [Panel(*key, sorted(ms, key=lambda m: m.line != "solid")) for key, ms in found.items()]


def has_details(curves: list[dict[str, Any]]) -> bool:
    """Whether some best head has a metric; runs of early versions have none."""
    shown = [m.name for panel in panels(curves) for m in panel.metrics]
    return any(h["best"] and h.get(name) is not None for c in curves for h in c["heads"] for name in shown)


def draw_details(curves: list[dict[str, Any]], file: BinaryIO) -> None:
    """Draw details.png. Some head must have metrics, see `has_details`."""
    plt = pyplot()
    shown = panels(curves)
    lines = _lines(curves, [m.name for panel in shown for m in panel.metrics])
    figure, axes = plt.subplots(
        1, len(shown) + 1, figsize=(13 / 3 * (len(shown) + 1), 4.2), dpi=130, layout="constrained"
    )
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for panel, place in zip(shown, axes):
        for number, line in enumerate(lines):
            _draw_panel(place, panel, line, colours[number % len(colours)], alone=len(lines) == 1)
        values = [h.get(m.name) or 0 for line in lines for h in line.heads for m in panel.metrics]
        if panel.scale == "log" and max(values, default=0) > 0:  # a head equal to the original one has a KL of 0
            place.set_yscale("log")
        if panel.scale == "share":
            place.set_ylim(0, 1.02)
        place.set_ylabel(as_text(panel.unit))
    title = "by the target's rank in frequency (1: most frequent)"
    axes[-1].set_title(title if len(lines) == 1 else f"{title}, {lines[0].name}", fontsize=9)
    axes[-1].set_ylabel("loss above the original head's, nats")
    _draw_bands(axes[-1], lines[0], plt.cm.viridis)
    ranks = {h["rank"] for line in lines for h in line.heads}
    for place in axes:
        rank_axis(place, ranks)
        place.set_xlabel(AXES["rank"].label)
        place.grid(alpha=0.25)
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=7, frameon=False)
    figure.savefig(file, format="png")
    plt.close(figure)


def _lines(curves: list[dict[str, Any]], metrics: list[str]) -> list[Line]:
    """One line for each curve and start that has metrics."""
    found = []
    for c, label in zip(curves, map(as_text, labels(curves))):
        starts = sorted({series(h) for h in c["heads"]})
        for start in starts:
            heads = [h for h in c["heads"] if h["best"] and series(h) == start]
            heads = [h for h in heads if any(h.get(name) is not None for name in metrics)]
            if heads:
                found.append(Line(label if len(starts) == 1 else f"{label}, {as_text(start)}", c, heads))
    return found


def _draw_panel(axes: Any, panel: Panel, line: Line, colour: str, *, alone: bool) -> None:
    """A line's metrics of one panel, named after the line; with several metrics, each adds its own name."""
    for m in panel.metrics:
        points = [(h["rank"], h[m.name]) for h in line.heads if h.get(m.name) is not None]
        title = as_text(m.title)
        label = line.name if len(panel.metrics) == 1 else title if alone else f"{line.name}, {title}"
        mark = {"marker": "o", "ms": 4 if len(panel.metrics) == 1 else 3}
        axes.plot([r for r, _ in points], [x for _, x in points], MARKS[m.line], color=colour, label=label, **mark)


def _draw_bands(axes: Any, line: Line, colours: Any) -> None:
    """Excess loss by frequency, of one line only: several would hide each other."""
    for i, band in enumerate(line.curve["reference"].get("bands", [])):
        heads = [h for h in line.heads if h.get("bands")]
        if band["tokens"] and band["loss"] is not None and all(h["bands"][i]["loss"] is not None for h in heads):
            axes.plot(
                [h["rank"] for h in heads],
                [h["bands"][i]["loss"] - band["loss"] for h in heads],
                "o-",
                ms=4,
                color=colours(i / 5),
                label=f"{band['band']} ({band['tokens']:,} tokens)",
            )

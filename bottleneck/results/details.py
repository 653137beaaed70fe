"""details.png: the metrics of the heads, and the excess loss by frequency of the target, against rank."""

from __future__ import annotations

from typing import Any, BinaryIO, NamedTuple

from bottleneck.results.cost import AXES
from bottleneck.results.labels import as_text, labels, line_names
from bottleneck.results.metric_names import Column, columns
from bottleneck.results.picture import colours_for, pyplot, rank_axis
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
    """Draw details.png. Some head must have metrics, see `has_details`.

    One line: each panel names its metrics. Several: a legend below the panels names the lines once, by colour, and
    panels with several metrics name these by style.
    """
    plt = pyplot()
    shown = panels(curves)
    lines = _lines(curves, [m.name for panel in shown for m in panel.metrics])
    figure, axes = plt.subplots(
        1, len(shown) + 1, figsize=(13 / 3 * (len(shown) + 1), 4.2), dpi=130, layout="constrained"
    )
    colours = colours_for(len(lines))
    for panel, place in zip(shown, axes):
        for number, line in enumerate(lines):
            _draw_panel(place, panel, line, colours[number % len(colours)])
        values = [h.get(m.name) or 0 for line in lines for h in line.heads for m in panel.metrics]
        if panel.scale == "log" and max(values, default=0) > 0:  # a head equal to the original one has a KL of 0
            place.set_yscale("log")
        if panel.scale == "share":
            place.set_ylim(0, 1.02)
        place.set_ylabel(as_text(panel.unit))
        if len(lines) == 1 or len(panel.metrics) > 1:
            colour = colours[0] if len(lines) == 1 else "0.3"
            place.legend(handles=_styles(panel, colour), fontsize=7, frameon=False, handlelength=3)
    title = "by place of the next token\nin the order of frequency (1: most frequent)"
    axes[-1].set_title(title if len(lines) == 1 else f"{title}\n{lines[0].name}", fontsize=9)
    axes[-1].set_ylabel("loss above the original head's, nats")
    _draw_bands(axes[-1], lines[0], plt.cm.viridis)
    if axes[-1].get_legend_handles_labels()[0]:
        axes[-1].legend(fontsize=7, frameon=False)
    ranks = {h["rank"] for line in lines for h in line.heads}
    for place in axes:
        rank_axis(place, ranks)
        place.set_xlabel(AXES["rank"].label)
        place.grid(alpha=0.25)
    if len(lines) > 1:
        names = [_handle("-", colours[i % len(colours)], line.name) for i, line in enumerate(lines)]
        across = max(1, min(6, len(names), 190 // (10 + max(len(line.name) for line in lines))))
        figure.legend(handles=names, loc="outside lower center", ncols=across, fontsize=8, frameon=False)
    figure.savefig(file, format="png")
    plt.close(figure)


def _handle(style: str, colour: Any, label: str) -> Any:
    """An entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], ls=style, marker="o", ms=4, color=colour, label=label)


def _styles(panel: Panel, colour: Any) -> list[Any]:
    """The entries that name the metrics of a panel by the style of their lines."""
    return [_handle(MARKS[m.line], colour, as_text(m.title)) for m in panel.metrics]


def _lines(curves: list[dict[str, Any]], metrics: list[str]) -> list[Line]:
    """One line for each curve and start that has metrics; of a single curve the starts alone are named."""
    found = []
    called = line_names(curves)
    for c, label in zip(curves, map(as_text, labels(curves))):
        starts = sorted({series(h) for h in c["heads"]})
        for start in starts:
            heads = [h for h in c["heads"] if h["best"] and series(h) == start]
            heads = [h for h in heads if any(h.get(name) is not None for name in metrics)]
            if heads:
                names = [label] * (len(curves) > 1 or len(starts) == 1) + [as_text(called[start])] * (len(starts) > 1)
                found.append(Line(", ".join(names), c, heads))
    return found


def _draw_panel(axes: Any, panel: Panel, line: Line, colour: Any) -> None:
    """A line's metrics of one panel."""
    for m in panel.metrics:
        points = [(h["rank"], h[m.name]) for h in line.heads if h.get(m.name) is not None]
        mark = {"marker": "o", "ms": 4 if len(panel.metrics) == 1 else 3}
        axes.plot([r for r, _ in points], [x for _, x in points], MARKS[m.line], color=colour, **mark)


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

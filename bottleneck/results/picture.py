"""Perplexity against rank, drawn as in Fig. 6 of Godey et al. 2024."""

from __future__ import annotations

import math
import textwrap
from typing import Any, BinaryIO, NamedTuple, Optional

from bottleneck.results.cost import AXES, MEASURED, Axis, measured_on, pareto
from bottleneck.results.equal_cost import NEAR
from bottleneck.results.knee import least_costs
from bottleneck.results.labels import as_text, closed_form, label_parts, line_names
from bottleneck.results.merging import perplexity_of
from bottleneck.results.schema import series

PAPER_MARK = 1000  # "degrades visibly below r ≈ 1000, whatever the model's size" (Godey et al. 2024, Fig. 6)
LEGEND_INSIDE = 44  # letters of a legend that stands inside the axes, at most
MARKERS = "os^Dvph*"
BEFORE = "_before training"  # of every dotted line; one entry of the legend serves them all
HIGHEST = 1e200  # larger perplexities are not drawn: Matplotlib's arithmetic on axes would overflow


def pyplot() -> Any:
    """Matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def colours_for(lines: int) -> list[Any]:
    """At least so many colours: the usual ten, twenty for more lines; beyond, they repeat."""
    plt = pyplot()
    few = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    found = few if lines <= len(few) else list(plt.cm.tab20.colors)
    return found * max(1, math.ceil(lines / len(found)))


def draw(curves: list[dict[str, Any]], file: BinaryIO, x: str = "rank") -> None:
    """Draw curve.png: one colour for each line; dashed: the original head; dotted: before training; faint: other rates.

    Bars are 95 % confidence intervals, over the validation text, of the difference from the original head's loss: both
    are measured on the same tokens, so they are far narrower than those of the loss itself, whose size depends on how
    unlike the documents are. Beside a cost there are none: the differences that matter there are those between heads of
    one cost (`results.equal_cost`).

    Args: x: a key of `cost.AXES`. Beside a cost, the picture has the Pareto front of all lines, if they share a
            backbone and text.
    """
    axis = AXES[x]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    style = _Style(curves)
    ranks: set[int] = set()
    values: list[float] = []
    points: list[tuple[float, float]] = []
    references = _References(curves)
    alike = len({(c["backbone_hash"], c["data_hash"]) for c in curves}) == 1  # else perplexities are not comparable
    for i, c in enumerate(curves):
        for name in style.lines_of(c):
            heads = [h for h in c["heads"] if series(h) == name and _drawable(h, axis)]
            _draw_heads(axes, axis, heads, style.next(i, name), own=c["reference"]["loss"])
            ranks |= {h["rank"] for h in heads}
            values += [h["perplexity"] for h in heads if h["best"]]
            points += [(cost, h["perplexity"]) for h in heads if h["best"] and (cost := axis.of(h)) is not None]
        values += references.draw(axes, c, style.first(i), style.runs[i])
        if len(curves) == 1:
            _draw_knees(axes, x, c)
        if len(curves) == 1 and style.count == 1:
            values += _draw_domains(axes, axis, c, style.colours[1:])
    style.finish(axes)
    if not axis.cost:
        rank_axis(axes, ranks)
        if len(ranks) > 8:
            axes.tick_params(axis="x", rotation=45)
        if ranks and min(ranks) <= PAPER_MARK <= max(ranks):
            axes.axvline(PAPER_MARK, color="0.6", ls="-.", lw=1, label="r = 1000 (Godey et al. 2024)")
    else:
        _cost_axis(axes, x, curves, points, front=alike and style.count > 1)
    if not ranks:
        axes.set_title(as_text(f"{style.title}: every head diverged".removeprefix(": ")), fontsize=9)
    if values:
        _perplexity_axis(axes, min(values), max(values))
        _name_closed_forms(axes)
    rows = [h for c in curves for h in c["heads"]]
    if x == "rank" and any(h.get("kind", "low_rank") != "low_rank" for h in rows):
        axes.set_xlabel("rank r of the head")
    else:
        measured = f"\n{textwrap.fill(measured_on(rows[0]), 100)}" if x in MEASURED else ""
        axes.set_xlabel(axis.label + measured, fontsize=8 if measured else None)
    axes.set_ylabel("validation perplexity")
    axes.grid(alpha=0.25)
    _legend(figure, axes)
    figure.savefig(file, format="png")
    plt.close(figure)


def _drawable(h: dict[str, Any], axis: Axis) -> bool:
    known = h["perplexity"] is not None and axis.of(h) is not None
    return h["status"] == "ok" and known and h["perplexity"] < HIGHEST


def _cost_axis(
    axes: Any, x: str, curves: list[dict[str, Any]], points: list[tuple[float, float]], *, front: bool
) -> None:
    """A logarithmic axis of cost, the original head's cost, and with several lines their Pareto front."""
    axis = AXES[x]
    from matplotlib.ticker import EngFormatter, LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}" if x in MEASURED else EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter("")
    for V, d in sorted({(c["vocab_size"], c["hidden_size"]) for c in curves if axis.weight is not None}):
        axes.axvline(
            (axis.weight or 1) * V * d,
            color="0.6",
            ls="-.",
            lw=1,
            label=f"original head's cost ({(axis.weight or 1) * V * d:,})",
        )
    if front:
        best = pareto(points, near=NEAR)
        label = f"Pareto front (costs within {NEAR:.0%} count as equal)" if best else "_front"
        axes.plot(*zip(*best), "o-", color="0.2", alpha=0.25, lw=4, ms=9, zorder=0, label=label)


class _Look(NamedTuple):
    """How a line is drawn, and its entry in the legend; one that begins with _ has none."""

    colour: Any
    marker: str
    label: str


class _Style:
    """Colours, markers and names of all lines. What their names share is the title, so that the legend is short.

    Several curves that have several lines each: the colour tells the line, the marker the curve.
    """

    def __init__(self, curves: list[dict[str, Any]]):
        self.names = line_names(curves)
        self.count = sum(len(self.lines_of(c)) for c in curves)
        self.crossed = len(curves) > 1 and any(len(self.lines_of(c)) > 1 for c in curves)
        parts = label_parts(curves, with_lines=not self.crossed)
        shared = [word for word in parts[0] if self.count > 1 and all(word in part for part in parts)]
        self.title = ", ".join(shared)
        self.runs = [as_text(", ".join(word for word in part if word not in shared)) for part in parts]
        self.several = [len(self.lines_of(c)) > 1 for c in curves]
        self.colours = colours_for(len(self.names) if self.crossed else self.count)
        self.alive = {series(h) for c in curves for h in c["heads"] if h["best"] and h["status"] == "ok"}
        self.number = 0
        self.firsts: dict[int, Any] = {}

    @staticmethod
    def lines_of(c: dict[str, Any]) -> list[str]:
        return sorted({series(h) for h in c["heads"]})

    def next(self, i: int, name: str) -> _Look:
        """Of the next line, which is `name` of curve i."""
        called = as_text(self.names[name])
        at = list(self.names).index(name) if self.crossed else self.number
        self.number += 1
        colour = self.colours[at]
        self.firsts.setdefault(i, colour)
        if self.crossed:
            return _Look(colour, MARKERS[i % len(MARKERS)], f"_{called}")
        words = [self.runs[i]] * bool(self.runs[i]) + [called] * self.several[i]
        return _Look(colour, "o", ", ".join(words) or called)

    def first(self, i: int) -> Any:
        """The colour of the first line of curve i; of a curve without lines, the next colour.

        Where a colour tells a line and not a curve: a grey for each curve.
        """
        if self.crossed:
            return ("0.2", "0.45", "0.65")[i % 3]
        return self.firsts.get(i, self.colours[self.number % len(self.colours)])

    def finish(self, axes: Any) -> None:
        """The title, and where curves have several lines the legend's entries for colours and markers."""
        if self.title:
            axes.set_title(as_text(self.title), fontsize=9)
        for at, name in enumerate(self.names if self.crossed else ()):
            label = as_text(self.names[name]) + " (diverged)" * (name not in self.alive)
            axes.plot([], [], color=self.colours[at], label=label)
        for i, run in enumerate(self.runs if self.crossed else ()):
            axes.plot([], [], MARKERS[i % len(MARKERS)], color="0.4", ms=5, label=run or "_run")


def _draw_heads(axes: Any, axis: Axis, heads: list[dict[str, Any]], look: _Look, *, own: Optional[float]) -> None:
    """A line through the best heads, with intervals; faint dots for the rest; dotted: a closed form before training.

    Args: own: the original head's loss.
    """
    best, rest = ([h for h in heads if h["best"] is wanted] for wanted in (True, False))
    line = [axis.of(h) for h in best], [h["perplexity"] for h in best]
    label = look.label if best else f"{look.label} (diverged)"
    axes.plot(*line, f"{look.marker}-", color=look.colour, label=label, ms=5)
    for h in best:
        excess = h.get("excess_interval")
        bounds = [perplexity_of(own + x) for x in excess] if excess and own is not None else [None]
        if None not in bounds and not axis.cost:
            axes.plot(
                [axis.of(h)] * 2, bounds, color=look.colour, lw=1.5, alpha=0.7, solid_capstyle="butt", label="_interval"
            )
    others = [axis.of(h) for h in rest], [h["perplexity"] for h in rest]
    axes.plot(*others, look.marker, color=look.colour, alpha=0.25, ms=3, label="_other rates")
    if best and closed_form(best[0]["init"]):
        before = [(axis.of(h), perplexity_of(h["initial_loss"])) for h in best]
        points = [(r, p) for r, p in before if p is not None and p < HIGHEST]
        axes.plot([r for r, _ in points], [p for _, p in points], ":", color=look.colour, lw=1.2, label=BEFORE)


def _name_closed_forms(axes: Any) -> None:
    """An entry of the legend, if one of the dotted lines is in sight; one point makes no line."""
    highest = axes.get_ylim()[1]
    dotted = [line.get_ydata() for line in axes.get_lines() if line.get_label() == BEFORE]
    if any(len(y) > 1 and min(y) < highest for y in dotted):
        axes.plot([], [], ":", color="0.3", lw=1.2, label=BEFORE.removeprefix("_"))


class _References:
    """Draws the line of the original head once for all curves of one backbone and text."""

    def __init__(self, curves: list[dict[str, Any]]):
        # with one line, or with several backbones or texts, it is drawn in the curve's colour and under its name
        alone = len({series(h) for c in curves for h in c["heads"]}) == 1 and len(curves) == 1
        self.apart = len({(c["backbone_hash"], c["data_hash"]) for c in curves}) > 1 or alone
        self.drawn: set[tuple] = set()

    def draw(self, axes: Any, c: dict[str, Any], colour: str, label: str) -> list[float]:
        """Returns the perplexities that the axis must show."""
        own = c["reference"]["perplexity"]
        if own is None or own >= HIGHEST:
            return []
        key = (c["backbone_hash"], c["data_hash"], f"{own:.4g}")
        if key not in self.drawn:
            self.drawn.add(key)
            name = f"{label}, " if label and self.apart else ""
            axes.axhline(
                own, color=colour if self.apart else "0.3", ls="--", lw=1, label=f"{name}original head ({own:.4g})"
            )
        return [own]


def _draw_knees(axes: Any, x: str, c: dict[str, Any]) -> None:
    """A mark where heads are within x % of the original head's loss: at the least rank or cost.

    The knee of one line of low-rank heads has a confidence interval; its cost too, where that follows from the rank.
    """
    axis, lines = AXES[x], {series(h) for h in c["heads"]}
    plain = len(lines) == 1 and all(h.get("kind", "low_rank") == "low_rank" for h in c["heads"])
    if plain and (not axis.cost or axis.weight is not None):
        scale = 1 if axis.weight is None else axis.weight * (c["vocab_size"] + c["hidden_size"])
        found = [
            (
                k["percent"],
                k["rank"] and scale * k["rank"],
                [scale * e for e in k.get("interval") or () if e is not None],
            )
            for k in c.get("knee", [])
        ]
    elif axis.cost:
        found = [(percent, cost, []) for percent, cost, _ in least_costs(c, x)]
    else:
        return
    named: dict[float, list[tuple[int, float]]] = {}
    for percent, at, interval in found:
        height = perplexity_of(c["reference"]["loss"] * (1 + percent / 100)) if at is not None else None
        if height is None or height >= HIGHEST:
            continue
        axes.plot([at], [height], "|", color="0.35", ms=11)
        if len(interval) == 2:
            axes.plot(interval, [height] * 2, color="0.35", lw=1, label="_interval")
        named.setdefault(at, []).append((percent, height))
    for at, marks in named.items():  # one name where several marks stand above each other
        words = ", ".join(f"{percent} %" for percent, _ in marks)
        highest = max(height for _, height in marks)
        place = {"textcoords": "offset points", "xytext": (3, 6)}
        axes.annotate(words, (at, highest), fontsize=7, color="0.35", **place)


def _draw_domains(axes: Any, axis: Axis, c: dict[str, Any], colours: list[str]) -> list[float]:
    """Perplexity of each text of a mix, and of the original head on it. Returns the values that the axis must show."""
    values: list[float] = []
    heads = [h for h in c["heads"] if h["best"] and _drawable(h, axis)]
    for i, own in enumerate(c["reference"].get("domains", [])):
        points = [(axis.of(h), h["domains"][i]["perplexity"]) for h in heads if h.get("domains")]
        points = [(x, y) for x, y in points if y is not None and y < HIGHEST]
        colour, name = colours[i % len(colours)], as_text(own["domain"])
        at = own["perplexity"]
        label = f"{name}, original head ({at:.4g})" if at is not None else name
        axes.plot([x for x, _ in points], [y for _, y in points], ".-", color=colour, lw=1, label=name)
        if at is not None and at < HIGHEST:
            axes.axhline(at, color=colour, ls="--", lw=0.7, label=label)
            values.append(at)
        values += [y for _, y in points]
    return values


def rank_axis(axes: Any, ranks: set[int]) -> None:
    """A logarithmic axis with a tick at every rank, named where there is room; nothing if there are no ranks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if not ranks:
        axes.set_xticks([])
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ranks)))
    named = _apart(ranks, share=0.05)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x in named else ""))
    axes.xaxis.set_minor_locator(NullLocator())


def _apart(ranks: set[int], share: float) -> set[int]:
    """Those of the ranks, powers of two first, that are at least a share of the logarithmic axis apart."""
    least = share * math.log2(max(ranks) / min(ranks))
    kept: list[int] = []
    for r in sorted(ranks, key=lambda r: (r & (r - 1) != 0, r)):
        if all(abs(math.log2(r / other)) >= least for other in kept):
            kept.append(r)
    return set(kept)


def _perplexity_axis(axes: Any, low: float, high: float) -> None:
    """A logarithmic axis around the trained heads: an untrained start far above must not flatten the curve."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axes.set_yscale("log")
    decades = math.log10(high) - math.log10(low)
    axes.set_ylim(low / 10 ** (0.08 * decades) / 1.02, high * 10 ** (0.15 * decades) * 1.02)
    steps = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1.5 else (1, 2, 5) if decades < 3 else (1,)
    apart = max(1, round(decades / 10))  # random starts may be a hundred orders of magnitude above
    exponents = range(math.floor(math.log10(low)) // apart * apart, math.ceil(math.log10(high)) + 1, apart)
    ticks = [m * 10.0**e for e in exponents for m in steps if low / 1.3 <= m * 10.0**e <= high * 1.5]
    if decades < 0.4:  # a factor of 2.5: the steps above would leave one or two ticks
        ticks = list(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(*axes.get_ylim()))
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _legend(figure: Any, axes: Any) -> None:
    """Inside the axes if it fits, else below them."""
    handles, names = axes.get_legend_handles_labels()
    if max(map(len, names), default=0) <= LEGEND_INSIDE and len(names) <= 6:
        axes.legend(fontsize=8, frameon=False)
        return
    wrapped = ["\n    ".join(textwrap.wrap(n, 110)) for n in names]
    columns = 2 if max(map(len, names)) <= 60 else 1
    rows = sum(1 + n.count("\n") for n in wrapped)
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-rows // columns))
    figure.legend(handles, wrapped, loc="outside lower left", fontsize=8, frameon=False, ncols=columns)

"""Perplexity against rank, drawn as in Fig. 6 of Godey et al. 2024."""

from __future__ import annotations

import math
import textwrap
from typing import Any, BinaryIO

PAPER_MARK = 1000  # "degrades visibly below r ≈ 1000, whatever the model's size" (Godey et al. 2024, Fig. 6)


def as_text(name: Any) -> str:
    """A name for a picture as it stands: between two dollars Matplotlib would read mathematics."""
    return str(name).replace("$", r"\$")


def labels(curves: list[dict[str, Any]]) -> list[str]:
    """Names of the lines: the backbone, and whatever else tells them apart."""
    parts = [[c["backbone"]] for c in curves]
    starts = [tuple(sorted({h["init"] for h in c.get("heads", ())})) for c in curves]
    if len(set(starts)) > 1:
        for part, inits in zip(parts, starts):
            part += inits if len(inits) == 1 else []  # several are lines of their own
    for key in ("data", "tokens"):
        if len({c[key] for c in curves}) > 1:
            for part, c in zip(parts, curves):
                part.append(_count(c[key]) if key == "tokens" else str(c[key]))
    for key in sorted({k for c in curves for k in c["recipe"]}):
        if len({str(c["recipe"].get(key)) for c in curves}) > 1:
            for part, c in zip(parts, curves):
                if key in c["recipe"] and (key, c["recipe"][key]) != (
                    "temperature",
                    1.0,
                ):  # some are there only where they are not what is usual
                    part.append(f"{key} {c['recipe'][key]}")
    for key in ("backbone_hash", "data_hash"):  # the same name for different weights or text
        for part, c in zip(parts, curves):
            if sum(p == part for p in parts) > 1:
                part.append(str(c[key])[:6])
    return [", ".join(part) for part in parts]


def _count(tokens: int) -> str:
    return f"{tokens / 1e6:.4g}M tokens" if tokens >= 1e6 else f"{tokens:,} tokens"


WIDEST = 44  # letters of a legend that stands inside the axes


def draw(curves: list[dict[str, Any]], file: BinaryIO) -> None:
    """One colour a line; dashed: the backbone's own head; dotted: before training; faint: heads that are not the best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    ranks: set[int] = set()
    values: list[float] = []
    owns: set[tuple] = set()
    number = 0
    for curve, label in zip(curves, map(as_text, labels(curves))):
        inits = sorted({h["init"] for h in curve["heads"]})
        first = colours[number % len(colours)]
        for init in inits:
            colour = colours[number % len(colours)]
            number += 1
            heads = [h for h in curve["heads"] if h["init"] == init and h["status"] == "ok" and h["perplexity"]]
            best = [h for h in heads if h["best"]]
            rest = [h for h in heads if not h["best"]]
            ranks |= {h["rank"] for h in heads}
            values += [h["perplexity"] for h in best]
            name = f"{label}, {init}" if len(inits) > 1 else label
            axes.plot([h["rank"] for h in best], [h["perplexity"] for h in best], "o-", color=colour, label=name, ms=5)
            axes.plot([h["rank"] for h in rest], [h["perplexity"] for h in rest], "o", color=colour, alpha=0.25, ms=3)
            if init == "fisher":
                known = [h for h in best if h["initial_loss"] is not None and h["initial_loss"] < 600]
                closed = [math.exp(h["initial_loss"]) for h in known]
                axes.plot(
                    [h["rank"] for h in known],
                    closed,
                    ":",
                    color=colour,
                    lw=1.2,
                    label=f"{name}, closed form (no training)",
                )
        own = curve["reference"]["perplexity"]
        if own:
            values.append(own)
            whose = (curve["backbone_hash"], curve["data_hash"], f"{own:.4g}")
            if whose not in owns:  # runs on the same backbone and text share it
                owns.add(whose)
                several = len({(c["backbone_hash"], c["data_hash"]) for c in curves}) > 1 or len(curves) == 1
                axes.axhline(
                    own,
                    color=first if several else "0.3",
                    ls="--",
                    lw=1,
                    label=f"{label if several else as_text(curve['backbone'])}, own head ({own:.4g})",
                )
            for k in curve.get("knee", []):
                if k["rank"] is not None and len(curves) == 1 and len(inits) == 1:
                    axes.plot(
                        [k["rank"]],
                        [math.exp(curve["reference"]["loss"] * (1 + k["percent"] / 100))],
                        "|",
                        color="0.35",
                        ms=11,
                    )
                    axes.annotate(
                        f"{k['percent']} %",
                        (k["rank"], math.exp(curve["reference"]["loss"] * (1 + k["percent"] / 100))),
                        fontsize=7,
                        color="0.35",
                        textcoords="offset points",
                        xytext=(3, 6),
                    )
    if values:
        axes.set_yscale("log")
    if not ranks:
        axes.set_title("every head diverged", fontsize=10)
        axes.set_xticks([])
    else:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(ranks)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        if len(ranks) > 8:
            axes.tick_params(axis="x", rotation=45)
        if min(ranks) <= PAPER_MARK <= max(ranks):
            axes.axvline(PAPER_MARK, color="0.6", ls="-.", lw=1, label="r = 1000 (Godey et al. 2024)")
    if values:  # an untrained start far above must not flatten the curve
        low, high = min(values), max(values)
        axes.set_ylim(low / (high / low) ** 0.08 / 1.02, high * (high / low) ** 0.15 * 1.02)
        decades = math.log10(high / low)
        steps = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1.5 else (1, 2, 5) if decades < 3 else (1,)
        apart = max(1, round(decades / 10))  # random starts may be a hundred decades away
        exponents = range(math.floor(math.log10(low)) // apart * apart, math.ceil(math.log10(high)) + 1, apart)
        axes.yaxis.set_major_locator(
            FixedLocator([m * 10.0**e for e in exponents for m in steps if low / 1.3 <= m * 10.0**e <= high * 1.5])
        )
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel("rank r of the head W = AB")
    axes.set_ylabel("validation perplexity")
    axes.grid(alpha=0.25)
    _legend(figure, axes)
    figure.savefig(file, format="png")
    plt.close(figure)


def _legend(figure: Any, axes: Any) -> None:
    """Inside the axes where it fits, else below them."""
    handles, names = axes.get_legend_handles_labels()
    if max(map(len, names), default=0) <= WIDEST and len(names) <= 6:
        axes.legend(fontsize=8, frameon=False)
        return
    wrapped = ["\n    ".join(textwrap.wrap(n, 110)) for n in names]
    figure.set_figheight(figure.get_figheight() + 0.17 * sum(1 + n.count("\n") for n in wrapped))
    figure.legend(handles, wrapped, loc="outside lower left", fontsize=8, frameon=False)


def draw_details(curves: list[dict[str, Any]], file: BinaryIO) -> bool:
    """KL to the full head, agreement and acceptance, and excess loss by frequency of the target, against rank.

    Returns: False, and nothing is drawn, where no curve has them.
    """
    curves = [c for c in curves if any(h.get("kl") is not None for h in c["heads"])]
    if not curves:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), dpi=130, layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    ranks: set[int] = set()
    lines = [
        (c, label, init)
        for c, label in zip(curves, map(as_text, labels(curves)))
        for init in sorted({h["init"] for h in c["heads"]})
    ]
    for number, (c, label, init) in enumerate(lines):
        colour = colours[number % len(colours)]
        heads = [h for h in c["heads"] if h["best"] and h["init"] == init and h.get("kl") is not None]
        x = [h["rank"] for h in heads]
        ranks |= set(x)
        name = label if len({i for d, _, i in lines if d is c}) == 1 else f"{label}, {init}"
        left.plot(x, [h["kl"] for h in heads], "o-", color=colour, ms=4, label=name)
        for key, style, words in (
            ("acceptance", "-", "accepted"),
            ("top1_agreement", "--", "top-1"),
            ("top5_agreement", ":", "top-5"),
        ):
            middle.plot(
                x,
                [h[key] for h in heads],
                style,
                marker="o",
                ms=3,
                color=colour,
                label=words if len(lines) == 1 else f"{name}, {words}",
            )
        if number == 0:  # bands of one line: several would hide each other
            for i, band in enumerate(c["reference"]["bands"]):
                if band["tokens"] and all(h["bands"][i]["loss"] is not None for h in heads):
                    right.plot(
                        x,
                        [h["bands"][i]["loss"] - band["loss"] for h in heads],
                        "o-",
                        ms=4,
                        color=plt.cm.viridis(i / 5),
                        label=f"{band['band']} ({band['tokens']:,} tokens)",
                    )
            right.set_title(
                f"by the target's place in frequency (1: most frequent){'' if len(lines) == 1 else f', {name}'}",
                fontsize=9,
            )
    if any(
        h["best"] and (h.get("kl") or 0) > 0 for c in curves for h in c["heads"]
    ):  # a full-rank head that is the own one loses nothing
        left.set_yscale("log")
    middle.set_ylim(0, 1.02)
    for axes, words in (
        (left, "KL from the full head, nats"),
        (middle, "share of tokens"),
        (right, "loss above the own head's, nats"),
    ):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(ranks)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("rank r of the head W = AB")
        axes.set_ylabel(words)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(file, format="png")
    plt.close(figure)
    return True

"""Figures in the style of curve.png. Matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import math
from typing import Any, BinaryIO, Sequence

MOST_PANELS = 4  # in a row


def canvas(panels: int = 1, width: float = 6.4, height: float = 4.4) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, `MOST_PANELS` in a row. Returns: the figure and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = math.ceil(panels / MOST_PANELS), min(panels, MOST_PANELS)
    size = (width * columns, height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, dpi=150, layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for a in axes[:panels]:
        a.grid(alpha=0.25)
    for a in axes[panels:]:
        a.set_axis_off()
    return figure, axes[:panels]


def save(figure: Any, file: BinaryIO) -> None:
    """Write the figure as PNG and close it, so that a process with many studies does not accumulate figures."""
    import matplotlib.pyplot as plt

    figure.savefig(file, format="png")
    plt.close(figure)


def shades(count: int) -> list[Any]:
    """Colours from early to late, for lines along training."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.0 if count == 1 else 0.92 * i / (count - 1)) for i in range(count)]


def step_bar(figure: Any, axes: Any, steps: Sequence[int]) -> None:
    """Draw a colour bar that names the steps of `shades(len(steps))`, for series too long for a legend."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, NoNorm

    named = sorted({round(k * (len(steps) - 1) / 5) for k in range(6)})
    colours = ScalarMappable(NoNorm(0, len(steps) - 1), ListedColormap(shades(len(steps))))
    bar = figure.colorbar(colours, ax=axes, ticks=named, label="training step")
    bar.set_ticklabels([f"{steps[i]:,}" for i in named])

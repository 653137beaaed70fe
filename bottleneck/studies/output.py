"""What every study leaves: finished parts to go on from, three files at the end, and a line of progress."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import time
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Optional, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bottleneck.core.errors import UserError
from bottleneck.core.files import write_atomic

SCHEMA = 2  # of NAME.json and the parts
LINE_SECONDS = 10.0


def plain(value: Any) -> Any:
    """The value as JSON holds it: numbers that are not finite become null, tuples lists."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Parts:
    """Results of single checkpoints or heads in FOLDER/NAME.parts, so that a study that was stopped goes on where it was.

    Args:
        identity: everything that a part's numbers depend on besides its key; parts of another identity are refused.
    """

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]):
        self.folder, self.name = folder / f"{name}.parts", name
        self.identity = json.loads(json.dumps(plain({"schema": SCHEMA, **identity}), sort_keys=True))

    def _path(self, key: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9.@-]+", "-", key.split()[0])[-60:].lstrip("-.")
        return self.folder / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"

    def get(self, key: str) -> Optional[dict[str, Any]]:
        """The stored part, or None. Raises UserError for one that is damaged or belongs to other settings."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text())
            identity, content = stored["identity"], stored["content"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: damaged ({type(error).__name__}: {error}); delete it, and it is computed again"
            ) from error
        differs = sorted(k for k in identity.keys() | self.identity.keys() if identity.get(k) != self.identity.get(k))
        if differs:
            k = differs[0]
            raise UserError(
                f"{path}: was computed with {k} {identity.get(k)}, now it is {self.identity.get(k)}; give another hydra.run.dir, or delete {self.folder}"
            )
        return content

    def put(self, key: str, content: dict[str, Any]) -> dict[str, Any]:
        """Store a part; returns it as `get` will."""
        content = plain(content)
        raw = json.dumps({"key": key, "identity": self.identity, "content": content}, allow_nan=False).encode()
        write_atomic(self._path(key), lambda part: part.write_bytes(raw))
        return content


def write(
    folder: Path,
    name: str,
    content: dict[str, Any],
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    draw: Callable[[BinaryIO], None],
) -> dict[str, Any]:
    """NAME.json, NAME.csv and NAME.png into `folder`; all three are made before the first is written. Returns: NAME.json's content."""
    content = plain({"schema": SCHEMA, "study": name, **content})
    picture = io.BytesIO()
    draw(picture)
    parts = {
        "json": (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(),
        "csv": _table(columns, rows),
        "png": picture.getvalue(),
    }
    for ending, raw in parts.items():
        write_atomic(folder / f"{name}.{ending}", lambda part, raw=raw: part.write_bytes(raw))
    return content


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows([("" if cell is None else cell) for cell in plain(list(row))] for row in rows)
    return table.getvalue().encode()


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV beside a study's three files."""
    raw = _table(columns, rows)
    write_atomic(path, lambda part: part.write_bytes(raw))


MOST_PANELS = 4  # in a row


def canvas(panels: int = 1, width: float = 6.4, height: float = 4.4) -> tuple[Any, list[Any]]:
    """A figure with axes side by side, in rows of `MOST_PANELS` where there are more, in the looks of curve.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = math.ceil(panels / MOST_PANELS), min(panels, MOST_PANELS)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), dpi=150, layout="constrained", squeeze=False
    )
    axes = list(grid.flat)
    for a in axes[:panels]:
        a.grid(alpha=0.25)
    for a in axes[panels:]:
        a.set_axis_off()
    return figure, axes[:panels]


def save(figure: Any, file: BinaryIO) -> None:
    """The figure as PNG; closed, so that many studies in one process hold none."""
    import matplotlib.pyplot as plt

    figure.savefig(file, format="png")
    plt.close(figure)


def shades(count: int) -> list[Any]:
    """Colours from early to late, for lines along training."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.0 if count == 1 else 0.92 * i / (count - 1)) for i in range(count)]


def step_bar(figure: Any, axes: Any, steps: Sequence[int]) -> None:
    """A bar beside the axes that names the steps of `shades(len(steps))`, where they are too many for a legend."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, NoNorm

    named = sorted({round(k * (len(steps) - 1) / 5) for k in range(6)})
    bar = figure.colorbar(
        ScalarMappable(NoNorm(0, len(steps) - 1), ListedColormap(shades(len(steps)))),
        ax=axes,
        ticks=named,
        label="training step",
    )
    bar.set_ticklabels([f"{steps[i]:,}" for i in named])


class Steps:
    """Progress through the parts of a study: a bar on a terminal, elsewhere a line a part and one every few seconds.

    Use as a context manager; `begin(label)` starts a part, `at(share)` moves within it, `end(note)` closes it.
    """

    def __init__(self, total: int, shown: bool, unit: str = "checkpoint"):
        self.total, self.shown, self.unit = total, shown, unit
        self.console = Console(stderr=True)
        self.done, self.computed, self.spent = 0, 0, 0.0
        self.label, self.began, self.said = "", 0.0, 0.0
        self.bar: Optional[Progress] = None

    def __enter__(self) -> Steps:
        if self.shown and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.1f}/{task.total:.0f}"),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(self.unit, total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, label: str) -> None:
        self.label, self.began = label, time.monotonic()
        self.said = self.began
        if self.bar is not None:
            self.bar.update(self.task, description=label)

    def at(self, share: float) -> None:
        """`share` of the part is through."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done + share)
        elif self.shown and now - self.said > LINE_SECONDS:
            self.said = now
            self.console.print(
                f"{self.unit} {self.done + 1}/{self.total} {self.label}: {100 * share:.0f} %, {(now - self.began) * (1 / max(share, 1e-3) - 1):.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def end(self, note: str, kept: bool = False) -> None:
        """Close the part; `kept`: it was there from an earlier run, so its time says nothing."""
        self.done += 1
        self.computed += not kept
        self.spent += 0.0 if kept else time.monotonic() - self.began
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        if self.shown:
            left = (self.total - self.done) * self.spent / max(1, self.computed)
            tail = (
                "kept from before"
                if kept
                else f"{time.monotonic() - self.began:.1f} s"
                + (f", about {left:.0f} s left" if self.done < self.total else "")
            )
            self.console.print(
                f"{self.unit} {self.done}/{self.total} {self.label}: {note} ({tail})", highlight=False, soft_wrap=True
            )

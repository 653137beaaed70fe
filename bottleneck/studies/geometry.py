"""arXiv 2602.20433: geometry of head and hidden states against the loss, across checkpoints or models (Kulkarni et al.
2026).

Reads the results of `saturation`, `spectrum` and `anisotropy`. Everything drifts along training, so even unrelated
numbers correlate. Therefore the correlation of the changes from one checkpoint to the next, in which the drift is
gone, is reported beside that of the values, each with a bootstrap interval. Neither shows causation.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
from rich.console import Console
from rich.table import Table

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_count, as_list
from bottleneck.core.errors import UserError, check
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text
from bottleneck.studies.shared.config import StudyConfig, StudyKeys, check_share
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save
from bottleneck.studies.shared.progress import StudyProgress

COLUMNS = ("metric", "pairs", "rho", "low", "high", "changes", "rho_changes", "low_changes", "high_changes", "reading")
SPECTRUM = ("entropy", "effective_rank", "stable_rank", "participation_ratio", "condition", "top_share")
ANISOTROPY = (
    "mean_cosine",
    "mean_cosine_centred",
    "mean_norm",
    "top_dimension_share",
    "cone",
    "mean_cosine_without_5",
)
# columns that each study's table must have
NEEDED = {
    "spectrum": ("model", "step", "matrix"),
    "anisotropy": ("model", "step", "layer", "layers"),
    "saturation": ("model", "step", "loss"),
}
Point = tuple[str, Optional[int]]  # model, step


@dataclass(frozen=True)
class Geometry(StudyKeys):
    """arXiv 2602.20433: metrics of saturation, spectrum and anisotropy against the loss."""

    results: list[str] = key(
        "???", "Folder or list of folders below which spectrum.csv, anisotropy.csv and saturation.csv are.", read=Any
    )
    level: float = key(0.95, "Confidence level of the bootstrap intervals.")
    draws: int = key(2_000, "Draws of the bootstrap.", read=Any)


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Geometry`."""
    keys.results = [str(r) for r in as_list(keys.results)]
    check(len(keys.results) > 0, "study.results=[]: give at least one folder")
    check_share("study.level", keys.level)
    keys.draws = as_count("study.draws", keys.draws)


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        with open(file, newline="") as f:
            reader = csv.DictReader(f)
            columns, rows = reader.fieldnames or (), list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    absent = [k for k in NEEDED[file.stem] if k not in columns]
    check(not absent, f"{file}: not a table of study={file.stem}: it has no column {', '.join(absent)}")
    check(bool(rows), f"{file}: has no rows")
    for line, row in enumerate(rows, 2):
        check(None not in (row[k] for k in NEEDED[file.stem]), f"{file}: line {line} ends too early")
    return rows


def _number(file: Path, row: dict[str, str], key: str) -> Optional[float]:
    try:
        value = float(row[key]) if row.get(key) else None
    except ValueError:
        raise UserError(f"{file}: {key}={row[key]} of {row['model']}, step {row['step']}: is not a number") from None
    return value if value is None or math.isfinite(value) else None


def _metrics(file: Path, row: dict[str, str]) -> dict[str, Optional[float]]:
    """The metrics and the loss in one row of a study's table."""
    if file.stem == "spectrum":
        return {f"{row['matrix']}: {m}": _number(file, row, m) for m in SPECTRUM}
    found = {"loss": _number(file, row, "loss")}
    if file.stem == "anisotropy" and row["layer"] == row["layers"]:
        found |= {f"last layer: {m}": _number(file, row, m) for m in ANISOTROPY}
    return found


def collect(folders: list[str]) -> tuple[dict[Point, dict[str, float]], list[str]]:
    """Metrics of every checkpoint from spectrum.csv, anisotropy.csv (last layer) and saturation.csv below some folders.

    Returns: numbers by (model, step), of checkpoints that have a loss; the files that were read.
    Raises: UserError if there are no such files or fewer than 3 checkpoints.
    """
    points: dict[Point, dict[str, float]] = {}
    read: list[str] = []
    where = f"study.results={', '.join(folders)}"
    for folder in map(Path, folders):
        check(folder.is_dir(), f"study.results={folder}: no such folder")
        for file in sorted(p for name in ("spectrum", "anisotropy", "saturation") for p in folder.rglob(f"{name}.csv")):
            read.append(str(file))
            for row in _rows(file):
                step = _number(file, row, "step")
                into = points.setdefault((row["model"], None if step is None else int(step)), {})
                into |= {k: v for k, v in _metrics(file, row).items() if v is not None}
    check(bool(read), f"{where}: no spectrum.csv, anisotropy.csv or saturation.csv below; run those studies first")
    kept = {p: m for p, m in points.items() if "loss" in m and len(m) > 1}
    few = f"{len(kept)} checkpoints have a loss and a metric, at least 3 are needed"
    check(len(kept) >= 3, f"{where}: {few}; loss is in anisotropy.csv and saturation.csv")
    return kept, read


def changes(points: dict[Point, dict[str, float]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Differences of a metric and of the loss between neighbouring checkpoints of one model, over all models."""
    dx, dy = [], []
    for model in dict.fromkeys(m for m, _ in points):  # in a fixed order, since the bootstrap draws by position
        own = sorted(((s or 0, v) for (m, s), v in points.items() if m == model and metric in v), key=lambda p: p[0])
        for (_, a), (_, b) in zip(own, own[1:]):
            dx.append(b[metric] - a[metric])
            dy.append(b["loss"] - a["loss"])
    return np.array(dx), np.array(dy)


Ends = tuple[Optional[float], Optional[float]]  # of an interval


def reading(values: Ends, of_changes: Ends, changes: int) -> str:
    """What the two intervals of ρ allow to say.

    Args:
        values, of_changes: intervals of ρ with the loss, of the values and of their changes between checkpoints.
        changes: number of changes, 0 if each model has one checkpoint.
    """

    def clear(ends: Ends) -> bool:
        low, high = ends
        return low is not None and high is not None and (low > 0 or high < 0)

    if not clear(values):
        return "no relation seen"
    if not changes:
        return "goes with the loss across models"
    return "moves with the loss" if clear(of_changes) else "drifts with training"


def metrics_of(points: dict[Point, dict[str, float]]) -> list[str]:
    """Names of all metrics."""
    return list(dict.fromkeys(k for m in points.values() for k in m if k != "loss"))


def relate(points: dict[Point, dict[str, float]], s: Geometry, progress: StudyProgress) -> list[dict[str, Any]]:
    """For each metric ρ with the loss and ρ of the changes, each with its interval."""
    from bottleneck.studies.formulas.spearman import (  # here, since scipy takes seconds to load
        bootstrap_interval,
        spearman,
    )

    out: list[dict[str, Any]] = []
    for metric in metrics_of(points):
        progress.begin(metric)
        pairs = [(m[metric], m["loss"]) for m in points.values() if metric in m]
        x, y = (np.array(v) for v in zip(*pairs))
        dx, dy = changes(points, metric)
        ends, ends_of_changes = bootstrap_interval(x, y, s.level, s.draws), bootstrap_interval(dx, dy, s.level, s.draws)
        out.append(
            {
                "metric": metric,
                "pairs": len(x),
                "rho": spearman(x, y),
                "low": ends[0],
                "high": ends[1],
                "changes": len(dx),
                "rho_changes": spearman(dx, dy),
                "low_changes": ends_of_changes[0],
                "high_changes": ends_of_changes[1],
                "reading": reading(ends, ends_of_changes, len(dx)),
            }
        )
        progress.end(out[-1]["reading"])
    return out


def draw(relations: list[dict[str, Any]], points: dict[Point, dict[str, float]], file: BinaryIO) -> None:
    """Left: ρ with its interval, of values and of changes.

    Then the three metrics with the largest |ρ| against the loss.
    """
    shown = [r for r in relations if r["rho"] is not None]
    top = sorted(shown, key=lambda r: -abs(r["rho"]))[:3]
    figure, panels = canvas(1 + len(top), width=4.8, height=max(4.4, 0.35 * len(shown) + 1))
    _intervals(panels[0], shown)
    for r, axes in zip(top, panels[1:]):
        for k, model in enumerate(sorted({m for m, _ in points})):
            with_metric = ((step or 0, v) for (m, step), v in points.items() if m == model and r["metric"] in v)
            own = [v for _, v in sorted(with_metric, key=lambda p: p[0])]
            x, y = [v[r["metric"]] for v in own], [v["loss"] for v in own]
            axes.plot(x, y, "o-", ms=3, lw=0.7, color=f"C{k % 10}", label=as_text(model))
        axes.set(xlabel=as_text(r["metric"]), ylabel="loss, nats a token", title=f"ρ = {r['rho']:.2f}")
        axes.legend(fontsize=7, frameon=False)
    save(figure, file)


def _intervals(axes: Any, shown: list[dict[str, Any]]) -> None:
    kinds = (
        ("rho", "of values", ("low", "high"), "C0", 0.12),
        ("rho_changes", "of changes", ("low_changes", "high_changes"), "C1", -0.12),
    )
    for i, r in enumerate(shown):
        for name, label, ends, colour, shift in kinds:
            if r[name] is not None:
                axes.plot([r[e] for e in ends], [i + shift] * 2, color=colour, lw=2, alpha=0.6)
                axes.plot([r[name]], [i + shift], "o", color=colour, ms=4, label=label if i == 0 else None)
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set_yticks(range(len(shown)), [as_text(r["metric"]) for r in shown], fontsize=7)
    axes.set(xlim=(-1.05, 1.05), xlabel="Spearman's ρ with the loss")
    axes.legend(fontsize=7, frameon=False)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of geometry.json."""
    s: Geometry = c.study
    points, files = collect(s.results)
    with StudyProgress(len(metrics_of(points)), c.trainer.progress, "metric") as progress:
        relations = relate(points, s, progress)
    checkpoints = [{"model": m, "step": step, **numbers} for (m, step), numbers in points.items()]
    content = {"files": files, "level": s.level, "draws": s.draws, "relations": relations, "checkpoints": checkpoints}
    rows = [tuple(r[k] for k in COLUMNS) for r in relations]
    result = write(folder, s.name, content, columns=COLUMNS, rows=rows, draw=lambda f: draw(relations, points, f))
    title = f"{len(points)} checkpoints: rank correlation with the loss ({100 * s.level:.0f} % intervals)"
    table = Table(title=title, title_justify="left")
    for column in ("metric", "ρ", "of changes", ""):
        table.add_column(column)
    for r in relations:
        cells = [
            "–" if r[k] is None else f"{r[k]:+.2f} ({r[a]:+.2f} to {r[b]:+.2f})"
            for k, a, b in (("rho", "low", "high"), ("rho_changes", "low_changes", "high_changes"))
        ]
        table.add_row(r["metric"], *cells, r["reading"])
    Console(width=max(100, Console().width)).print(table)
    return result


STUDIES.register(
    Study(
        name="geometry",
        summary="rank correlations of spectrum and anisotropy with the loss, from the results of those studies",
        figure="2602.20433",
        schema=Geometry,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                12,
                "2602.20433",
                "the metrics above against the loss",
                (f"{STUDY} study=geometry 'study.results=[paper/saturation,paper/anisotropy,paper/spectrum]'",),
                "none",
            ),
        ),
    )
)

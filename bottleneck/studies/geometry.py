"""Geometry beside loss, across checkpoints or models (Kulkarni et al. 2026, arXiv 2602.20433): what goes together, and how surely.

Reads what `saturation`, `spectrum` and `anisotropy` left. Everything drifts along training, so two numbers that have nothing to do with
each other correlate; therefore beside ρ with the loss stands ρ of the changes from one checkpoint to the next, where the drift is gone,
and a bootstrap interval with each. Neither says that one causes the other.
"""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
from rich.console import Console
from rich.table import Table

from bottleneck.core.errors import UserError, check
from bottleneck.results.picture import as_text
from bottleneck.studies.config import Geometry, StudyConfig
from bottleneck.studies.output import Steps, canvas, save, write
from bottleneck.studies.spearman import interval, spearman

log = logging.getLogger(__name__)
COLUMNS = ("metric", "pairs", "rho", "low", "high", "changes", "rho_changes", "low_changes", "high_changes", "reading")
SPECTRUM = ("entropy", "effective_rank", "stable_rank", "participation_ratio", "condition", "top_share")
ANISOTROPY = ("mean_cosine", "mean_cosine_centred", "mean_norm", "top_dimension_share")
NEEDED = {
    "spectrum": ("model", "step", "matrix"),
    "anisotropy": ("model", "step", "layer", "layers"),
    "saturation": ("model", "step", "loss"),
}  # columns
Point = tuple[str, Optional[int]]  # model, step


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


def collect(folders: list[str]) -> tuple[dict[Point, dict[str, float]], list[str]]:
    """Metrics of every checkpoint from spectrum.csv, anisotropy.csv (last layer) and saturation.csv below some folders.

    Returns: numbers by (model, step), of those that have a loss; the files that were read. Raises UserError where there is nothing.
    """
    points: dict[Point, dict[str, float]] = {}
    read: list[str] = []
    for folder in map(Path, folders):
        check(folder.is_dir(), f"study.results={folder}: no such folder")
        for file in sorted(p for name in ("spectrum", "anisotropy", "saturation") for p in folder.rglob(f"{name}.csv")):
            read.append(str(file))
            for row in _rows(file):
                step = _number(file, row, "step")
                into = points.setdefault((row["model"], None if step is None else int(step)), {})
                if file.stem == "spectrum":
                    found = {f"{row['matrix']}: {m}": _number(file, row, m) for m in SPECTRUM}
                elif file.stem == "anisotropy":
                    found = (
                        {f"last layer: {m}": _number(file, row, m) for m in ANISOTROPY}
                        if row["layer"] == row["layers"]
                        else {}
                    )
                    found["loss"] = _number(file, row, "loss")
                else:
                    found = {"loss": _number(file, row, "loss")}
                into |= {k: v for k, v in found.items() if v is not None}
    check(
        bool(read),
        f"study.results={', '.join(folders)}: no spectrum.csv, anisotropy.csv or saturation.csv below; run those studies first",
    )
    kept = {p: m for p, m in points.items() if "loss" in m and len(m) > 1}
    check(
        len(kept) >= 3,
        f"study.results={', '.join(folders)}: {len(kept)} checkpoints have a loss and a metric, at least 3 are needed; loss is in anisotropy.csv and saturation.csv",
    )
    return kept, read


def changes(points: dict[Point, dict[str, float]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Differences of a metric and of the loss between neighbouring checkpoints of one model, over all models."""
    dx, dy = [], []
    for model in dict.fromkeys(m for m, _ in points):  # in order: the bootstrap draws by place
        own = sorted(((s or 0, v) for (m, s), v in points.items() if m == model and metric in v), key=lambda p: p[0])
        for (_, a), (_, b) in zip(own, own[1:]):
            dx.append(b[metric] - a[metric])
            dy.append(b["loss"] - a["loss"])
    return np.array(dx), np.array(dy)


def reading(
    low: Optional[float],
    high: Optional[float],
    low_changes: Optional[float],
    high_changes: Optional[float],
    changes: int,
) -> str:
    """What the two intervals allow to say; `changes` between checkpoints there are, none where each model has one."""

    def clear(a: Optional[float], b: Optional[float]) -> bool:
        return a is not None and b is not None and (a > 0 or b < 0)

    if not clear(low, high):
        return "no relation seen"
    if not changes:
        return "goes with the loss across models"
    return "moves with the loss" if clear(low_changes, high_changes) else "drifts with training"


def metrics_of(points: dict[Point, dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(k for m in points.values() for k in m if k != "loss"))


def relate(points: dict[Point, dict[str, float]], s: Geometry, steps: Steps) -> list[dict[str, Any]]:
    """One row a metric: ρ with the loss and of the changes, each with its interval."""
    out = []
    for metric in metrics_of(points):
        steps.begin(metric)
        pairs = [(m[metric], m["loss"]) for m in points.values() if metric in m]
        x, y = (np.array(v) for v in zip(*pairs))
        dx, dy = changes(points, metric)
        low, high = interval(x, y, s.level, s.draws)
        low_c, high_c = interval(dx, dy, s.level, s.draws)
        out.append(
            {
                "metric": metric,
                "pairs": len(x),
                "rho": spearman(x, y),
                "low": low,
                "high": high,
                "changes": len(dx),
                "rho_changes": spearman(dx, dy),
                "low_changes": low_c,
                "high_changes": high_c,
                "reading": reading(low, high, low_c, high_c, len(dx)),
            }
        )
        steps.end(out[-1]["reading"])
    return out


def draw(relations: list[dict[str, Any]], points: dict[Point, dict[str, float]], file: BinaryIO) -> None:
    """Left: ρ with its interval, of values and of changes. Then the three metrics that follow the loss most, against it."""
    shown = [r for r in relations if r["rho"] is not None]
    top = sorted(shown, key=lambda r: -abs(r["rho"]))[:3]
    figure, panels = canvas(1 + len(top), width=4.8, height=max(4.4, 0.35 * len(shown) + 1))
    for i, r in enumerate(shown):
        for key, ends, colour, shift in (
            ("rho", ("low", "high"), "C0", 0.12),
            ("rho_changes", ("low_changes", "high_changes"), "C1", -0.12),
        ):
            if r[key] is not None:
                panels[0].plot([r[e] for e in ends], [i + shift] * 2, color=colour, lw=2, alpha=0.6)
                panels[0].plot(
                    [r[key]],
                    [i + shift],
                    "o",
                    color=colour,
                    ms=4,
                    label={0: key.replace("rho_changes", "of changes").replace("rho", "of values")}.get(i),
                )
    panels[0].axvline(0, color="0.5", lw=0.8)
    panels[0].set_yticks(range(len(shown)), [as_text(r["metric"]) for r in shown], fontsize=7)
    panels[0].set(xlim=(-1.05, 1.05), xlabel="Spearman's ρ with the loss")
    panels[0].legend(fontsize=7, frameon=False)
    for r, axes in zip(top, panels[1:]):
        for k, model in enumerate(sorted({m for m, _ in points})):
            series = sorted(
                ((step or 0, v) for (m, step), v in points.items() if m == model and r["metric"] in v),
                key=lambda p: p[0],
            )
            own = [v for _, v in series]
            axes.plot(
                [v[r["metric"]] for v in own],
                [v["loss"] for v in own],
                "o-",
                ms=3,
                lw=0.7,
                color=f"C{k % 10}",
                label=as_text(model),
            )
        axes.set(xlabel=as_text(r["metric"]), ylabel="loss, nats a token", title=f"ρ = {r['rho']:.2f}")
        axes.legend(fontsize=7, frameon=False)
    save(figure, file)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The study. Returns: the content of geometry.json."""
    s: Geometry = c.study
    points, files = collect(s.results)
    with Steps(len(metrics_of(points)), c.trainer.progress, "metric") as steps:
        relations = relate(points, s, steps)
    checkpoints = [{"model": m, "step": step, **numbers} for (m, step), numbers in points.items()]
    content = {"files": files, "level": s.level, "draws": s.draws, "relations": relations, "checkpoints": checkpoints}
    rows = [tuple(r[k] for k in COLUMNS) for r in relations]
    result = write(folder, s.name, content, COLUMNS, rows, lambda file: draw(relations, points, file))
    table = Table(
        title=f"{len(points)} checkpoints: rank correlation with the loss ({100 * s.level:.0f} % intervals)",
        title_justify="left",
    )
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

"""Scores of heads on tasks, read from lm-eval's results files; downstream.csv and downstream.png beside the curve."""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path
from typing import Any, BinaryIO, Iterator, Optional

from bottleneck.core.files import write_atomic
from bottleneck.results.labels import as_text, kind_of
from bottleneck.training.finished_run import FinishedRun

FULL = "full"  # the original head, among the names of heads
OURS = "bottleneck"  # our entry in a results file: which head, on which tasks
COLUMNS = (
    "head",
    "kind",
    "rank",
    "lr",
    "seed",
    "task",
    "version",
    "shots",
    "metric",
    "filter",
    "value",
    "stderr",
    "samples",
    "limit",
    "main",
)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results of one head, oldest first; incomplete files and files of other programs are ignored."""
    found = []
    for path in sorted(folder.glob("results_*.json")):  # the date is in the name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if (
            isinstance(content, dict)
            and isinstance(content.get(OURS), dict)
            and isinstance(content.get("results"), dict)
        ):
            found.append(content)
    return found


def heads_of(run: FinishedRun) -> dict[str, Optional[dict[str, Any]]]:
    """Names of what is scored: the original head (None), and the row of the best matrix of every rank."""
    return {FULL: None} | {run.file(row).stem: row for row in run.matrices()}


def identity(run: FinishedRun, row: Optional[dict[str, Any]]) -> str:
    """Identity of a head for its results: its tensors, and the backbone below them."""
    return run.curve["backbone_hash"] + (f"-{run.hash(row)}" if row else "")


def rows(run: FinishedRun, folder: Path) -> list[dict[str, Any]]:
    """One row per head, task, metric and limit, by rank, the original head last; the newest of several results."""
    out: dict[tuple, dict[str, Any]] = {}
    for name, row in sorted(heads_of(run).items(), key=lambda item: item[1]["rank"] if item[1] else 10**9):
        if row is not None and not run.file(row).is_file():
            continue
        for content in read_results(folder / name):
            if content[OURS].get("head_hash") == identity(run, row):
                about: dict[str, Any] = {"head": name, "kind": kind_of(row) if row else ""}
                about |= {k: row[k] if row else None for k in ("rank", "lr", "seed")}
                for r in _scores(content):
                    out[name, r["task"], r["metric"], r["filter"], r["limit"]] = about | r
    return list(out.values())


def _scores(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for task, result in content["results"].items():
        keys = [k for k, v in result.items() if "," in k and "_stderr," not in k and isinstance(v, (int, float))]
        listed = (content.get("configs", {}).get(task) or {}).get("metric_list") or [{}]
        first = [k for k in keys if k.split(",")[0] == listed[0].get("metric")] or keys
        for key in keys:
            metric, _, chosen = key.partition(",")
            stderr = result.get(f"{metric}_stderr,{chosen}")
            yield {
                "task": task,
                "version": content.get("versions", {}).get(task),
                "shots": content.get("n-shot", {}).get(task),
                "metric": metric,
                "filter": chosen,
                "value": result[key],
                "stderr": stderr if isinstance(stderr, (int, float)) else None,  # lm-eval writes "N/A" if there is none
                "samples": (content.get("n-samples", {}).get(task) or {}).get("effective"),
                "limit": content[OURS].get("limit"),
                "main": key == first[0],
            }


def write(table: list[dict[str, Any]], tasks: list[str], limit: Optional[int], out: Path) -> None:
    """downstream.csv with every row, downstream.png with the main metric of some tasks."""
    text, picture = io.StringIO(newline=""), io.BytesIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(table)
    draw([r for r in table if r["main"] and r["limit"] == limit and r["task"] in tasks], tasks, picture)
    write_atomic(out / "downstream.csv", lambda part: part.write_bytes(text.getvalue().encode()))
    write_atomic(out / "downstream.png", lambda part: part.write_bytes(picture.getvalue()))


def draw(table: list[dict[str, Any]], tasks: list[str], file: BinaryIO) -> None:
    """Score against rank, one colour per task; bars and bands: one standard error; dashed: the original head."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    for number, task in enumerate(tasks):
        _draw_task(axes, task, [r for r in table if r["task"] == task], f"C{number % 10}")
    ranks = {r["rank"] for r in table if r["rank"] is not None and r["task"] in tasks}
    if ranks:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(ranks)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        if len(ranks) > 8:
            axes.tick_params(axis="x", rotation=45)
    axes.set_xlabel("rank r of the head W = AB")
    axes.set_ylabel("score")
    axes.grid(alpha=0.25)
    if table:
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, format="png")
    plt.close(figure)


def _draw_task(axes: Any, task: str, rows: list[dict[str, Any]], colour: str) -> None:
    points = [r for r in rows if r["rank"] is not None]
    kinds = dict.fromkeys(r["kind"] for r in points)
    for kind, style in zip(kinds, itertools.cycle(("o-", "s:", "^-.", "D--"))):
        x, y, bars = ([r[k] for r in points if r["kind"] == kind] for k in ("rank", "value", "stderr"))
        count = f", n = {points[0]['samples']}" if points[0]["samples"] else ""  # groups have none of their own
        label = as_text(", ".join([task, *([kind] if kind else [])])) + f" ({points[0]['metric']}{count})"
        bars = [b or 0 for b in bars]
        axes.errorbar(x, y, bars, fmt=style, ms=5, capsize=3, color=colour, label=label)
    for original in (r for r in rows if r["rank"] is None):
        value, error = original["value"], original["stderr"]
        axes.axhline(value, color=colour, ls="--", lw=1, label=f"{as_text(task)}, original head ({value:.4g})")
        if error:
            axes.axhspan(value - error, value + error, color=colour, alpha=0.08, lw=0)

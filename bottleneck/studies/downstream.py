"""Table 1: the best against the final checkpoint on downstream tasks, with errors, and whether the drop is more than noise."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.core.errors import check
from bottleneck.results.picture import as_text
from bottleneck.studies.config import Downstream, StudyConfig
from bottleneck.studies.evals import Results, Score, is_perplexity, lower_is_better, pick_metric, read_results
from bottleneck.studies.output import canvas, save, write
from bottleneck.studies.statistics import best_of_many, scatter

log = logging.getLogger(__name__)
COLUMNS = (
    "model",
    "task",
    "metric",
    "best_step",
    "best",
    "best_stderr",
    "final_step",
    "final",
    "final_stderr",
    "drop",
    "z",
    "chance",
    "saturates",
)
DRAWN = 12  # tasks in the picture at most: those with the largest drops


def compare(steps: list[int], scores: list[Score], metric: str, level: float, skip: float = 0.0) -> dict[str, Any]:
    """Best against last score of one task, the best among checkpoints past the first `skip` of the training: a model that has
    learned nothing yet may win a task by always giving the same answer.

    `drop` is how much worse the last one is, in the metric's unit; z is the drop over the standard error of a difference of two
    independent scores. Perplexities are compared as logarithms: their errors grow with them. The checkpoints answer the same
    questions, so that error is rather too large, and a `saturates` rather too rare. `chance` counts that the best is the
    luckiest of all checkpoints (`statistics.best_of_many`). Where standard errors are missing, the scatter of the scores along the
    training stands in for them (`statistics.scatter`), which takes 7 checkpoints or more.

    Returns: best and final {step, value, stderr}, drop, z and chance (None where no error is known), saturates: whether chance is
        below `level`; `verdict`, which says where that cannot be known.
    """
    sign = -1.0 if lower_is_better(metric) else 1.0
    late = [i for i, step in enumerate(steps) if step >= skip * steps[-1]]
    best = max(late, key=lambda i: (sign * scores[i].value, i))  # of equals the latest
    a, b = scores[best], scores[-1]
    drop = sign * (a.value - b.value)
    z = chance = None
    logs = is_perplexity(metric) and all(x.value > 0 for x in scores)
    gap = sign * (math.log(a.value) - math.log(b.value)) if logs else drop
    error = math.sqrt(2) * scatter([math.log(x.value) if logs else x.value for x in scores])
    if a.error is not None and b.error is not None:
        error = math.hypot(a.error / a.value, b.error / b.value) if logs else math.hypot(a.error, b.error)
    elif error == 0:
        error = None
    if error is not None:
        z = gap / error if error else (math.inf if gap else 0.0)
        chance = best_of_many(z, len(late) - 1)
    saturates = chance is not None and len(late) > 1 and chance < level
    said = (
        "saturates"
        if saturates
        else "no significant drop"
        if drop <= 0 or chance is not None
        else "no errors: not known whether the drop is noise"
    )
    if len(late) < 2:
        said = "a single checkpoint"
    ends = {
        which: {"step": steps[i], "value": scores[i].value, "stderr": scores[i].error}
        for which, i in (("best", best), ("final", -1))
    }
    return {
        "metric": metric,
        "lower_is_better": sign < 0,
        **ends,
        "drop": drop,
        "z": z,
        "chance": chance,
        "saturates": saturates,
        "verdict": said,
    }


def one_model(model: str, along: list[Results], tasks: list[str] | None, level: float, skip: float) -> dict[str, Any]:
    """Every task of one model. Raises UserError naming the file that lacks a task."""
    if tasks is None:
        # groups of tasks have entries without numbers
        tasks = sorted(t for t in along[0].tasks if set.intersection(*(set(entry.tasks.get(t, ())) for entry in along)))
        check(bool(tasks), f"{along[0].where}: no task in it with a number that all {len(along)} steps of {model} have")
    out = {}
    for item in tasks:
        # a colon may be part of a task's name
        task, _, metric = (item, "", "") if any(item in entry.tasks for entry in along) else item.rpartition(":")
        task, metric = (task or item), metric if task else ""
        metric = pick_metric(task, metric or None, along)
        scores = [entry.tasks[task][metric] for entry in along]
        steps = [entry.step for entry in along]
        points = [{"step": s, "value": x.value, "stderr": x.error} for s, x in zip(steps, scores)]
        out[item] = {"task": task, **compare(steps, scores, metric, level, skip), "checkpoints": points}
    return {"model": model, "steps": [entry.step for entry in along], "tasks": out}


def draw(models: list[dict[str, Any]], file: BinaryIO) -> None:
    """A panel a model: every task along training as a share of its best score, so that 1 is the best and a drop falls."""
    figure, panels = canvas(len(models), width=5.2)
    for axes, m in zip(panels, models):
        chosen = sorted(m["tasks"].items(), key=lambda item: -(item[1]["z"] or 0.0))[:DRAWN]
        for name, t in chosen:
            i = list(m["tasks"]).index(name)  # the same colour in every panel
            best = t["best"]["value"]
            points = [p for p in t["checkpoints"] if p["step"] >= 0.004 * m["steps"][-1]]
            share = [
                (best / p["value"] if t["lower_is_better"] else p["value"] / best) if best and p["value"] else math.nan
                for p in points
            ]
            errors = [s * (p["stderr"] or 0.0) / abs(p["value"]) if p["value"] else 0.0 for s, p in zip(share, points)]
            axes.errorbar(
                [p["step"] for p in points],
                share,
                yerr=errors,
                fmt="o-",
                ms=2.5,
                lw=1.1,
                elinewidth=0.6,
                color=f"C{i % 10}",
                label=as_text(f"{name} {t['metric']}: {t['verdict']}"),
            )
        axes.set_ylim(0, 1.12)
        axes.set_title(as_text(m["model"]), fontsize=10)
        axes.set_xlabel("training step")
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    panels[0].set_ylabel("score as a share of the best checkpoint's\n(perplexities inverted; bars: standard error)")
    save(figure, file)


def show(models: list[dict[str, Any]], console: Console) -> None:
    """Table 1: best and final score of each task, the drop in standard errors, the verdict."""
    for m in models:
        table = Table(
            title=escape(f"{m['model']}: {len(m['steps'])} checkpoints to step {m['steps'][-1]}"), title_justify="left"
        )
        for column in ("task", "metric", "best", "at step", "final", "drop / error", "chance", "saturates"):
            table.add_column(column, justify="left" if column in ("task", "metric") else "right")
        for name, t in m["tasks"].items():
            cells = [
                f"{t[which]['value']:.4g}" + ("" if t[which]["stderr"] is None else f" ± {t[which]['stderr']:.2g}")
                for which in ("best", "final")
            ]
            said = (
                "yes"
                if t["saturates"]
                else "no"
                if t["verdict"].startswith("no significant")
                else t["verdict"].partition(":")[0]
            )
            numbers = ["–" if t[k] is None else format(t[k], form) for k, form in (("z", ".1f"), ("chance", ".2g"))]
            table.add_row(name, t["metric"], cells[0], str(t["best"]["step"]), cells[1], *numbers, said)
        console.print(table)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The study. Returns: the content of downstream.json: `model`, `steps`, `tasks`, or several of these under `models`."""
    s: Downstream = c.study
    models = [
        one_model(name, along, s.tasks, s.level, s.skip)
        for name, along in read_results(Path(s.results).expanduser()).items()
    ]
    about = {"results": s.results, "level": s.level, "skip": s.skip}
    content = {**about, **models[0]} if len(models) == 1 else {**about, "models": models}
    rows = [
        (
            m["model"],
            name,
            t["metric"],
            t["best"]["step"],
            t["best"]["value"],
            t["best"]["stderr"],
            t["final"]["step"],
            t["final"]["value"],
            t["final"]["stderr"],
            t["drop"],
            t["z"],
            t["chance"],
            t["saturates"],
        )
        for m in models
        for name, t in m["tasks"].items()
    ]
    result = write(folder, s.name, content, COLUMNS, rows, lambda file: draw(models, file))
    show(models, Console(width=max(130, Console().width)))
    return result

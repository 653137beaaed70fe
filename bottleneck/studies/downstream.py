"""Table 1: the best against the final checkpoint on downstream tasks, and whether the drop is more than noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Optional

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_list
from bottleneck.core.errors import check
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text
from bottleneck.studies.formulas.statistics import best_of_many, correction, scatter
from bottleneck.studies.shared.config import StudyConfig, StudyKeys, check_share
from bottleneck.studies.shared.figures import STUDY, Figure
from bottleneck.studies.shared.harness_results import (
    Results,
    Score,
    is_bias,
    is_lower_better,
    is_perplexity,
    lower_is_better,
    pick_metric,
    read_harness_results,
)
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

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
BIAS = "no verdict: measures a bias, not quality"
UNKNOWN = "no verdict: not known whether a higher score is better"


@dataclass(frozen=True)
class Downstream(StudyKeys):
    """Table 1: best against final checkpoint in results of lm-evaluation-harness."""

    results: str = key(
        "???",
        "Folder of result files (step1000.json, step2000/results_….json), or one folder for each model; if no folder "
        "names the model, the model_args in the files do.",
    )
    tasks: Optional[list[str]] = key(
        None,
        "A task or a list, each TASK or TASK:METRIC (sciq:acc_norm); default: every task with a number in all files.",
        read=Any,
    )
    skip: float = key(0.02, "Share of the training, its warm-up, whose checkpoints cannot be the best.")
    level: float = key(0.05, "Accepted chance of calling noise a drop, over all checkpoints that could have been best.")


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Downstream`."""
    check(0 <= keys.skip < 1, f"study.skip={keys.skip}: must be at least 0 and below 1")
    check_share("study.level", keys.level)
    if keys.tasks is not None:
        keys.tasks = [str(t) for t in as_list(keys.tasks)]
        unique = len(keys.tasks) > 0 and len(set(keys.tasks)) == len(keys.tasks)
        check(unique, f"study.tasks={keys.tasks}: give each task once, and at least one")


def compare_checkpoints(
    steps: list[int], scores: list[Score], metric: str, level: float, skip: float = 0.0, lower: Optional[bool] = None
) -> dict[str, Any]:
    """Compare the best score of one task with the last one.

    The best is taken among checkpoints after the first `skip` of the training: a model that has learned nothing yet
    may win a task by always giving the same answer. `drop` is how much worse the last score is, in the metric's unit;
    z is the drop over the standard error of a difference of two independent scores. Perplexities are compared as
    logarithms, since their errors grow with them. The checkpoints answer the same questions, so that error is too
    large and `saturates` too rare, if anything. `chance` accounts for the best being the luckiest of all checkpoints
    (`statistics.best_of_many`). Missing standard errors are replaced by the noise of the series (`statistics.scatter`
    and `correction`), which takes 7 checkpoints or more; with them, `chance` is about the noise of the questions only,
    not about that of training. There is no verdict on measures of bias, where neither a higher nor a lower score
    means a better model, nor on a drop whose error is not known.

    Args: lower: whether a lower score is better; default: by the metric's name.
    Returns: best and final {step, value, stderr}, drop, z and chance (None if no error is known), `saturates`:
        whether chance is below `level` (None without a verdict), and the sentence `verdict`.
    """
    sign = -1.0 if (lower_is_better(metric) if lower is None else lower) else 1.0
    late = [i for i, step in enumerate(steps) if step >= skip * steps[-1]]
    best = max(late, key=lambda i: (sign * scores[i].value, i))  # the latest of equal ones
    a, b = scores[best], scores[-1]
    drop = sign * (a.value - b.value)
    logs = is_perplexity(metric) and all(x.value > 0 for x in scores)
    gap = sign * (math.log(a.value) - math.log(b.value)) if logs else drop
    error = _difference_error(a, b, logs)
    if error is None:
        noise = scatter([math.log(x.value) if logs else x.value for x in scores])
        error = math.sqrt(2) * noise * correction(len(scores), level, len(late) - 1) if noise else None
    z = chance = None
    if error is not None:
        z = gap / error if error else (math.inf if gap else 0.0)
        chance = best_of_many(z, len(late) - 1)
    saturates: Optional[bool] = chance is not None and len(late) > 1 and chance < level
    said = "saturates" if saturates else "no significant drop"
    if not saturates and drop > 0 and chance is None:
        saturates, said = None, "no errors: not known whether the drop is noise"
    if len(late) < 2:
        saturates, said = None, "a single checkpoint"
    if is_bias(metric):
        saturates, said = None, BIAS
    places = (("best", best), ("final", -1))
    ends = {which: {"step": steps[i], "value": scores[i].value, "stderr": scores[i].error} for which, i in places}
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


def _difference_error(a: Score, b: Score, logs: bool) -> Optional[float]:
    """Standard error of a − b, or of log a − log b; None if one of the errors is unknown."""
    if a.error is None or b.error is None:
        return None
    return math.hypot(a.error / a.value, b.error / b.value) if logs else math.hypot(a.error, b.error)


def one_model(
    model: str, along: list[Results], *, tasks: Optional[list[str]], level: float, skip: float
) -> dict[str, Any]:
    """Compare every task of one model. Raises: UserError naming the file that lacks a task."""
    if tasks is None:
        # groups of tasks have entries without numbers
        tasks = sorted(t for t in along[0].tasks if set.intersection(*(set(entry.tasks.get(t, ())) for entry in along)))
        check(bool(tasks), f"{along[0].where}: no task in it with a number that all {len(along)} steps of {model} have")
    out = {}
    for item in tasks:
        # the name of a task may contain a colon
        task, _, metric = (item, "", "") if any(item in entry.tasks for entry in along) else item.rpartition(":")
        task, metric = (task or item), metric if task else ""
        metric = pick_metric(task, metric or None, along)
        scores = [entry.tasks[task][metric] for entry in along]
        steps = [entry.step for entry in along]
        points = [{"step": s, "value": x.value, "stderr": x.error} for s, x in zip(steps, scores)]
        lower = is_lower_better(along, task, metric)
        found = compare_checkpoints(steps, scores, metric, level, skip, lower)
        if lower is None and not is_bias(metric):
            found |= {"saturates": None, "verdict": UNKNOWN}
        out[item] = {"task": task, **found, "checkpoints": points}
    return {"model": model, "steps": [entry.step for entry in along], "tasks": out}


def draw(models: list[dict[str, Any]], file: BinaryIO) -> None:
    """One panel for each model: every task along training as a share of its best score, so that 1 is the best."""
    figure, panels = canvas(len(models), width=5.2)
    for axes, m in zip(panels, models):
        scored = [item for item in m["tasks"].items() if item[1]["verdict"] != BIAS]
        for name, t in sorted(scored, key=lambda item: -(item[1]["z"] or 0.0))[:DRAWN]:
            colour = f"C{list(m['tasks']).index(name) % 10}"  # the same in every panel
            _task(axes, t, f"{name} {t['metric']}: {t['verdict']}", colour=colour, first=0.004 * m["steps"][-1])
        axes.set_ylim(0, 1.12)
        axes.set_title(as_text(m["model"]), fontsize=10)
        axes.set_xlabel("training step")
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    panels[0].set_ylabel("score as a share of the best checkpoint's\n(perplexities inverted; bars: standard error)")
    save(figure, file)


def _task(axes: Any, t: dict[str, Any], label: str, *, colour: str, first: float) -> None:
    best = t["best"]["value"]
    points = [p for p in t["checkpoints"] if p["step"] >= first]

    def share(value: float) -> float:
        if not best or not value:
            return math.nan
        return best / value if t["lower_is_better"] else value / best

    shares = [share(p["value"]) for p in points]
    errors = [s * (p["stderr"] or 0.0) / abs(p["value"]) if p["value"] else 0.0 for s, p in zip(shares, points)]
    x = [p["step"] for p in points]
    axes.errorbar(x, shares, yerr=errors, fmt="o-", ms=2.5, lw=1.1, elinewidth=0.6, color=colour, label=as_text(label))


def show(models: list[dict[str, Any]], console: Console) -> None:
    """Print Table 1: best and final score of each task, the drop in standard errors, the verdict."""
    for m in models:
        title = escape(f"{m['model']}: {len(m['steps'])} checkpoints to step {m['steps'][-1]}")
        table = Table(title=title, title_justify="left")
        for column in ("task", "metric", "best", "at step", "final", "drop / error", "chance", "saturates"):
            table.add_column(column, justify="left" if column in ("task", "metric") else "right")
        for name, t in m["tasks"].items():
            best, final = (_cell(t[which]) for which in ("best", "final"))
            numbers = ["–" if t[k] is None else format(t[k], form) for k, form in (("z", ".1f"), ("chance", ".2g"))]
            table.add_row(name, t["metric"], best, str(t["best"]["step"]), final, *numbers, _answer(t))
        console.print(table)


def _cell(end: dict[str, Any]) -> str:
    return f"{end['value']:.4g}" + ("" if end["stderr"] is None else f" ± {end['stderr']:.2g}")


def _answer(t: dict[str, Any]) -> str:
    if t["saturates"]:
        return "yes"
    if t["verdict"] == BIAS:
        return "bias"
    return "no" if t["verdict"].startswith("no significant") else t["verdict"].partition(":")[0]


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of downstream.json: `model`, `steps`, `tasks`, or a list `models` of them."""
    s: Downstream = c.study
    found = read_harness_results(Path(s.results).expanduser())
    models = [one_model(name, along, tasks=s.tasks, level=s.level, skip=s.skip) for name, along in found.items()]
    about = {"results": s.results, "level": s.level, "skip": s.skip}
    content = {**about, **models[0]} if len(models) == 1 else {**about, "models": models}
    rows = [
        (
            m["model"],
            name,
            t["metric"],
            *(t["best"][k] for k in ("step", "value", "stderr")),
            *(t["final"][k] for k in ("step", "value", "stderr")),
            *(t[k] for k in ("drop", "z", "chance", "saturates")),
        )
        for m in models
        for name, t in m["tasks"].items()
    ]
    result = write(folder, s.name, content, columns=COLUMNS, rows=rows, draw=lambda file: draw(models, file))
    show(models, Console(width=max(130, Console().width)))
    return result


STUDIES.register(
    Study(
        name="downstream",
        summary="best against final checkpoint on each task, from results of lm-evaluation-harness",
        figure="Table 1",
        schema=Downstream,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                2,
                "Table 1",
                "best against final checkpoint, from the results that EleutherAI published",
                (
                    "git clone https://github.com/EleutherAI/pythia",
                    f"{STUDY} study=downstream study.results=pythia/evals/pythia-v1/pythia-160m/zero-shot "
                    "'study.tasks=[lambada_openai,arc_easy,sciq]'",
                ),
                "none",
            ),
        ),
    )
)

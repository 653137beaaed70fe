"""Results of lm-evaluation-harness along training: which file belongs to which model and step, one number of a task.

Old files have {"results": {task: {"acc": …, "acc_stderr": …}}}; current ones call them "acc,none" and "acc_stderr,none" with
the name of a filter after the comma, and write "N/A" where there is no error.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from bottleneck.errors import UserError, check
from bottleneck.studies.config import step_number

# of a task with several, the first that it has: Table 1 has LAMBADA's perplexity and accuracies elsewhere
PREFERRED = ("perplexity", "ppl", "word_perplexity", "byte_perplexity", "bits_per_byte", "acc", "exact_match", "em", "f1", "mc2", "acc_norm")
LOWER = re.compile(r"ppl|perplexity|bits_per_byte|loss|brier|nll|likelihood_diff|error|\bwer\b|\bter\b")
FILTERS = ("none", "strict-match", "get-answer")  # of current files; the plain one first


@dataclass(frozen=True)
class Score:
    """One metric of one task. `error` is its standard error, None where the file has none."""

    value: float
    error: Optional[float]


@dataclass
class Results:
    """Results of one model at one step, out of one or several files: task -> metric -> score."""

    model: str
    step: int
    files: list[Path] = field(default_factory=list)
    tasks: dict[str, dict[str, Score]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return ", ".join(map(str, self.files))


def lower_is_better(metric: str) -> bool:
    """True for perplexities, losses and errors."""
    return bool(LOWER.search(metric.lower()))


def is_perplexity(metric: str) -> bool:
    """True for what is an exponential of a mean, and so is compared in logarithms."""
    return bool(re.search(r"ppl|perplexity", metric.lower()))


def scores(table: dict[str, Any]) -> dict[str, Score]:
    """The metrics of one task's entry, in either format, errors joined to their values; what is no number is left out."""
    plain: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        name, _, kind = key.partition(",")
        plain.setdefault(name, {})[kind] = value
    chosen = {name: next((kinds[f] for f in ("", *FILTERS) if f in kinds), next(iter(kinds.values()))) for name, kinds in plain.items()}
    out = {}
    for name, value in chosen.items():
        if name.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        error = chosen.get(f"{name}_stderr")
        known = isinstance(error, (int, float)) and not isinstance(error, bool) and math.isfinite(error)
        out[name] = Score(float(value), float(error) if known else None)
    out.pop("sample_len", None)
    return out


def _place(file: Path, root: Path, content: dict[str, Any]) -> tuple[str, Optional[int]]:
    """Model and step of a result file: from the names of file and folders below `root`, else from the model's arguments in it."""
    parts = [*file.relative_to(root).parts[:-1], file.stem]
    step, rest = None, []
    for i, part in enumerate(parts):
        number = step_number(part)
        if number is not None:
            step = number
        elif i < len(parts) - 1:  # a file's own name, such as results_2024-05-01T12-00-00.123, names no model
            rest.append(part)
    if step is None:
        config = content.get("config") if isinstance(content.get("config"), dict) else {}
        arguments = config.get("model_args")
        told = arguments.get("revision") if isinstance(arguments, dict) else next(iter(re.findall(r"revision=([^,\s]+)", str(arguments))), None)
        step = step_number(str(told or config.get("model_revision") or ""))
    return "/".join(rest) or root.name, step


def read_results(root: Path) -> dict[str, list[Results]]:
    """All result files below a folder: model -> results by rising step.

    Raises: UserError naming the file for one that is no result of the harness, has no step, or says another number for a task
        than a second file of the same step; or where the folder has no files.
    """
    check(root.is_dir(), f"study.results={root}: no such folder")
    files = sorted(p for p in root.rglob("*.json") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts))
    check(bool(files), f"study.results={root}: no result files (*.json) there")
    found: dict[tuple[str, int], Results] = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a result of lm-evaluation-harness: {error}") from error
        tables = content.get("results") if isinstance(content, dict) else None
        check(isinstance(tables, dict) and all(isinstance(t, dict) for t in tables.values()), f"{file}: not a result of lm-evaluation-harness: it has no results")
        model, step = _place(file, root.resolve() if root.name in ("", "..") else root, content)
        check(step is not None, f"{file}: no step in its name, its folders or its model_args; call it step1000.json or put it in a folder step1000")
        entry = found.setdefault((model, step), Results(model, step))
        entry.files.append(file)
        for task, table in tables.items():
            new = scores(table)
            old = entry.tasks.setdefault(task, new)
            check(old == new, f"{file}: task {task} of {model} at step {step} is in {entry.files[0]} with other numbers; keep one of them")
    models: dict[str, list[Results]] = {}
    for (model, _), entry in sorted(found.items()):
        models.setdefault(model, []).append(entry)
    return models


def pick_metric(task: str, wanted: Optional[str], along: list[Results]) -> str:
    """The metric of a task that is compared: the one asked for, else the first of PREFERRED that it has at every step.

    Raises: UserError naming the file that lacks the task or the metric.
    """
    for entry in along:
        check(task in entry.tasks, f"{entry.where}: no task {task} in it; it has {_some(entry.tasks)}")
        check(bool(entry.tasks[task]), f"{entry.where}: task {task} has no numbers")
        check(wanted is None or wanted in entry.tasks[task], f"{entry.where}: task {task} has no metric {wanted}; it has {_some(entry.tasks[task])}")
    common = [m for m in along[0].tasks[task] if all(m in entry.tasks[task] for entry in along)]
    check(bool(common), f"{along[0].where}: task {task} has no metric that the other steps have too")
    metric = wanted or next((m for m in PREFERRED if m in common), common[0])
    for entry in along:
        value = entry.tasks[task][metric].value
        check(math.isfinite(value), f"{entry.where}: {metric} of {task} is {value}")
    return metric


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

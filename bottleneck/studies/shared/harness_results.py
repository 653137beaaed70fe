"""Results of lm-evaluation-harness along training: which file belongs to which model and step, and one number of a
task.

Old files have {"results": {task: {"acc": …, "acc_stderr": …}}}. Current ones write "acc,none" and "acc_stderr,none",
with the name of a filter after the comma, and "N/A" if there is no error.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Optional

from bottleneck.core.errors import UserError, check
from bottleneck.studies.shared.steps import step_number

log = logging.getLogger(__name__)
# the metric of a task with several is the first it has: perplexity for LAMBADA, accuracy elsewhere, as in Table 1
PREFERRED = (
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "acc",
    "exact_match",
    "em",
    "f1",
    "mc2",
    "acc_norm",
)
LOWER = re.compile(
    r"ppl|perplexity|bits_per_byte|loss|brier|nll|likelihood_diff|error|(?:^|_)(?:wer|cer|ter|ece|mae|r?mse)(?:$|_)"
)
HIGHER = re.compile(
    r"acc|exact|match|(?:^|_)em(?:$|_)|f1|mc[12]|mcc|bleu|rouge|chrf|pass|recall|precision|auc|pearson|spearman|ndcg"
)
# of a model's stereotypes: neither a higher nor a lower score means a better model
BIAS = re.compile(r"bias|stereotyp|likelihood_diff|_preferred|male_female|toxic")
SYNONYMS = {"ppl": "perplexity", "ppl_stderr": "perplexity_stderr"}  # of old files
SHARES = ("acc", "acc_norm", "exact_match", "em")  # of right answers, whose error follows from the number of questions
FILTERS = ("none", "strict-match", "get-answer")  # of current files, in order of preference
NAMING = ("peft", "delta", "pretrained")  # arguments that name the model, in the harness's order
STEP = re.compile(
    r"[-_./]*(?:global[-_]?)?(?:step|checkpoint|ckpt|iter)[-_]?\d+k?(?![a-z])|(?<=/)\d+/?$", re.IGNORECASE
)  # in a model's name or path


@dataclass(frozen=True)
class Score:
    """One metric of one task. `error` is its standard error, None if the file has none."""

    value: float
    error: Optional[float]


@dataclass
class Results:
    """Results of one model at one step, from one or several files.

    Attributes:
        tasks: task -> metric -> score.
        higher: task -> metric -> whether a higher score is better, as the files say it.
    """

    model: str
    step: int
    files: list[Path] = field(default_factory=list)
    tasks: dict[str, dict[str, Score]] = field(default_factory=dict)
    higher: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return ", ".join(map(str, self.files))


def lower_is_better(metric: str) -> bool:
    """True for perplexities, losses and errors."""
    return bool(LOWER.search(metric.lower()))


def is_lower_better(along: list[Results], task: str, metric: str) -> Optional[bool]:
    """Whether a lower score means a better model: what the files say, else by the metric's name; None if unknown."""
    for entry in along:
        said = entry.higher.get(task, {}).get(metric)
        if isinstance(said, bool):
            return not said
    return True if lower_is_better(metric) else False if HIGHER.search(metric.lower()) else None


def is_perplexity(metric: str) -> bool:
    """True for exponentials of a mean, which are compared in logarithms."""
    return bool(re.search(r"ppl|perplexity", metric.lower()))


def is_bias(metric: str) -> bool:
    """True for measures of bias, such as those of crows_pairs: no order of better and worse models."""
    return bool(BIAS.search(metric.lower()))


def scores(table: dict[str, Any], questions: Optional[int] = None) -> dict[str, Score]:
    """The numeric metrics of one task's entry, in either format, each with its error.

    Args:
        questions: number of the task's questions; it gives shares of right answers a binomial error if the file has
            none.
    """
    plain: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        name, _, kind = key.partition(",")
        plain.setdefault(SYNONYMS.get(name, name), {})[kind] = value
    chosen = {
        name: next((kinds[f] for f in ("", *FILTERS) if f in kinds), next(iter(kinds.values())))
        for name, kinds in plain.items()
    }
    out = {}
    for name, value in chosen.items():
        number, error = _number(value), _number(chosen.get(f"{name}_stderr"))
        if error is None and questions and name in SHARES and number is not None and 0 <= number <= 1:
            error = math.sqrt(number * (1 - number) / questions)
        if number is not None and not name.endswith("_stderr"):
            out[name] = Score(number, error if error is not None and math.isfinite(error) else None)
    out.pop("sample_len", None)
    return out


def _number(value: Any) -> Optional[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # whole numbers of JSON have no limit
        return math.inf if value > 0 else -math.inf


def _config(content: dict[str, Any]) -> dict[str, Any]:
    config = content.get("config")
    return config if isinstance(config, dict) else {}


def _argument(content: dict[str, Any], name: str) -> str:
    """One argument of the model in a result file, a dict or text such as pretrained=…,revision=…; else empty."""
    config = _config(content)
    arguments = config.get("model_args")
    if isinstance(arguments, dict):
        return str(arguments.get(name) or "")
    return next(iter(re.findall(rf"\b{name}=([^,]+)", str(arguments))), "").strip()


def _questions(content: dict[str, Any], task: str) -> Optional[int]:
    """Number of questions of a task, if the file has it."""
    samples = content.get("n-samples")
    entry = samples.get(task) if isinstance(samples, dict) else None
    number = (entry.get("effective") or entry.get("original")) if isinstance(entry, dict) else None
    return number if isinstance(number, int) and number > 0 else None


def _named_model(content: dict[str, Any]) -> str:
    """The model that a result file names: pretrained=… of its arguments, or model_name; empty without one."""
    named = next(filter(None, (_argument(content, name) for name in NAMING)), "")
    name = content.get("model_name")
    # for a model without arguments the harness invents eight random letters, different ones in every file
    return named or (name if isinstance(name, str) and not re.fullmatch("[a-z0-9]{8}", name) else "")


@dataclass(frozen=True)
class _Place:
    """Where a result belongs.

    Attributes:
        folder: model by its folders, may be empty.
        named: model by the file's content, may be empty.
        before: text before the step in the name of the file or folder that has it.
    """

    folder: str
    named: str
    step: Optional[int]
    before: str = ""


def _place(file: Path, content: dict[str, Any]) -> _Place:
    """The place from the names of file and folders below the folder of results, else from the model's arguments in the
    file.
    """
    parts = [*file.parts[:-1], file.stem]
    numbers = [(i, step_number(part), part) for i, part in enumerate(parts)]
    numbers = [n for n in numbers if n[1] is not None]
    # a bare number beside a named step is the number of shots
    numbers = [n for n in numbers if not n[2].isdigit()] or numbers
    named = _named_model(content)
    # a file's own name, such as results_2024-05-01T12-00-00.123, names no model
    rest = "/".join(part for i, part in enumerate(parts[:-1]) if i not in {n[0] for n in numbers})
    model = STEP.sub("", named).rstrip("/")
    if numbers:
        _, step, part = numbers[-1]
        at = STEP.search(part)
        return _Place(rest, model, step, part[: at.start()].strip("-_.") if at else "")
    config = _config(content)
    step = step_number(_argument(content, "revision") or str(config.get("model_revision") or ""))
    pieces = named.rstrip("/").split("/")
    if step is None:
        step = next(
            (
                n
                for k, piece in enumerate(reversed(pieces))
                if (k == 0 or not piece.isdigit()) and (n := step_number(piece)) is not None
            ),
            None,
        )
    return _Place(rest, model, step)


def _apart(found: list[tuple[Path, dict[str, Any], _Place]]) -> set[str]:
    """Folders in which the text before the step names models: two such names have the same task at the same step."""
    seen: dict[tuple[str, Optional[int], str], set[str]] = {}
    for _, content, place in found:
        if place.before and not place.named:
            for task in content["results"]:
                seen.setdefault((place.folder, place.step, task), set()).add(place.before)
    return {folder for (folder, _, _), names in seen.items() if len(names) > 1}


def _read(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The result files below a folder, with their content.

    Output of studies is skipped; other JSON is skipped with a note.
    """
    check(root.is_dir(), f"study.results={root}: no such folder")
    files = sorted(
        p
        for p in root.rglob("*.json")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
    )
    check(bool(files), f"study.results={root}: no result files (*.json) there")
    others: list[Path] = []
    studies = 0
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a result of lm-evaluation-harness: {error}") from error
        if isinstance(content, dict) and {"study", "schema"} <= content.keys():
            studies += 1  # downstream.json has a key results as well
        elif not isinstance(content, dict) or "results" not in content:
            others.append(file.relative_to(root))
        else:
            tables = content["results"]
            fits = isinstance(tables, dict) and all(isinstance(t, dict) for t in tables.values())
            check(fits, f"{file}: not a result of lm-evaluation-harness: its results are no tables")
            yield file, content
    none = f"no results of lm-evaluation-harness there; none of its {len(files)} JSON files has any"
    check(studies + len(others) < len(files), f"study.results={root}: {none}")
    if others:
        log.info("skipped, without results of lm-evaluation-harness: %s", _some(map(str, others)))


def read_harness_results(root: Path) -> dict[str, list[Results]]:
    """All result files below a folder: model -> results by rising step.

    Raises: UserError naming the file if one cannot be read, has no step, or contradicts a second file of the same step;
        or if the folder has no results.
    """
    files = [(file, content, _place(file.relative_to(root), content)) for file, content in _read(root)]
    apart = _apart(files)
    found: dict[tuple[str, int], Results] = {}
    names_of: dict[str, set[str]] = {}
    for file, content, place in files:
        before = place.before if place.folder in apart and not place.named else ""
        last = (root.resolve() if root.name in ("", "..") else root).name
        model = "/".join(filter(None, (place.folder, before))) or place.named or last
        if not place.named.startswith(("/", ".", "~")):  # one model may have been scored in different places
            names_of.setdefault(model, set()).add(place.named)
        advice = "call it step1000.json or put it in a folder step1000"
        check(place.step is not None, f"{file}: no step in its name, its folders or its model_args; {advice}")
        assert place.step is not None
        entry = found.setdefault((model, place.step), Results(model, place.step))
        entry.files.append(file)
        _add_tasks(entry, content, file)
    for model, names in names_of.items():
        if len(names - {""}) > 1:
            said = "%s: its files are of %s, and read as one model; give each model a folder of its own"
            log.warning(said, model, _some(names - {""}))
    models: dict[str, list[Results]] = {}
    for (model, _), entry in sorted(found.items()):
        models.setdefault(model, []).append(entry)
    return models


def _add_tasks(entry: Results, content: dict[str, Any], file: Path) -> None:
    said = content.get("higher_is_better")
    for task, metrics in said.items() if isinstance(said, dict) else ():
        if isinstance(metrics, dict):
            entry.higher.setdefault(task, {}).update(metrics)
    for task, table in content["results"].items():
        new, old = scores(table, _questions(content, task)), entry.tasks.get(task)
        other = f"task {task} of {entry.model} at step {entry.step} is in {entry.files[0]} with other numbers"
        check(not old or not new or old == new, f"{file}: {other}; keep one of them")
        entry.tasks[task] = old or new  # one file may have a group's mean, another one only its name


def pick_metric(task: str, wanted: Optional[str], along: list[Results]) -> str:
    """The metric to compare: the one asked for, else the first of PREFERRED that the task has at every step.

    Raises: UserError naming the file that lacks the task or the metric.
    """
    wanted = wanted and SYNONYMS.get(wanted, wanted)
    for entry in along:
        check(task in entry.tasks, f"{entry.where}: no task {task} in it; it has {_some(entry.tasks)}")
        metrics = entry.tasks[task]
        check(bool(metrics), f"{entry.where}: task {task} has no numbers")
        known = wanted is None or wanted in metrics
        check(known, f"{entry.where}: task {task} has no metric {wanted}; it has {_some(metrics)}")
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

"""Heads scored on downstream tasks with EleutherAI's lm-evaluation-harness (pip install -e '.[evaluate]').

    python -m bottleneck.evaluate RUN_DIR --tasks arc_easy,my_task.yaml,my_tasks/

The backbone is loaded once and scored with its original head, then with the best head of every rank. Each head leaves
lm-eval's ordinary results file in RUN_DIR/evaluate/<head>/; results that exist are not computed again. The scores go
beside the curve: downstream.csv and downstream.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Optional

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bottleneck.backbone.model import load_tokenizer
from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import UserError, check
from bottleneck.core.files import leftovers
from bottleneck.downstream import scores as downstream
from bottleneck.downstream.arguments import parser
from bottleneck.downstream.scores import OURS, heads_of, identity, read_results
from bottleneck.downstream.tasks import fingerprint, load_tasks, one_line
from bottleneck.heads.key import HeadKey
from bottleneck.serve.export import quiet
from bottleneck.serve.swap import prove, set_head
from bottleneck.training.finished_run import FinishedRun, open_run

log = logging.getLogger(__name__)
FOLDER = "evaluate"


def _save(results: dict[str, Any], name: str, folder: Path) -> Path:
    """Let lm-eval's own tracker write into a temporary folder, and move the complete file to its place."""
    from lm_eval.loggers import EvaluationTracker

    target = folder / name
    scratch = folder / f".{name}.{os.getpid()}.part"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for beside in leftovers(target):  # of processes that were killed
            shutil.rmtree(beside, ignore_errors=True)
        scratch.mkdir()
        tracker = EvaluationTracker(output_path=str(scratch))
        tracker.general_config_tracker.log_experiment_args(
            model_source="hf",
            model_args={"pretrained": name},
            system_instruction=None,
            chat_template=None,
            fewshot_as_multiturn=False,
        )
        tracker.save_results_aggregated(results)
        written = list(scratch.rglob("results_*.json"))
        # the tracker does not report why it could not write
        check(len(written) == 1, f"{target}: results cannot be written (is the disk full?)")
        json.loads(written[0].read_text(encoding="utf-8"))
        path = target / written[0].name
        os.replace(written[0], path)
        return path
    except (OSError, ValueError) as error:  # ValueError: half a file
        raise UserError(f"{target}: results cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            target.rmdir()  # only if it is empty


def score(lm: Any, things: list[Any], limit: Optional[int]) -> dict[str, Any]:
    """lm-eval's results of the model as it is now, without the samples; seeds are lm-eval's own."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    # the tasks are loaded; without an empty manager lm-eval would search all of its files again
    nothing = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=things,
        limit=limit,
        batch_size=lm.batch_size_per_gpu,
        device=str(lm.device),
        log_samples=False,
        task_manager=nothing,
    )


def evaluate(
    run: FinishedRun,
    specs: list[str],
    *,
    ranks: Optional[list[int]] = None,
    limit: Optional[int] = None,
    batch_size: int | str = 8,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Score the original head and the best head of every rank, and write results, table and picture.

    Args:
        specs: as `load_tasks`.
        ranks: those to score; default: all. limit: questions of each task; default: all.
        batch_size: sequences in one forward pass, or "auto". device: "auto", "cpu", "cuda" or "cuda:N".
    Returns: rows of downstream.csv. Raises: UserError for everything that the user can fix.
    """
    # lm-eval's Transformers model needs accelerate
    if not all(map(importlib.util.find_spec, ("lm_eval", "accelerate"))):
        raise UserError(
            "lm-eval is not installed: pip install 'bottleneck[evaluate]' (in a checkout: pip install -e '.[evaluate]')"
        )
    names = _chosen(run, ranks)
    identities = {name: identity(run, row) for name, row in names.items()}  # reports a missing head file at once
    device = _device(device)
    things = load_tasks(specs)
    prints = {task: fingerprint(thing, limit) for task, thing in things.items()}
    folder = run.folder / FOLDER
    scorer = _Scorer(run, batch_size, device)
    for name, row in names.items():  # the original head first: it is lost when another head replaces it
        todo = _todo(folder / name, identities[name], prints)
        skipped = [t for t in things if t not in todo]
        if skipped:
            log.info("%s: %s: results exist, skipped", name, ", ".join(skipped))
        if not todo:
            continue
        log.info("%s: scoring %s", name, ", ".join(todo))
        lm = scorer.with_head(row)
        with one_line(f"--tasks {', '.join(todo)}"):
            results = score(lm, [things[t] for t in todo], limit)
        where = {"pretrained": run.curve["backbone"], "path": run.backbone.path, "head": name}
        results["config"]["model_args"] = where
        results[OURS] = {
            "head": name,
            "head_hash": identities[name],
            "limit": limit,
            "tasks": {t: prints[t] for t in todo},
            **{k: row[k] if row else None for k in ("rank", "lr", "seed", "loss")},
        }
        log.info("wrote %s", _save(results, name, folder))
    table = downstream.rows(run, folder)
    downstream.write(table, list(things), limit, run.folder)
    _show(table, list(things), limit)
    log.info("wrote downstream.csv and downstream.png in %s", run.folder)
    return table


def _chosen(run: FinishedRun, ranks: Optional[list[int]]) -> dict[str, Optional[dict[str, Any]]]:
    """Names and rows of what is scored. Raises UserError for a rank that does not exist or is no matrix."""
    names = heads_of(run)
    others = sorted({HeadKey.of(h).kind for h in run.curve["heads"] if not run.is_matrix(h)})
    if others:
        log.info("not scored, since they are not one matrix: heads of kind %s", ", ".join(others))
    for rank in ranks or ():
        run.pick(rank)  # reports a rank that does not exist
        matrix = any(row is not None and row["rank"] == rank for row in names.values())
        check(matrix, f"--ranks {rank}: no head of that rank in {run.folder} is one matrix")
    return {name: row for name, row in names.items() if ranks is None or row is None or row["rank"] in ranks}


def _device(name: str) -> str:
    """The device to use. Raises UserError if this machine does not have it."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    usable = re.fullmatch(r"cpu|cuda(:\d+)?", name) and (name == "cpu" or torch.cuda.is_available())
    allowed = "cpu, cuda, cuda:N" if torch.cuda.is_available() else "cpu"
    check(bool(usable), f"--device {name}: not available; allowed are {allowed}")
    return name


def _todo(folder: Path, head_hash: str, prints: dict[str, str]) -> list[str]:
    """Tasks of which a head has no results yet."""
    ours = [c[OURS] for c in read_results(folder) if c[OURS].get("head_hash") == head_hash]
    done = {item for about in ours for item in (about.get("tasks") or {}).items()}
    return [task for task, digest in prints.items() if (task, digest) not in done]


@dataclasses.dataclass
class _Scorer:
    """lm-eval's model of a run's backbone, loaded on first use; heads are exchanged in place."""

    run: FinishedRun
    batch_size: int | str
    device: str
    lm: Any = None
    proved: bool = False

    def with_head(self, row: Optional[dict[str, Any]]) -> Any:
        """The model with the original head (None) or a head of the run. No head can be followed by the original one."""
        if self.lm is None:
            self.lm = self._load()
        if row is not None:
            set_head(self.lm.model, self.run.dense(row))
            if not self.proved:  # the check of one head covers all heads of a family
                prove(self.lm.model, self.run.curve["backbone"])
                self.proved = True
        return self.lm

    def _load(self) -> Any:
        from bottleneck.downstream.one_bos import OneBOS, without_ending

        model, _ = self.run.model(self.run.backbone.dtype, torch.device(self.device).type)
        tokenizer = without_ending(load_tokenizer(self.run.backbone))
        return OneBOS(
            pretrained=model.to(self.device), backend="causal", tokenizer=tokenizer, batch_size=self.batch_size
        )


def _show(table: list[dict[str, Any]], tasks: list[str], limit: Optional[int]) -> None:
    Console().print("score ± standard error" + (f", the first {limit} questions of each task" if limit else ""))
    out = Table()
    out.add_column("rank", justify="right")
    main = [r for r in table if r["main"] and r["limit"] == limit and r["task"] in tasks]
    metric = {r["task"]: r["metric"] for r in main}
    for task in tasks:
        out.add_column(f"{task} ({metric.get(task, 'no score')})", justify="right")
    for head in dict.fromkeys(r["head"] for r in main):
        cells = {
            r["task"]: f"{r['value']:.4f}" + (f" ± {r['stderr']:.4f}" if r["stderr"] is not None else "")
            for r in main
            if r["head"] == head
        }
        found = next(r for r in main if r["head"] == head)
        place = "original head" if found["rank"] is None else str(found["rank"])
        place += f" ({found['kind']})" if found["kind"] else ""
        out.add_row(escape(place), *(cells.get(t, "–") for t in tasks))
    Console().print(out)


def command(argv: list[str]) -> list[dict[str, Any]]:
    """Parse the arguments and score. Returns the rows of downstream.csv."""
    args = parser().parse_args(argv)
    specs = [s.strip() for s in args.tasks.split(",") if s.strip()]
    check(bool(specs), "--tasks: give at least one task")
    ranks = None if args.ranks is None else [_count("--ranks", r) for r in args.ranks.split(",")]
    if args.limit is not None:
        check(args.limit >= 1, f"--limit {args.limit}: must be at least 1")
    batch_size = "auto" if args.batch_size == "auto" else _count("--batch-size", args.batch_size)
    run = open_run(args.run, args.backbone)
    return evaluate(run, specs, ranks=ranks, limit=args.limit, batch_size=batch_size, device=args.device)


def _count(name: str, text: str) -> int:
    good = text.strip().isdecimal() and int(text) >= 1
    check(good, f"{name} {text}: must be whole numbers of at least 1")
    return int(text)


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, with one line."""
    quiet()
    again = "finished scores are kept; the same command resumes"
    return cli.one_line_errors(lambda: command(sys.argv[1:] if argv is None else argv), after_interrupt=again)

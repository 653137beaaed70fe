"""Heads scored on downstream tasks with EleutherAI's lm-evaluation-harness (pip install -e '.[evaluate]').

    python -m bottleneck.evaluate RUN_DIR --tasks arc_easy,my_task.yaml,my_tasks/

The backbone is loaded once; its own head and then the best head of every rank are put in its place. Each leaves lm-eval's
ordinary results file in RUN_DIR/evaluate/<head>/, and what is there already is not computed again. Beside the curve:
downstream.csv and downstream.png.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, Optional

import torch
from rich.console import Console
from rich.table import Table

from bottleneck.backbone.model import load_tokenizer
from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import Parser, UserError, check
from bottleneck.downstream import scores as downstream
from bottleneck.downstream.scores import FULL, OURS, heads_of, identity, read_results
from bottleneck.serve.export import prove, quiet, set_head
from bottleneck.training.finished_run import Run, open_run

log = logging.getLogger(__name__)
FOLDER = "evaluate"


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """lm-eval and datasets raise many kinds for bad task files, names and downloads: all become one line."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(f"--batch-size: out of GPU memory, give a smaller one: {error}") from error
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {str(error)[:500]}") from error


def load_tasks(specs: list[str]) -> dict[str, Any]:
    """lm-eval's tasks and groups by name, with their data, from names it knows, YAML files, and folders of YAML files.

    Data files that a task names are looked for from the current folder, then from the task's own.
    Raises: UserError for unknown names, bad files, and data that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    paths = {s: Path(s).expanduser().resolve() for s in specs}
    folders = [str(p) for p in paths.values() if p.is_dir()]
    managers: dict[bool, Any] = {}

    def manager(defaults: bool) -> Any:
        if defaults not in managers:  # lm-eval's own 14,000 files take seconds to look through
            managers[defaults] = TaskManager(include_path=folders or None, include_defaults=defaults)
        return managers[defaults]

    def local(wanted: list[str], home: Path) -> dict[str, Any]:
        try:
            return manager(False).load(wanted)
        except KeyError:  # a group of tasks that lm-eval brings
            return manager(True).load(wanted)
        except FileNotFoundError:
            with contextlib.chdir(home):
                return manager(False).load(wanted)

    out: dict[str, Any] = {}
    for spec, path in paths.items():
        with _told(f"--tasks {spec}"):
            if path.is_dir():
                index = TaskManager(include_path=str(path), include_defaults=False)
                members = {
                    m if isinstance(m, str) else m.get("task")
                    for g in index.all_groups
                    for m in index.task_index[g].cfg.get("task", [])
                }
                wanted = [n for n in index.all_groups + index.all_subtasks if n not in members]
                check(bool(wanted), f"--tasks {spec}: no task files (*.yaml) in this folder")
                found = local(wanted, path)
            elif path.suffix in (".yaml", ".yml") or os.sep in spec:
                check(path.is_file(), f"--tasks {spec}: no such file or folder")
                found = local([str(path)], path.parent)
            else:
                known = manager(True).all_tasks
                near = difflib.get_close_matches(spec, known, n=3)
                hint = f"; near are {', '.join(near)}" if near else ""
                check(
                    spec in known,
                    f"--tasks {spec}: lm-eval has no such task{hint}; a local one is given by its .yaml file",
                )
                found = manager(True).load([spec])
        inner = {child for children in (found.get("group_map") or {}).values() for child in children}
        for name, thing in {**found.get("groups", {}), **found["tasks"]}.items():
            if name not in inner:
                check(name not in out, f"--tasks: {name} is asked for twice")
                out[name] = thing
    return out


def fingerprint(thing: Any, limit: Optional[int]) -> str:
    """Identity of a task or group: its settings, its questions, lm-eval's version. Equal ones are not computed again."""
    digest = hashlib.sha256(f"{importlib.metadata.version('lm_eval')} {limit}".encode())
    for task in (
        sorted(thing.get_all_tasks(), key=lambda t: t.task_name) if hasattr(thing, "get_all_tasks") else [thing]
    ):
        config = task.dump_config()
        config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
        config["num_fewshot"] = config.get("num_fewshot") or 0  # lm-eval fills it in when it scores
        config.pop("dataset_kwargs", None)  # where files are changes nothing: the questions are below
        text = json.dumps(config, sort_keys=True, default=str)
        digest.update(
            re.sub(r" at 0x[0-9a-f]+", "", text).encode()
        )  # addresses of functions change from one process to the next
        for number, doc in enumerate(task.eval_docs):
            if number == limit:
                break
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _save(results: dict[str, Any], name: str, folder: Path) -> Path:
    """lm-eval's own tracker writes into a folder of ours; what is whole is moved to its place."""
    from lm_eval.loggers import EvaluationTracker

    target = folder / name
    scratch: Optional[str] = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".part-", dir=folder)
        tracker = EvaluationTracker(output_path=scratch)
        tracker.general_config_tracker.log_experiment_args(
            model_source="hf",
            model_args={"pretrained": name},
            system_instruction=None,
            chat_template=None,
            fewshot_as_multiturn=False,
        )
        tracker.save_results_aggregated(results)
        written = list(Path(scratch).rglob("results_*.json"))
        check(
            len(written) == 1, f"{target}: results cannot be written (is the disk full?)"
        )  # the tracker does not tell why
        json.loads(written[0].read_text(encoding="utf-8"))
        path = target / written[0].name
        os.replace(written[0], path)
        return path
    except (OSError, ValueError) as error:  # ValueError: half a file
        raise UserError(f"{target}: results cannot be written: {error}") from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            target.rmdir()  # only where it is empty


def score(lm: Any, things: list[Any], limit: Optional[int]) -> dict[str, Any]:
    """lm-eval's results of the model as it is now, without the samples; seeds are lm-eval's own."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    nothing = TaskManager(
        include_defaults=False
    )  # the tasks are loaded; without one it looks through all of its files again
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
    run: Run,
    specs: list[str],
    ranks: Optional[list[int]] = None,
    limit: Optional[int] = None,
    batch_size: int | str = 8,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Score the full head and the best head of every rank, and write results, table and picture.

    Args:
        specs: names of tasks, YAML files, folders.
        limit: questions of each task; None: all.
        batch_size: sequences in one forward pass, or "auto".
        device: auto | cpu | cuda | cuda:N
    Returns: the rows of downstream.csv. Raises: UserError for whatever the user can mend.
    """
    if not all(
        map(importlib.util.find_spec, ("lm_eval", "accelerate"))
    ):  # lm-eval's Transformers model wants the second
        raise UserError(
            "lm-eval is not installed: pip install -e '.[evaluate]' (in this repository: pip install -e '.[evaluate]')"
        )
    names = heads_of(run)
    if ranks is not None:
        names = {FULL: None} | {run.file(row).stem: row for row in map(run.pick, ranks)}
    identities = {
        name: identity(run, row) for name, row in names.items()
    }  # a missing head file is told before anything is computed
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    usable = re.fullmatch(r"cpu|cuda(:\d+)?", device) and (device == "cpu" or torch.cuda.is_available())
    check(
        bool(usable),
        f"--device {device}: not here; allowed are cpu{', cuda, cuda:N' if torch.cuda.is_available() else ''}",
    )
    things = load_tasks(specs)
    prints = {task: fingerprint(thing, limit) for task, thing in things.items()}
    folder = run.folder / FOLDER

    lm, proved = None, False
    for name, row in names.items():  # the full head first: it is lost when another takes its place
        ours = [c[OURS] for c in read_results(folder / name) if c[OURS].get("head_hash") == identities[name]]
        done = {item for about in ours for item in (about.get("tasks") or {}).items()}
        todo = [t for t in things if (t, prints[t]) not in done]
        skipped = [t for t in things if t not in todo]
        if skipped:
            log.info("%s: %s: results are there, skipped", name, ", ".join(skipped))
        if not todo:
            continue
        if lm is None:
            lm = _wrap(run, batch_size, device)
        if row is not None:
            A, B = run.factors(row)
            set_head(lm.model, A @ B)
            if not proved:  # what holds for one head of a family holds for all
                prove(lm.model, run.curve["backbone"])
                proved = True
        log.info("%s: scoring %s", name, ", ".join(todo))
        with _told(f"--tasks {', '.join(todo)}"):
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


def _wrap(run: Run, batch_size: int | str, device: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    model, _ = run.model(run.backbone.dtype, torch.device(device).type)
    return HFLM(
        pretrained=model.to(device), backend="causal", tokenizer=load_tokenizer(run.backbone), batch_size=batch_size
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
        rank = next(r["rank"] for r in main if r["head"] == head)
        out.add_row("own head" if rank is None else str(rank), *(cells.get(t, "–") for t in tasks))
    Console().print(out)


def command(argv: list[str]) -> list[dict[str, Any]]:
    parser = Parser(
        prog="python -m bottleneck.evaluate", description="Score the heads of a run with lm-evaluation-harness."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument(
        "--tasks",
        required=True,
        help="names of lm-eval's tasks, YAML files, folders of YAML files; separated by commas",
    )
    parser.add_argument(
        "--ranks", help="ranks to score, separated by commas (default: all); the full head is always scored"
    )
    parser.add_argument("--limit", type=int, help="only so many questions of each task, for a first look")
    parser.add_argument("--batch-size", default="8", help="sequences in one forward pass, or auto (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument(
        "--backbone", metavar="PATH", help="where the backbone is now, if it has moved: folder or Hub name"
    )
    args = parser.parse_args(argv)
    specs = [s.strip() for s in args.tasks.split(",") if s.strip()]
    check(bool(specs), "--tasks: give at least one task")
    ranks = None if args.ranks is None else [_count("--ranks", r) for r in args.ranks.split(",")]
    if args.limit is not None:
        check(args.limit >= 1, f"--limit {args.limit}: must be at least 1")
    batch_size = "auto" if args.batch_size == "auto" else _count("--batch-size", args.batch_size)
    return evaluate(open_run(args.run, args.backbone), specs, ranks, args.limit, batch_size, args.device)


def _count(name: str, text: str) -> int:
    good = text.strip().isdecimal() and int(text) >= 1
    check(good, f"{name} {text}: must be whole numbers of at least 1")
    return int(text)


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, told in one line."""
    quiet()
    again = "heads that were scored are kept; the same command goes on"
    return cli.one_line_errors(lambda: command(sys.argv[1:] if argv is None else argv), after_interrupt=again)

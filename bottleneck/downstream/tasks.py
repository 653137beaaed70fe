"""Tasks of lm-evaluation-harness: found by name, file or folder, and identified by their content."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any, Iterator, Optional

import torch

from bottleneck.core.errors import UserError, check


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """lm-eval and datasets raise many kinds of errors for bad task files, names and downloads; all become one line."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(f"--batch-size: out of GPU memory, give a smaller one: {error}") from error
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {str(error)[:500]}") from error


class _Managers:
    """lm-eval's indexes of tasks, with and without its own 14,000 files, whose search takes seconds."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders
        self.found: dict[bool, Any] = {}

    def __call__(self, defaults: bool) -> Any:
        from lm_eval.tasks import TaskManager

        if defaults not in self.found:
            self.found[defaults] = TaskManager(include_path=self.folders or None, include_defaults=defaults)
        return self.found[defaults]

    def local(self, wanted: list[str], home: Path) -> dict[str, Any]:
        """The user's own tasks; their data are searched relative to the current folder, then to `home`."""
        try:
            return self(False).load(wanted)
        except KeyError:  # a group of tasks that lm-eval brings
            return self(True).load(wanted)
        except FileNotFoundError:
            with contextlib.chdir(home):
                return self(False).load(wanted)


def load_tasks(specs: list[str]) -> dict[str, Any]:
    """lm-eval's tasks and groups by name, with their data, from names it knows, YAML files, and folders of YAML files.

    Data files that a task names are searched relative to the current folder, then to the task's own.
    Raises: UserError for unknown names, bad files, and unavailable data.
    """
    paths = {s: Path(s).expanduser().resolve() for s in specs}
    managers = _Managers([str(p) for p in paths.values() if p.is_dir()])
    out: dict[str, Any] = {}
    for spec, path in paths.items():
        with one_line(f"--tasks {spec}"):
            found = _load(spec, path, managers)
        inner = {child for children in (found.get("group_map") or {}).values() for child in children}
        for name, thing in {**found.get("groups", {}), **found["tasks"]}.items():
            if name not in inner:
                check(name not in out, f"--tasks: {name} is given twice")
                out[name] = thing
    return out


def _load(spec: str, path: Path, managers: _Managers) -> dict[str, Any]:
    if path.is_dir():
        return managers.local(_names_in(spec, path), path)
    if path.suffix in (".yaml", ".yml") or os.sep in spec:
        check(path.is_file(), f"--tasks {spec}: no such file or folder")
        return managers.local([str(path)], path.parent)
    known = managers(True).all_tasks
    near = difflib.get_close_matches(spec, known, n=3)
    hint = f"; near are {', '.join(near)}" if near else ""
    check(spec in known, f"--tasks {spec}: lm-eval has no such task{hint}; a local one is given by its .yaml file")
    return managers(True).load([spec])


def _names_in(spec: str, folder: Path) -> list[str]:
    """Groups and tasks of a folder; tasks of its groups are not listed again."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=str(folder), include_defaults=False)
    members = {
        m if isinstance(m, str) else m.get("task")
        for g in index.all_groups
        for m in index.task_index[g].cfg.get("task", [])
    }
    wanted = [n for n in index.all_groups + index.all_subtasks if n not in members]
    check(bool(wanted), f"--tasks {spec}: no task files (*.yaml) in this folder")
    return wanted


def fingerprint(thing: Any, limit: Optional[int]) -> str:
    """Identity of a task or group: settings, questions, lm-eval's version. Equal ones are not computed again."""
    digest = hashlib.sha256(f"{importlib.metadata.version('lm_eval')} {limit}".encode())
    many = hasattr(thing, "get_all_tasks")
    for task in sorted(thing.get_all_tasks(), key=lambda t: t.task_name) if many else [thing]:
        config = task.dump_config()
        config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
        config["num_fewshot"] = config.get("num_fewshot") or 0  # lm-eval fills it in when it scores
        config.pop("dataset_kwargs", None)  # where the files are does not matter: the questions are below
        text = json.dumps(config, sort_keys=True, default=str)
        # addresses of functions differ from one process to the next
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", text).encode())
        for number, doc in enumerate(task.eval_docs):
            if number == limit:
                break
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]

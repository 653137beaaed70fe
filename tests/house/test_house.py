"""Rules of the code base: imports between rooms go one way, nothing names a machine, functions are short."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "bottleneck"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; `bottleneck.data` and `bottleneck.train` are links to the top
    level.
    """
    folders = [PACKAGE, *(p for p in PACKAGE.iterdir() if p.is_dir() and p.is_symlink())]
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sorted(paths)}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports anywhere in its code."""
    targets: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for a in node.names:
                full = f"{node.module}.{a.name}"
                targets.append(full if full in known else node.module)
    return {t for t in targets if t in known and t != name}


def room(name: str) -> str:
    """The folder below `bottleneck` that a module lies in; a module directly in it is a room of its own."""
    return name.split(".")[1] if "." in name else name


def acyclic(graph: dict[str, set[str]]) -> list[str]:
    """The nodes in an order in which each comes after all that it imports. Fails with the cycle where there is one."""
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(f"imports go round: {' -> '.join(error.args[1])}") from None


def test_imports_between_modules_and_between_rooms_go_one_way():
    known = modules()
    graph = {name: imports(name, path, known) - {"bottleneck"} for name, path in known.items()}
    acyclic(graph)
    rooms: dict[str, set[str]] = {}
    for name, targets in graph.items():
        rooms.setdefault(room(name), set()).update(room(t) for t in targets if room(t) != room(name))
    order = acyclic(rooms)
    assert order[0] == "core" or "core" in order[:3], order


def test_a_cycle_is_found():
    """The test above can fail: a room that imports one that imports it is reported with both names."""
    for graph in ({"a": {"b"}, "b": {"a"}}, {"a": {"b"}, "b": {"c"}, "c": {"a"}}):
        try:
            acyclic(graph)
        except AssertionError as error:
            assert "a" in str(error) and "b" in str(error)
        else:
            raise AssertionError("a cycle was not found")


def test_no_file_names_a_machine_or_holds_a_secret():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    secret = re.compile(r"hf_[A-Za-z0-9]{20,}|WANDB_API_KEY\s*=\s*\w|(^|[^\w.])/(root|home)/\w+/")
    for name in files:
        path = ROOT / name
        if (
            path.is_file()
            and path.suffix in (".py", ".yaml", ".md", ".toml", ".sh", ".txt", "")
            and "sample" not in name
        ):
            assert not secret.search(path.read_text(errors="ignore")), name


def test_torch_load_is_limited_to_tensors():
    for path in modules().values():
        text = path.read_text()
        assert "pickle" not in re.sub(r"#.*|\"\"\"[\s\S]*?\"\"\"", "", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


LONGEST = {"train.py": 40}  # lines of a function; elsewhere 60


def python_files() -> list[Path]:
    """Every Python file of the repository that git knows."""
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split() if not (ROOT / name).is_symlink() and (ROOT / name).is_file()]


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_functions_and_lines_are_short():
    """No function has more than 60 lines (train.py: 40, and 120 lines in all), no line more than 120 columns."""
    long: list[str] = []
    for path in python_files():
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        limit = LONGEST.get(name, 60)
        for node in functions(ast.parse(text)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            long += [f"{name}:{node.lineno} {node.name}: {lines} lines"] if lines > limit else []
        long += [f"{name}:{i}: {len(line)} columns" for i, line in enumerate(text.splitlines(), 1) if len(line) > 120]
    assert not long, "\n".join(long)
    assert len((ROOT / "train.py").read_text().splitlines()) <= 120


def test_the_entry_point_sets_no_state_on_what_it_built():
    """In train.py nothing is assigned to an attribute or an item, and no expression is evaluated for a side effect
    alone.
    """
    for node in ast.walk(ast.parse((ROOT / "train.py").read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            assert not any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in targets), ast.unparse(node)
            assert not any(isinstance(t, ast.Name) and t.id == "_" for t in targets), ast.unparse(node)

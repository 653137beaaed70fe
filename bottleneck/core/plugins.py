"""Extensions that live outside the package: files or folders given by `plugin=PATH`, and installed packages.

A plugin is a Python file, or a folder with Python files and, where it brings choices for the command line, a folder
`conf` laid out like this project's. Its code runs when it is loaded, so only what the user names or installs is loaded.
An installed package announces a module by an entry point of the group `bottleneck.plugins`.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from bottleneck.core.errors import UserError, check

GROUP = "bottleneck.plugins"
_loaded: dict[Path, ModuleType] = {}
_installed: dict[str, ModuleType] = {}


def load(paths: list[str]) -> None:
    """Import plugins, each once. Raises UserError where a path does not exist, has no Python file, or fails."""
    for given in paths:
        path = Path(given).expanduser().resolve()
        check(path.exists(), f"plugin={given}: no such file or folder")
        files = [path] if path.is_file() else sorted(path.glob("*.py"))
        check(bool(files) and all(f.suffix == ".py" for f in files), f"plugin={given}: holds no Python file")
        for file in files:
            if file not in _loaded:
                _loaded[file] = _import(file, given)


def _import(file: Path, given: str) -> ModuleType:
    name = f"bottleneck_plugin_{file.stem}"
    while name in sys.modules:  # another plugin's file of the same name
        name += "_"
    spec = importlib.util.spec_from_file_location(name, file)
    check(spec is not None and spec.loader is not None, f"plugin={given}: {file} cannot be imported")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever foreign code raises
        del sys.modules[name]
        raise UserError(f"plugin={given}: {file.name}: {type(error).__name__}: {error}") from error
    return module


def load_installed() -> None:
    """Import the plugins of installed packages, once. Raises UserError where one does not import."""
    for point in metadata.entry_points(group=GROUP):
        if point.name in _installed:
            continue
        try:
            _installed[point.name] = point.load()
        except Exception as error:  # whatever foreign code raises
            raise UserError(f"plugin {point.name} ({point.value}): {type(error).__name__}: {error}") from error


def search_path(paths: list[str]) -> list[str]:
    """Hydra's search path entries (`file://…`) for the `conf` folders that plugins bring."""
    folders = [Path(p).expanduser().resolve() for p in paths]
    modules = [Path(m.__file__) for m in _installed.values() if m.__file__]
    homes = [f if f.is_dir() else f.parent for f in [*folders, *modules]]
    return list(dict.fromkeys(f"file://{home / 'conf'}" for home in homes if (home / "conf").is_dir()))

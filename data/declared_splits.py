"""The splits that a folder's README.md declares in its header, as on the Hub.

---
configs:
- config_name: default
  data_files:
  - split: train
    path: first/*.jsonl
  - split: test
    path: [second/a.jsonl, second/b.jsonl]
---
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any, Iterator

import yaml

HEADER = re.compile(r"\A\ufeff?---[ \t]*\n(.*?)\n---[ \t]*$", re.DOTALL | re.MULTILINE)


def declared_splits(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """The declared splits of each file; empty if the README.md declares no split that any file is in.

    Of several configurations the one called default counts; without it all count.

    Args: names: of the folder's text files, relative to it.
    """
    out: dict[str, list[str]] = {}
    for split, pattern in _patterns(folder):
        for path in glob.glob(pattern, root_dir=folder, recursive=True):
            inside = [n for n in names if n == str(Path(path)) or Path(path) in Path(n).parents]
            for name in inside:
                out.setdefault(name, []).append(split)
    return out


def _patterns(folder: Path) -> Iterator[tuple[str, str]]:
    """(split, glob relative to the folder) of each entry; text that is no such header has none."""
    for config in _configs(folder):
        entries: Any = config.get("data_files")
        if isinstance(entries, dict):
            entries = [{"split": split, "path": path} for split, path in entries.items()]
        if isinstance(entries, str):
            entries = [entries]
        for entry in entries if isinstance(entries, list) else []:
            split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
            for path in paths if isinstance(paths, list) else [paths]:
                if isinstance(path, str) and path and "://" not in path:
                    below = str(config.get("data_dir") or "").strip("/")
                    yield str(split), f"{below}/{path}" if below else path


def _configs(folder: Path) -> list[dict[str, Any]]:
    path = next((p for p in (folder / "README.md", folder / "readme.md") if p.is_file()), None)
    header = HEADER.search(path.read_text(encoding="utf-8", errors="replace")) if path else None
    try:
        about = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return []
    listed = about.get("configs") if isinstance(about, dict) else None
    configs = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    default = [c for c in configs if c.get("default") is True or c.get("config_name") == "default"]
    return default or configs

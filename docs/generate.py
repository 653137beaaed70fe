"""Fills the generated parts of the documentation when MkDocs reads a page: marker comments become tables.

<!-- configuration -->   every key of the schema of training
<!-- choices -->         every choice of every config group
<!-- studies -->         every registered study
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def configuration() -> str:
    """One table for each group of the schema: key, type, default, what it means."""
    from bottleneck.config.reference import keys

    groups: dict[str, list[tuple[Any, ...]]] = {}
    for key, kind, default, sentence in keys():
        group = key.split(".")[0] if "." in key else "top level"
        groups.setdefault(group, []).append((f"`{key}`", f"`{kind}`", f"`{default}`", sentence))
    parts = [f"## {group}\n\n{table(('key', 'type', 'default', 'meaning'), rows)}" for group, rows in groups.items()]
    return "\n\n".join(parts)


def choices() -> str:
    """Names of the files in each group of `conf/`."""
    rows = []
    for folder in sorted(p for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name != "hydra"):
        names = ", ".join(f"`{f.stem}`" for f in sorted(folder.glob("*.yaml")))
        rows.append((f"`{folder.name}`", names))
    return table(("group", "choices"), rows)


def studies() -> str:
    """Name and summary of every study."""
    from bottleneck.core.extensions import STUDIES

    return table(("study", "what it shows"), [(f"`{s.name}`", s.summary) for s in STUDIES])


PARTS: dict[str, Callable[[], str]] = {"configuration": configuration, "choices": choices, "studies": studies}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' hook: called with the text of each page."""
    for name, make in PARTS.items():
        marker = f"<!-- {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown

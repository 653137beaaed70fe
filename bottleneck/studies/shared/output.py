"""The three files that every study writes: NAME.json, NAME.csv, NAME.png."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Sequence

from bottleneck.core.files import write_atomic

SCHEMA = 2  # of NAME.json and of partial results


def plain(value: Any) -> Any:
    """The value as JSON holds it: numbers that are not finite become null, tuples become lists."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(
    folder: Path,
    name: str,
    content: dict[str, Any],
    *,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    draw: Callable[[BinaryIO], None],
) -> dict[str, Any]:
    """Write NAME.json, NAME.csv and NAME.png; all three are made before the first is written.

    Args:
        columns, rows: the table.
        draw: writes the picture into an open file as PNG.
    Returns: the content of NAME.json.
    """
    content = plain({"schema": SCHEMA, "study": name, **content})
    picture = io.BytesIO()
    draw(picture)
    files = {
        "json": (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(),
        "csv": _table(columns, rows),
        "png": picture.getvalue(),
    }
    for ending, raw in files.items():
        _write_bytes(folder / f"{name}.{ending}", raw)
    return content


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a further CSV beside a study's three files."""
    _write_bytes(path, _table(columns, rows))


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows([("" if cell is None else cell) for cell in plain(list(row))] for row in rows)
    return table.getvalue().encode()


def _write_bytes(path: Path, raw: bytes) -> None:
    write_atomic(path, lambda part: part.write_bytes(raw))

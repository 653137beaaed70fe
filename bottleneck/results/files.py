"""Curves as files: curve.json, curve.csv, curve.png and details.png of a folder.

curve.json is the result; the other files are made from it. It is written first, so that a failed picture does not
cost the result. `write_missing` makes the missing files later.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Optional

from safetensors import SafetensorError, safe_open

from bottleneck.core.errors import UserError, check
from bottleneck.core.files import leftovers, write_atomic
from bottleneck.heads.key import LOW_RANK, HeadKey
from bottleneck.results.details import draw_details, has_details
from bottleneck.results.merging import band_losses, domain_perplexities
from bottleneck.results.metric_names import columns
from bottleneck.results.picture import draw
from bottleneck.results.schema import SCHEMA, fault, head_columns, parse, printable

log = logging.getLogger(__name__)
MERGED = "curve"  # in a multirun's folder: the folder of its jobs' curves as one
DERIVED = ("curve.csv", "curve.png", "details.png")


def read(paths: Iterable[Path], skip: Optional[Path] = None) -> list[dict[str, Any]]:
    """The curves of every curve.json below some run folders. Raises UserError for bad files, and if there are none.

    A multirun's folder holds those of its jobs, and in `MERGED` the same heads as one curve, which is read only if its
    folder is given.

    Args: skip: a folder that is not read: --out, which may hold the curve of the same command before.
    """
    curves: list[dict[str, Any]] = []
    for path in paths:
        there = [path] if path.is_file() else sorted(path.rglob("curve.json"))
        there = [f for f in there if f.parent == path or f == path or not _merged(f.parent)]
        files = [f for f in there if skip is None or f.parent.resolve() != skip.resolve()]
        check(bool(files) or not there, f"--out {skip}: is one of the runs; give another folder")
        check(bool(files), f"{path}: no curve.json there; give the folder of a finished run, or of a multirun")
        for file in files:
            curves += _read(file)
    return curves


def given_twice(paths: Iterable[Path]) -> list[Path]:
    """The paths that name a folder which an earlier one has named, by whatever name; curve.json names its folder."""
    folders: set[Path] = set()
    twice: list[Path] = []
    for path in paths:
        folder = (path.parent if path.is_file() else path).resolve()
        if folder in folders:
            twice.append(path)
        folders.add(folder)
    return twice


def _read(file: Path) -> list[dict[str, Any]]:
    where = f"{file}: not a curve of bottleneck"
    try:
        content = printable(parse(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    found = content.get("curves", [content]) if isinstance(content, dict) else [content]
    check(isinstance(found, list) and bool(found), f"{where}: it holds no curve")
    version = content.get("schema", SCHEMA) if isinstance(content, dict) else SCHEMA
    check(version == SCHEMA, f"{where}: schema {version}, this version reads {SCHEMA}")
    faults = [fault(c) for c in found]
    for wrong in filter(None, faults):
        raise UserError(f"{where}: {wrong}")
    return found


def _merged(folder: Path) -> bool:
    return folder.name == MERGED and (folder.parent / "multirun.yaml").exists()


def write(curves: list[dict[str, Any]], out: Path, x: str = "rank") -> None:
    """Write curve.json (one curve as it is, several under "curves"), then curve.csv and the pictures.

    Args: x: axis of curve.png, a key of `cost.AXES`.
    Raises: UserError if the folder cannot be written. A picture that cannot be drawn is only a warning.
    """
    content = curves[0] if len(curves) == 1 else {"schema": SCHEMA, "curves": curves}
    for name in DERIVED:  # files of another curve must not stay beside this one if writing is interrupted
        with contextlib.suppress(OSError):
            (out / name).unlink(missing_ok=True)
    _put(out / "curve.json", _json(content).encode())
    _write_derived(curves, out, DERIVED, x=x)


def _json(content: dict[str, Any]) -> str:
    """JSON with an indent of one, and lists of numbers on one line each."""
    text = json.dumps(content, indent=1, allow_nan=False)
    lists = re.compile(r"\[\s+((?:(?:[-+.\deE]+|null),?\s+){3,})\]")
    return lists.sub(lambda m: "[" + " ".join(m[1].split()) + "]", text) + "\n"


def _put(path: Path, raw: bytes) -> None:
    write_atomic(path, lambda part: part.write_bytes(raw))


def _write_derived(curves: list[dict[str, Any]], out: Path, names: Iterable[str], *, x: str = "rank") -> None:
    """Make some of the files that follow from curve.json."""
    pictures: dict[str, Callable[[BinaryIO], object]] = {"curve.png": lambda f: draw(curves, f, x)}
    if has_details(curves):
        pictures["details.png"] = lambda f: draw_details(curves, f)
    if "curve.csv" in names:
        _put(out / "curve.csv", _csv(curves).encode())
    for name in (n for n in pictures if n in names):
        picture = io.BytesIO()
        try:
            pictures[name](picture)
        except Exception as error:  # Matplotlib raises many kinds; results do not depend on its pictures
            first = " ".join(str(error).split())[:200]
            log.warning("%s: cannot be drawn: %s: %s", out / name, type(error).__name__, first)
            continue
        _put(out / name, picture.getvalue())


def _csv(curves: list[dict[str, Any]]) -> str:
    """One row for each head: the numbers that every head has, its kind if one is not W = A B, metrics, perplexities by
    text of a mix, and losses by frequency of the target."""
    kinds = ("kind", "options") if any("kind" in h for c in curves for h in c["heads"]) else ()
    names = [*head_columns(), *kinds, *(m.name for m in columns(curves))]
    names += dict.fromkeys(name for c in curves for h in c["heads"] for name in domain_perplexities(h))
    names += dict.fromkeys(name for c in curves for h in c["heads"] for name in band_losses(h))
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("backbone", "data", "tokens", *names))
    for c in curves:
        for h in c["heads"]:
            row = {"kind": LOW_RANK} | h | band_losses(h) | domain_perplexities(h)
            row["options"] = json.dumps(h["options"]) if h.get("options") else None
            writer.writerow((c["backbone"], c["data"], c["tokens"], *(row.get(name) for name in names)))
    return table.getvalue()


def complete(run_dir: Path) -> dict[str, Any] | None:
    """The curve of a finished run, whose curve.json and head files all exist, whole; None otherwise. Writes nothing."""
    try:
        (found,) = _read(run_dir / "curve.json")
        files = [run_dir / "heads" / f"{HeadKey.of(h).name}.safetensors" for h in found["heads"]]
    except (UserError, ValueError):
        return None
    return found if all(map(_is_whole, files)) else None


def _is_whole(head: Path) -> bool:
    """Whether a head's file is there, with as many bytes as its header says: a full disk or a crash may leave less."""
    try:
        with safe_open(head, framework="numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def write_missing(found: dict[str, Any], run_dir: Path) -> None:
    """Write the files that follow from a finished run's curve.json and are missing.

    They are missing if the run was killed, or its disk was full, after it had written curve.json.
    """
    for name in ("curve.json", *DERIVED):
        for part in leftovers(run_dir / name):
            with contextlib.suppress(OSError):
                part.unlink()
    missing = [name for name in DERIVED if not (run_dir / name).exists() or not (run_dir / name).stat().st_size]
    if "details.png" in missing and not has_details([found]):
        missing.remove("details.png")
    if missing:
        _write_derived([found], run_dir, missing)
        log.info("wrote %s from %s", ", ".join(missing), run_dir / "curve.json")

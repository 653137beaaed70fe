"""Which local files are text, and which of them are for validation by their names or folders."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Iterable, Iterator, Optional

from bottleneck.config.numbers import as_list
from bottleneck.core.errors import UserError, check
from bottleneck.data.declared_splits import declared_splits
from bottleneck.data.readers import READERS, is_text_file, local_path, readable

log = logging.getLogger(__name__)
# The convention of `datasets` for folders: a keyword in the name of a folder, or else of a file, between separators.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATOR = r"[-._ 0-9]"
SPLIT_NAMES = {
    split: re.compile(rf"(?:^|{SEPARATOR})(?:{'|'.join(words)})(?:{SEPARATOR}|$)", re.IGNORECASE)
    for split, words in SPLIT_WORDS.items()
}
SHARD = re.compile(r"data/(.+)-\d{5}-of-\d{5}[^/]*\.[^/]*")  # data/SPLIT-00000-of-00010.parquet
# files that describe a dataset and hold no text of it, as `datasets` has them
ABOUT = {"readme.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}


def expand(key: str, patterns: Any) -> list[str]:
    """Folders, globs and files as a sorted list of files.

    Folders are read recursively, including symbolic links. Hidden files and folders (.git,
    .ipynb_checkpoints, __pycache__) are left out unless the pattern names them.

    Raises: UserError if there is no file.
    """
    found = [path for pattern in patterns_of(key, patterns) for path in files_of(key, pattern)]
    return distinct(found)


def patterns_of(key: str, patterns: Any) -> list[str]:
    listed = [str(p) for p in as_list(patterns)]
    usage = "give a file, a folder or a glob"
    check(len(listed) > 0, f"{key}=[]: {usage}")
    check(all(p.strip() for p in listed), f"{key}: is empty (an unset shell variable?); {usage}")
    return listed


def files_of(key: str, pattern: str) -> list[str]:
    path = local_path(pattern)
    if path.is_dir():
        hits = [str(path / name) for name in _inside(path)]
        endings = ", ".join(READERS)
        check(bool(hits), f"{key}={readable(pattern)}: the folder holds no text; known endings are {endings}")
        return hits
    if path.is_file():
        return [str(path)]
    matches = [p for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
    hits = [p for p in matches if _hidden_parts(p) == _hidden_parts(str(path))]
    hint = "give a file, a folder or a glob such as 'texts/*.jsonl.zst'"
    check(bool(hits), f"{key}={readable(pattern)}: no such file; {hint}")
    return hits


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__", "~$")) and name.strip(".") != ""


def _hidden_parts(path: str) -> int:
    return sum(map(_is_hidden, PurePath(path).parts))


def walk_once(folder: Path, hidden: Optional[list[Path]] = None) -> Iterator[tuple[PurePath, list[str]]]:
    """(path relative to `folder`, names of its files) of every folder below and of `folder` itself, sorted.

    Links are followed, but no folder is visited twice, and a folder rather than a link to it: a link may lead back up,
    and a link from the training text to the validation text must not make one of the other.

    Args: hidden: receives the hidden folders, which are not visited.
    """

    def shown(here: str, folders: list[str]) -> list[str]:
        if hidden is not None and not _is_link_inside(here, folder):
            hidden.extend(Path(here) / name for name in folders if _is_hidden(name))
        return sorted(name for name in folders if not _is_hidden(name))

    def identity(here: str) -> tuple[int, int]:
        about = os.stat(here)
        return about.st_dev, about.st_ino

    real = set()
    for here, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        real.add(identity(here))
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        this = identity(here)
        if this in seen or (this in real and _is_link_inside(here, folder)):
            folders.clear()
            continue
        seen.add(this)
        folders[:] = shown(here, folders)
        yield PurePath(here).relative_to(folder), sorted(files)


def _is_link_inside(here: str, folder: Path) -> bool:
    """Whether the path of a folder below `folder` goes through a link."""
    return os.path.realpath(here) != os.path.normpath(
        os.path.join(os.path.realpath(folder), os.path.relpath(here, folder))
    )


def _inside(folder: Path) -> list[str]:
    """Paths of the text files in a folder, relative to it, sorted. Logs the files that are left out."""
    found: list[str] = []
    others: Counter[str] = Counter()
    hidden: list[Path] = []
    left_out: dict[str, int] = defaultdict(int)
    for relative, files in walk_once(folder, hidden):
        texts = [name for name in _texts(folder / relative, files) if (folder / relative / name).is_file()]
        found += [str(relative / name) for name in texts if not _is_hidden(name)]
        left_out[""] += sum(map(_is_hidden, texts))
        others.update(_endings_of_others(files))
    for root in hidden:
        left_out[root.name] += sum(len(_texts(Path(here), files)) for here, _, files in os.walk(root))
    for name, count in sorted(left_out.items()):
        if count:
            where = f"in hidden folders {readable(name)}" if name else "with hidden names"
            log.info("%s: %d files %s are left out", readable(folder), count, where)
    if found and others:
        endings = ", ".join(sorted(others))
        log.info("%s: %d files of other kinds are not read: %s", readable(folder), sum(others.values()), endings)
    return sorted(found)


def _endings_of_others(files: list[str]) -> list[str]:
    """The endings (without one, the names) of the files of one folder that are neither text nor about the text."""
    if "state.json" in files:  # of `datasets.save_to_disk`, whose files are listed
        return []
    plain = (name for name in files if not _is_hidden(name) and name.lower() not in ABOUT)
    return [PurePath(name).suffix or name for name in plain if not is_text_file(Path(name))]


def _texts(folder: Path, files: list[str]) -> list[str]:
    """The files of one folder that hold text by their names; of a `datasets.save_to_disk` folder those it lists."""
    if "state.json" in files and "dataset_info.json" in files:
        return [name for name in listed_files(folder / "state.json") if name in files]
    return [name for name in files if is_text_file(Path(name)) and name.lower() not in ABOUT]


def listed_files(state: Path) -> list[str]:
    """The .arrow files that the state.json of a `datasets` folder lists; others there are caches."""
    try:
        return [str(f["filename"]) for f in json.loads(state.read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{readable(state)}: not the state.json of datasets.save_to_disk, or truncated") from error


def distinct(paths: Iterable[str]) -> list[str]:
    """Sorted, and each file once, however often and under however many names it was given."""
    return sorted({Path(p).resolve(): p for p in reversed(list(paths))}.values())


@dataclass
class Split:
    """The files of one folder by what they are for. `others` are neither trained on nor validated on."""

    train: list[str]
    validation: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    by: Optional[str] = None  # what decided: its README.md, or the names of its shards, folders or files; None: nothing


def split_of_folder(names: list[str], folder: Optional[Path] = None) -> Split:
    """Split the files of a folder as `datasets` does.

    If the folder's README.md declares splits, they hold. Otherwise the first of these conventions that matches any name
    decides: shards data/SPLIT-00000-of-00010.*, folders named
    train, validation or test, files with such names. If it finds no training or no validation text, files without a
    split are split by their own names, and the rest is for training. Without validation text, the test text is used
    for validation. If no name matches, all files are for training.

    Args:
        names: paths relative to the folder.
        folder: the folder, to read its README.md.
    """
    declared = declared_splits(folder, names) if folder else {}
    if declared:
        return _by_declaration(names, declared)
    sharded = {n: _splits([m[1]]) or [m[1]] for n in names if (m := SHARD.fullmatch(PurePath(n).as_posix()))}
    by_folder = {n: _splits(PurePath(n).parts[:-1]) for n in names}
    by_file = {n: _splits(PurePath(n).parts[-1:]) for n in names}
    levels = (("names of its shards", sharded), ("names of its folders", by_folder), ("names of its files", by_file))
    by, level = next(((by, level) for by, level in levels if any(level.values())), (None, by_file))
    if by is None:
        return Split(names)
    found = {n: set(level.get(n, ())) for n in names}
    known = set().union(*found.values())
    for wanted in ({"train"}, {"validation", "test"}):
        if not known & wanted:
            found |= {n: set(by_file[n]) for n in names if not found[n] and set(by_file[n]) & wanted}
    held = next((s for s in ("validation", "test") if any(s in splits for splits in found.values())), None)
    validation = [n for n in names if held in found[n]]
    train = [n for n in names if found[n] == {"train"}] or [n for n in names if not found[n]]
    used = {*train, *validation}
    return Split(train, validation, [n for n in names if n not in used], by)


def _by_declaration(names: list[str], declared: dict[str, list[str]]) -> Split:
    roles = {n: {r for split in declared.get(n, ()) for r in _splits([split])} for n in names}
    held = next((s for s in ("validation", "test") if any(s in r for r in roles.values())), None)
    validation = [n for n in names if held in roles[n]]
    train = [n for n in names if "train" in roles[n] and n not in validation]
    used = {*train, *validation}
    return Split(train, validation, [n for n in names if n not in used], "README.md")


def _splits(parts: Iterable[str]) -> list[str]:
    return [split for split, pattern in SPLIT_NAMES.items() if any(pattern.search(part) for part in parts)]


def shown(names: list[str]) -> str:
    """The folders or the first files of a list, and how many files they are."""
    folders = {PurePath(name).parts[0] + "/" for name in names if len(PurePath(name).parts) > 1}
    whole = folders and len(names) > 1 and all(len(PurePath(name).parts) > 1 for name in names)
    shown = sorted(folders) if whole else names
    more = ", …" if len(shown) > 3 else ""
    return f"{', '.join(map(readable, shown[:3]))}{more} ({len(names)} {'file' if len(names) == 1 else 'files'})"

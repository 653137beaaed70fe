"""Where documents come from: local text files or a Hub dataset, read as a stream through `datasets`."""

from __future__ import annotations

import glob
import logging
import re
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

from bottleneck.config.checks import as_list
from bottleneck.config.schema import DataConfig
from bottleneck.core.errors import UserError, check

log = logging.getLogger(__name__)
READERS = {".txt": "text", ".text": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
PACKED = (".zst", ".gz", ".xz", ".bz2")
ROWS = 32  # read at once: few, since a row may be a whole book
SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}  # our words for the text reader's
HELD_OUT_NAMES = ("validation", "valid.", "valid-", "val.", "val-", "dev.", "dev-")


def reader_of(path: str) -> str:
    """`datasets` reader for a file name. Raises UserError for an unknown ending."""
    name = Path(path)
    suffix = Path(name.stem).suffix if name.suffix in PACKED else name.suffix
    known = ", ".join(READERS)
    check(
        suffix.lower() in READERS,
        f"data.files: {path} has an unknown ending; known are {known} (also with {', '.join(PACKED)})",
    )
    return READERS[suffix.lower()]


def expand(key: str, patterns: Any) -> list[str]:
    """Folders, globs and files, as a sorted list of files. Raises UserError where nothing is there."""
    found: list[str] = []
    check(len(as_list(patterns)) > 0, f"{key}=[]: give a file, a folder or a glob")
    for pattern in map(str, as_list(patterns)):
        path = Path(pattern).expanduser()
        if path.is_dir():
            hits = [
                str(p)
                for p in path.rglob("*")
                if p.is_file() and p.name[0] != "." and p.name.lower() != "readme.md" and _known(p)
            ]
            check(bool(hits), f"{key}={pattern}: the folder holds no text; known endings are {', '.join(READERS)}")
        else:
            hits = (
                [str(path)]
                if path.is_file()
                else [p for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
            )
            check(
                bool(hits),
                f"{key}={pattern}: no such file; give a file, a folder or a glob such as 'texts/*.jsonl.zst'",
            )
        found += hits
    # one file may be named in several ways
    return sorted({Path(f).resolve(): f for f in reversed(found)}.values())


def _known(path: Path) -> bool:
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return suffix.lower() in READERS


class Source:
    """The documents of one config: `train()` and, where the text has them apart, `validation()`."""

    def __init__(self, cfg: DataConfig):
        self.cfg = cfg
        self.files: list[str] = []
        self.validation_files: list[str] = []
        if cfg.files is not None:
            files = expand("data.files", cfg.files)
            if cfg.validation_files is not None:
                self.validation_files = expand("data.validation_files", cfg.validation_files)
            elif len(as_list(cfg.files)) == 1 and Path(str(as_list(cfg.files)[0])).expanduser().is_dir():
                # a folder with train* and validation* files says itself what is what; other files there are not text
                self.validation_files = [f for f in files if Path(f).name.lower().startswith(HELD_OUT_NAMES)]
                named = [f for f in files if Path(f).name.lower().startswith("train")]
                files = named or files
            held_out = {Path(f).resolve() for f in self.validation_files}
            self.files = [f for f in files if Path(f).resolve() not in held_out]
            check(bool(self.files), f"data.files={cfg.files}: only validation files there, nothing to train on")
            for path in self.files + self.validation_files:
                reader_of(path)

    @property
    def name(self) -> str:
        """Label of the text in curves."""
        if self.cfg.name:
            return self.cfg.name
        if self.cfg.dataset:
            return "/".join(filter(None, (self.cfg.dataset.split("/")[-1], self.cfg.subset)))
        return ",".join(Path(str(p)).name for p in as_list(self.cfg.files))

    @property
    def has_validation(self) -> bool:
        return bool(self.validation_files) or bool(self.cfg.dataset and self.cfg.validation_split)

    def describe(self) -> dict[str, Any]:
        """What the prepared tokens depend on, for the cache key. Local files count by path, size and time."""
        c = self.cfg

        def stat(paths: Iterable[str]) -> list:
            return [[str(Path(p).resolve()), Path(p).stat().st_size, Path(p).stat().st_mtime_ns] for p in paths]

        hub = [c.dataset, c.subset, c.split, c.validation_split] if c.dataset else None
        return {
            "files": stat(self.files),
            "validation_files": stat(self.validation_files),
            "hub": hub,
            "text": [c.text_field, c.text_unit, c.document_start],
            "split": None if self.has_validation else [c.seed, c.validation_fraction],
            "limits": [c.max_tokens, c.validation_tokens],
        }

    def train(self) -> Iterator[str]:
        return self._documents(self.files, self.cfg.split)

    def validation(self) -> Iterator[str]:
        return self._documents(self.validation_files, self.cfg.validation_split)

    def _documents(self, files: list[str], split: Optional[str]) -> Iterator[str]:
        rows = self._hub_rows(split) if self.cfg.dataset else self._file_rows(files)
        if self.cfg.document_start:
            rows = join_rows(rows, self.cfg.document_start)
        return (row for row in rows if row.strip())

    def readers(self, files: list[str]) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
        """What `datasets.load_dataset` is called with for some files: (reader, its files, its options)."""
        for reader in ("text", "json", "parquet"):
            paths = [f for f in files if reader_of(f) == reader]
            options: dict[str, Any] = {}
            if paths and reader == "text":
                unit = self.cfg.text_unit
                if unit == "auto":  # one file alone is a corpus, of several each is a document
                    unit = "paragraph" if len(paths) == 1 else "file"
                    log.info("data.text_unit=auto: a document is a %s", unit)
                options["sample_by"] = SAMPLE_BY[unit]
            if paths:
                yield reader, paths, options

    def _file_rows(self, files: list[str]) -> Iterator[str]:
        for reader, paths, options in self.readers(files):
            field = "text" if reader == "text" else self.cfg.text_field
            files_of = [glob.escape(p) for p in paths]
            yield from self._rows(paths, field, reader, data_files=files_of, split="train", streaming=True, **options)

    def _hub_rows(self, split: Optional[str]) -> Iterator[str]:
        c = self.cfg
        options: dict[str, Any] = {"split": split, "streaming": c.streaming}
        if c.subset:
            options["name"] = c.subset
        return self._rows([f"data.dataset={c.dataset}"], c.text_field, c.dataset, **options)

    @staticmethod
    def _rows(sources: list[str], field: str, path: str, **options: Any) -> Iterator[str]:
        import datasets

        datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong with a file is told below, once
        where = sources[0] if len(sources) == 1 else f"{len(sources)} files from {sources[0]} on"
        try:
            stream = datasets.load_dataset(path, **options)
            # Arrow tables: of their columns only the text is made into Python objects; files that are documents come singly
            for table in stream.with_format("arrow").iter(
                batch_size=1 if options.get("sample_by") == "document" else ROWS
            ):
                if field not in table.column_names:
                    columns = ", ".join(table.column_names) or "none"
                    raise UserError(f"data.text_field={field}: no such column in {where}; columns there: {columns}")
                for text in table.column(field).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise UserError(f"data.text_field={field}: holds {type(text).__name__}, not text, in {where}")
                    if text:
                        yield text
        except UserError:
            raise
        except StopIteration:  # datasets' way to say that the files are empty
            return
        except Exception as error:  # datasets, pyarrow, zstandard and the network each raise their own kinds
            for source in sources if len(sources) > 1 else []:  # which file it is, they seldom say: read each by itself
                for _ in Source._rows([source], field, path, **options | {"data_files": [glob.escape(source)]}):
                    pass
            raise UserError(f"{where}: cannot be read as {path}: {type(error).__name__}: {error}") from error


def join_rows(rows: Iterable[str], pattern: str) -> Iterator[str]:
    """Join rows into documents; a row that matches `pattern` begins the next one."""
    try:
        starts = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.document_start={pattern}: not a regular expression: {error}") from error
    document: list[str] = []
    for row in rows:
        if starts.match(row) and document:
            yield "".join(document)
            document = []
        document.append(row if row.endswith("\n") else row + "\n")
    if document:
        yield "".join(document)

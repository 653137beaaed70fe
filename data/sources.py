"""The sources of documents: local text files or a Hub dataset, and which of the documents are for validation."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

from bottleneck.config.numbers import as_list
from bottleneck.config.schema import DataConfig
from bottleneck.core.errors import UserError, check
from bottleneck.data.hub_streams import hub_split
from bottleneck.data.local_files import Split, distinct, files_of, patterns_of, shown, split_of_folder
from bottleneck.data.readers import RowCounts, RowReader, local_path, readable, reader_of

log = logging.getLogger(__name__)
READING = 3  # version of how local files become documents; part of the cache key, so older caches are not reused
LANES = 8  # lanes of a Hub stream; the tokens depend on them
SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}  # data.text_unit in the words of `datasets`


class Source:
    """The documents of one config: `train()` and, if the text has separate ones, `validation()`.

    Attributes:
        counts: rows read so far, and how many of them were empty or left out.
        documents: documents returned so far.
        blank: documents of nothing but white space; these are not returned.
    """

    def __init__(self, cfg: DataConfig):
        self.cfg = cfg
        self.files: list[str] = []
        self.validation_files: list[str] = []
        self.counts = RowCounts()
        self.documents = self.blank = 0
        check(
            cfg.dataset is None or bool(cfg.dataset.strip()), "data.dataset: is empty; give the name of a Hub dataset"
        )
        if cfg.files is None:
            return
        if cfg.validation_files is not None:
            self.validation_files = self._held_out_of(cfg.validation_files)
        files = [f for pattern in patterns_of("data.files", cfg.files) for f in self._training_of(pattern)]
        self.validation_files = distinct(self.validation_files)
        held_out = {Path(f).resolve() for f in self.validation_files}
        self.files = [f for f in distinct(files) if Path(f).resolve() not in held_out]
        where = f"data.files={','.join(readable(p) for p in as_list(cfg.files))}"
        way = "data.validation_files names them all" if cfg.validation_files else "a glob takes them as they are"
        check(bool(self.files), f"{where}: only validation files there, nothing to train on; {way}")
        for path in self.files + self.validation_files:
            reader_of(path)

    def _training_of(self, pattern: str) -> list[str]:
        """The training files of one file, folder or glob; also records a folder's own validation files."""
        folder = local_path(pattern)
        files = files_of("data.files", pattern)
        if not folder.is_dir():
            return files
        split = split_of_folder([os.path.relpath(f, folder) for f in files], folder)
        own = self.cfg.validation_files is None
        if split.by is None or not (own or split.train):
            return files
        if own:
            self.validation_files += [str(folder / name) for name in split.validation]
        held = split.validation if own else []
        others = split.others if own else split.others + split.validation
        said = "; ".join(
            f"{words} {shown(names)}"
            for words, names in (("training:", split.train), ("validation:", held), ("not used:", others))
            if names
        )
        log.info("data.files=%s is split by the %s: %s (a glob overrides)", readable(pattern), split.by, said)
        return [str(folder / name) for name in split.train]

    def _held_out_of(self, patterns: Any) -> list[str]:
        """The files of `data.validation_files`; of a folder that is split by its names, only the validation text."""
        found = []
        for pattern in patterns_of("data.validation_files", patterns):
            folder, files = local_path(pattern), files_of("data.validation_files", pattern)
            names = [os.path.relpath(f, folder) for f in files] if folder.is_dir() else []
            split = split_of_folder(names, folder) if names else Split([])
            if split.validation:
                log.info("data.validation_files=%s: %s of it are taken", readable(pattern), shown(split.validation))
            found += [str(folder / name) for name in split.validation] or files
        return found

    @property
    def name(self) -> str:
        """Label of the text in curves."""
        if self.cfg.name:
            return self.cfg.name
        if self.cfg.dataset:
            return "/".join(filter(None, (self.cfg.dataset.split("/")[-1], self.cfg.subset)))
        return ",".join(readable(Path(str(p)).name) for p in as_list(self.cfg.files))

    @property
    def has_validation(self) -> bool:
        """Whether validation text is given; otherwise documents are held out of the training text."""
        return bool(self.validation_files) or bool(self.cfg.dataset and self.cfg.validation_split)

    def describe(self) -> dict[str, Any]:
        """Everything that the prepared tokens depend on, for the cache key. Local files count by path, size and
        time."""
        c = self.cfg

        def stat(paths: Iterable[str]) -> list:
            return [[str(Path(p).resolve()), Path(p).stat().st_size, Path(p).stat().st_mtime_ns] for p in paths]

        hub = [c.dataset, c.subset, c.split, c.validation_split] if c.dataset else None
        about: dict[str, Any] = {
            "files": stat(self.files),
            "validation_files": stat(self.validation_files),
            "hub": hub,
            "text": [c.text_field, c.text_unit, c.document_start],
            "split": None if self.has_validation else [c.seed, c.validation_fraction],
            "limits": [c.max_tokens, c.validation_tokens],
        }
        about["reading"] = READING
        if c.text_unit == "auto" and any(reader_of(f) == "text" for f in self.validation_files):
            about["validation_unit"] = "of the training text"  # once it was that of the validation text alone
        if c.dataset and c.streaming:
            about["lanes"] = LANES
        if c.bad_rows != "error":
            about["bad_rows"] = c.bad_rows
        return about

    def train(self) -> Iterator[str]:
        """The training documents in their order, or all documents if there are no separate ones for validation."""
        return self._documents(self.files, self.cfg.split)

    def validation(self) -> Iterator[str]:
        """The validation documents in their order."""
        return self._documents(self.validation_files, self.cfg.validation_split)

    def _documents(self, files: list[str], split: Optional[str]) -> Iterator[str]:
        rows = self._hub_rows(split) if self.cfg.dataset else self._file_rows(files)
        if self.cfg.document_start:
            rows = join_rows(rows, self.cfg.document_start)
        for document in rows:
            if document.strip():
                self.documents += 1
                yield document
            else:
                self.blank += 1

    def readers(self, files: list[str]) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
        """The arguments of `datasets.load_dataset` for some files: (reader, its files, its options)."""
        for reader, paths, unit in self._by_reader(files):
            yield reader, paths, {"sample_by": SAMPLE_BY[unit]} if reader == "text" else {}

    def _by_reader(self, files: list[str]) -> Iterator[tuple[str, list[str], str]]:
        """(reader, its files, unit of a text file): first plain text, then JSON, Parquet and Arrow."""
        for reader in ("text", "json", "parquet", "arrow"):
            paths = [f for f in files if reader_of(f) == reader]
            unit = self.cfg.text_unit
            if unit == "auto":  # one training file alone is a corpus; of several, each is a document
                # the same for validation text: else its documents would be of another kind, and copies not be found
                trained = [f for f in self.files if reader_of(f) == "text"] or paths
                unit = "paragraph" if len(trained) == 1 else "file"
                if paths and reader == "text":
                    part = "validation text" if files == self.validation_files != self.files else "training text"
                    log.info("data.text_unit=auto: in the %s a document is a %s", part, unit)
            if paths:
                yield reader, paths, unit

    def _file_rows(self, files: list[str]) -> Iterator[str]:
        for _, paths, unit in self._by_reader(files):
            reader = RowReader(self.cfg.text_field, unit, self.cfg.bad_rows == "skip", self.counts)
            for path in paths:
                yield from reader.texts(path)

    def _hub_rows(self, split: Optional[str]) -> Iterator[str]:
        before = self.counts
        for lane in hub_split(self.cfg, str(split)).lanes:  # one
            for texts, state in lane.tables(None):
                self.counts = before + RowCounts(**state["counts"])
                yield from texts


class RowJoiner:
    """Joins rows into documents; a row that matches `pattern` begins the next one.

    Attributes:
        document: rows of the document that has not ended yet.
    """

    def __init__(self, pattern: str):
        try:
            self.starts = re.compile(pattern)
        except re.error as error:
            raise UserError(f"data.document_start={pattern}: not a regular expression: {error}") from error
        self.document: list[str] = []

    def add(self, rows: Iterable[str]) -> Iterator[str]:
        """The documents that end with these rows."""
        for row in rows:
            if self.starts.match(row) and self.document:
                yield self.end()
            self.document.append(row if row.endswith("\n") else row + "\n")

    def end(self) -> str:
        """The document so far, "" if there is none."""
        text, self.document = "".join(self.document), []
        return text


def join_rows(rows: Iterable[str], pattern: str) -> Iterator[str]:
    """Join rows into documents, see `RowJoiner`."""
    joiner = RowJoiner(pattern)
    yield from joiner.add(rows)
    if joiner.document:
        yield joiner.end()

"""The rows of a Hub data set in lanes: each lane reads files of its own, and goes on from any of its states.

JSON files are read by our reader, which reads the text column alone; `datasets` rewrites a column of mixed types as
JSON text. Everything else goes through `datasets`, with its `shard` and its `state_dict`.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict, dataclass
from typing import Any, Iterator, Optional, Protocol

from bottleneck.config.schema import DataConfig
from bottleneck.core.errors import UserError, check
from bottleneck.data.readers import RowCounts, RowReader, is_text_type

ROWS = 32  # rows read at once: few, because a row may be a whole book

State = Optional[dict[str, Any]]  # can be stored as JSON; None is the start
Tables = Iterator[tuple[list[str], dict[str, Any]]]


class Lane(Protocol):
    """Rows of some files of a split."""

    def tables(self, state: State) -> Tables:
        """(texts that are not empty, the state behind them), from a state on; a state has the `counts` of all rows."""


@dataclass
class HubSplit:
    """One split of a Hub data set.

    Attributes:
        identity: of the data set's files.
        lanes: together they hold every row once; no file is in two of them.
    """

    identity: str
    lanes: list[Lane]


class JsonLane:
    """JSON files at URLs. A state names the file and its row; the rows before it are parsed again and dropped."""

    def __init__(self, cfg: DataConfig, urls: list[str], where: str):
        self.cfg, self.urls, self.where = cfg, urls, where

    def tables(self, state: State) -> Tables:
        first, skip = (state["file"], state["row"]) if state else (0, 0)
        counts = RowCounts(**state["before"]) if state else RowCounts()
        for number in range(first, len(self.urls)):
            before = asdict(counts)
            reader = RowReader(self.cfg.text_field, skip_bad=self.cfg.bad_rows == "skip", counts=counts)
            texts: list[str] = []
            with reported(self.where):
                for text in reader.texts(self.urls[number], kind="json"):
                    row = counts.rows - before["rows"]
                    if row <= skip:
                        continue
                    texts.append(text)
                    if len(texts) == ROWS:
                        yield texts, {"file": number, "row": row, "before": before, "counts": asdict(counts)}
                        texts = []
            skip = 0
            yield texts, {"file": number + 1, "row": 0, "before": asdict(counts), "counts": asdict(counts)}


class ArrowLane:
    """A stream of `datasets`, or a whole data set of it, which has no state to go on from."""

    def __init__(self, cfg: DataConfig, rows: Any, where: str):
        self.cfg, self.rows, self.where = cfg, rows.with_format("arrow"), where

    def tables(self, state: State) -> Tables:
        counts = RowCounts(**state["counts"]) if state else RowCounts()
        with reported(self.where), contextlib.suppress(StopIteration):  # how `datasets` reports that there is no row
            if state:
                self.rows.load_state_dict(state["stream"])
            for table in self.rows.iter(batch_size=ROWS):
                texts = self._texts(table)
                kept = [text for text in texts if text]
                counts.rows += len(texts)
                counts.empty += len(texts) - len(kept)
                stream = self.rows.state_dict() if hasattr(self.rows, "state_dict") else None
                yield kept, {"stream": stream, "counts": asdict(counts)}

    def _texts(self, table: Any) -> list[Any]:
        name, columns = self.cfg.text_field, ", ".join(table.column_names) or "none"
        there = name in table.column_names
        check(there, f"data.text_field={name}: no such column in {self.where}; columns there: {columns}")
        kind = table.schema.field(name).type
        check(is_text_type(kind), f"data.text_field={name}: holds {kind}, not text, in {self.where}")
        return table.column(name).to_pylist()


@contextlib.contextmanager
def reported(where: str) -> Iterator[None]:
    """Errors of `datasets`, pyarrow and the network as one line."""
    import datasets

    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # datasets, pyarrow, zstandard and the network each raise their own kinds
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__  # the error itself has no information
        raise UserError(f"{where}: cannot be read: {type(cause).__name__}: {cause}") from error


def hub_split(cfg: DataConfig, split: str, lanes: int = 1) -> HubSplit:
    """A split of `data.dataset` in lanes, at most as many as it has files.

    Lane i has the files i, i + lanes, i + 2 · lanes …; one lane has all of them in their order. Raises UserError for a
    data set or split that does not exist or cannot be read.
    """
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # errors are reported once, as one line
    where = f"data.dataset={cfg.dataset}"
    options: dict[str, Any] = {"name": cfg.subset} if cfg.subset else {}
    with reported(where):
        builder = datasets.load_dataset_builder(str(cfg.dataset), **options)
        identity = str(builder.hash)
        if hasattr(builder.config, "on_mixed_types"):
            files = builder.config.data_files or {}
            splits = split.split("+")
            if all(part in files for part in splits):
                urls = [url for part in splits for url in files[part]]
                count = max(1, min(lanes, len(urls)))
                return HubSplit(identity, [JsonLane(cfg, urls[i::count], where) for i in range(count)])
            options["on_mixed_types"] = None
        if builder.name == "parquet":
            options["columns"] = [cfg.text_field]  # the others are neither downloaded nor compared between files
        try:
            rows = datasets.load_dataset(str(cfg.dataset), split=split, streaming=cfg.streaming, **options)
        except StopIteration:  # how `datasets` reports that there is no row
            return HubSplit(identity, [])
        count = max(1, min(lanes, rows.num_shards)) if cfg.streaming else 1
        parts = [rows.shard(count, i, contiguous=False) for i in range(count)] if count > 1 else [rows]
        return HubSplit(identity, [ArrowLane(cfg, part, where) for part in parts])

"""The texts of one file: plain text, JSON lines or Parquet, plain or compressed.

Every error names the file and, if there is one, the line. Only the text column is read, so files may differ in all
other columns. `datasets` is not used here, because it converts a whole column if one value has another type, and
accepts a truncated .zst file.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator, Optional, TextIO

import zstandard

from bottleneck.core.errors import UserError, check

READERS = {".txt": "text", ".text": "text", ".md": "text", ".json": "json", ".jsonl": "json"}
READERS |= {".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = (".zst", ".gz", ".xz", ".bz2")
CHUNK = 1 << 20  # bytes or characters read at once
PARQUET_ROWS = 32  # rows read at once: few, because a row may be a whole book
ROWS_WITHOUT_FIELD = 1000  # rows without the text column after which a file is refused
ZSTD_WINDOW = 1 << 31  # largest window of `zstd --long=31`
DAMAGE = (zstandard.ZstdError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)  # bz2 raises OSError
SHOWN = 60  # characters of a bad value that a message shows
ARROW_MARK = b"ARROW1"
UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass
class RowCounts:
    """Counts of a source's rows: `rows` = `empty` + `bad` + texts that were returned."""

    rows: int = 0
    empty: int = 0  # rows without text: the value is missing, null or ""
    bad: int = 0  # rows whose text is not a string, left out by data.bad_rows=skip

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(self.rows + other.rows, self.empty + other.empty, self.bad + other.bad)

    def __sub__(self, other: RowCounts) -> RowCounts:
        return RowCounts(self.rows - other.rows, self.empty - other.empty, self.bad - other.bad)


@dataclass
class RowReader:
    """How rows become texts.

    Args:
        column: column of JSON and Parquet files that holds the text.
        unit: what one row of a plain text file is: file, paragraph or line.
        skip_bad: leave rows without a string out and count them, instead of refusing the file.
    """

    column: str = "text"
    unit: str = "file"
    skip_bad: bool = False
    counts: RowCounts = field(default_factory=RowCounts)

    def texts(self, path: str, kind: Optional[str] = None) -> Iterator[str]:
        """The texts of one file that are not empty, in its order.

        Args:
            path: of a local file, or a URL that fsspec can open.
            kind: text, json, parquet or arrow; default: by the file's ending.

        Raises: UserError for a file that is unreadable, truncated, not of its format, or without the column; and for a
            value that is not a string, unless `skip_bad`.
        """
        kind = kind or reader_of(path)
        rows = {
            "text": self._text_rows,
            "json": self._json_rows,
            "parquet": self._parquet_rows,
            "arrow": self._arrow_rows,
        }[kind]
        for text in _explained(path, rows(path), kind):
            self.counts.rows += 1
            if text is None:
                self.counts.bad += 1
            elif text == "":
                self.counts.empty += 1
            else:
                yield text

    def _bad(self, path: str, message: str) -> None:
        check(self.skip_bad, f"{readable(path)}: {message} (data.bad_rows=skip leaves such rows out and counts them)")

    # Each of the following yields a text, "" for an empty row and None for a bad one.

    def _text_rows(self, path: str) -> Iterator[Optional[str]]:
        with open_bytes(path) as raw:
            stream = io.TextIOWrapper(raw, encoding="utf-8-sig")
            if self.unit == "file":
                yield stream.read()
            elif self.unit == "line":
                yield from (line.removesuffix("\n") for line in stream)
            else:
                yield from _paragraphs(stream)

    def _json_rows(self, path: str) -> Iterator[Optional[str]]:
        rows = 0
        columns: Optional[set[str]] = set()  # columns of the rows so far; None once one of them was the text
        for where, value in self._json_values(path):
            rows += 1
            if isinstance(value, dict):
                if self.column in value:
                    columns, value = None, value[self.column]
                    yield self._string(path, where, value)
                    continue
                if columns is not None:
                    columns.update(value)
                    check(rows < ROWS_WITHOUT_FIELD, self._no_column(path, columns))
                yield ""
            elif isinstance(value, str) and where.startswith("element"):  # an array of texts
                columns = None
                yield self._string(path, where, value)
            elif isinstance(value, UserError):
                self._bad(path, str(value))
                yield None
            else:
                self._bad(path, f"cannot be read as json: {where} is {_kind(value)}, not an object with columns")
                yield None
        check(not rows or columns is None or not columns, self._no_column(path, columns or set()))

    def _string(self, path: str, where: str, value: Any) -> Optional[str]:
        if value is None:
            return ""
        if not isinstance(value, str):
            shown = json.dumps(value)[:SHOWN]
            self._bad(path, f"{where}: data.text_field={self.column} holds {_kind(value)}, not text: {shown}")
            return None
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                self._bad(
                    path, f"{where}: data.text_field={self.column} holds one half of a surrogate pair (\\ud800 …)"
                )
                return None
        return value

    def _no_column(self, path: str, columns: Iterable[str]) -> str:
        there = ", ".join(sorted(columns)) or "none"
        return f"data.text_field={self.column}: no such column in {readable(path)}; columns there: {there}"

    def _json_values(self, path: str) -> Iterator[tuple[str, Any]]:
        """(line N or element N, value) of every JSON value; a line that is not JSON is a UserError in its place."""
        first = True
        with open_bytes(path) as raw:
            for number, line in enumerate(raw, 1):
                if number == 1:
                    line = line.removeprefix(UTF8_MARK)
                if line.isspace() or not line:
                    continue
                try:
                    values = _values(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    if first and _spans_lines(line, error):
                        yield from self._spanning(line + raw.read(), number)
                        return
                    yield f"line {number}", _not_json(number, error)
                    continue
                finally:
                    first = False
                for value in values:
                    if isinstance(value, list):
                        yield from ((f"element {i}", v) for i, v in enumerate(value, 1))
                    else:
                        yield f"line {number}", value

    @staticmethod
    def _spanning(content: bytes, first: int) -> Iterator[tuple[str, Any]]:
        """Values that span lines: one array of rows, or objects written over several lines each."""
        try:
            values = _values(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            line = first + getattr(error, "lineno", 1) - 1
            raise _not_json(line, error) from error
        flat = values[0] if len(values) == 1 and isinstance(values[0], list) else values
        yield from ((f"element {i}", value) for i, value in enumerate(flat, 1))

    def _parquet_rows(self, path: str) -> Iterator[Optional[str]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with open_bytes(path) as raw:
            seekable: Any = io.BytesIO(raw.read()) if path.lower().endswith(COMPRESSED) else raw
            try:
                yield from self._column_rows(path, pq.ParquetFile(seekable))
            except pa.ArrowException as error:  # some of its errors are not ValueErrors
                raise ValueError(str(error)) from error

    def _column_rows(self, path: str, file: Any) -> Iterator[Optional[str]]:
        self._check_column(path, file.schema_arrow)
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[self.column]):
            yield from (text or "" for text in batch.column(0).to_pylist())

    def _check_column(self, path: str, schema: Any) -> None:
        check(self.column in schema.names, self._no_column(path, schema.names))
        kind = schema.field(self.column).type
        name = f"data.text_field={self.column}"
        check(is_text_type(kind), f"{name}: holds {kind}, not text, in {readable(path)}; no row of it can be used")

    def _arrow_rows(self, path: str) -> Iterator[Optional[str]]:
        """Rows of a stream, as `datasets.save_to_disk` writes it, or of an Arrow file."""
        import pyarrow as pa

        with open_bytes(path) as raw:
            seekable: Any = io.BytesIO(raw.read()) if path.lower().endswith(COMPRESSED) else raw
            try:
                if seekable.read(len(ARROW_MARK)) == ARROW_MARK:
                    file = pa.ipc.open_file(seekable)
                    schema, batches = file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
                else:
                    seekable.seek(0)
                    stream = pa.ipc.open_stream(seekable)
                    schema, batches = stream.schema, iter(stream)
                self._check_column(path, schema)
                for batch in batches:
                    column = batch.column(schema.names.index(self.column))
                    for start in range(0, len(column), PARQUET_ROWS):
                        yield from (text or "" for text in column.slice(start, PARQUET_ROWS).to_pylist())
            except pa.ArrowException as error:
                raise ValueError(str(error)) from error


def is_text_type(kind: Any) -> bool:
    """Whether an Arrow column of this type holds strings, or nothing but nulls."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    kinds = [getattr(types, f"is_{name}", None) for name in ("string", "large_string", "string_view", "null")]
    return any(is_kind(kind) for is_kind in kinds if is_kind)


def reader_of(path: str) -> str:
    """text, json, parquet or arrow, by the ending of a file's name. Raises UserError for an unknown ending."""
    known = ", ".join(READERS)
    ending = _ending(Path(path))
    endings = f"known are {known} (also with {', '.join(COMPRESSED)})"
    check(ending in READERS, f"data.files: {readable(path)} has an unknown ending; {endings}")
    return READERS[ending]


def is_text_file(path: Path) -> bool:
    """Whether the name of a file ends like one that can be read."""
    return _ending(path) in READERS


def _ending(path: Path) -> str:
    return (Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix).lower()


def readable(path: Any) -> str:
    """A path as text that can be printed and stored; bytes that are not UTF-8 become �."""
    return os.fsencode(str(path)).decode("utf-8", "replace")


def local_path(pattern: Any) -> Path:
    """A path with ~ expanded if ~ or ~user is a folder; another name that begins with ~ stays as it is."""
    return Path(os.path.expanduser(str(pattern)))


def open_bytes(path: str) -> BinaryIO:
    """The content of a file, decompressed by its ending. Reading raises EOFError if a compressed file ends early."""
    ending = Path(path).suffix.lower()
    file: Any = _open_url(path) if "://" in path else open(path, "rb")
    if ending not in COMPRESSED:
        return file
    if file.seek(0, os.SEEK_END) == 0:
        file.close()
        raise EOFError
    file.seek(0)
    if ending == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]  # has BinaryIO's methods
    return io.BufferedReader(_FramesFile(file, ending), CHUNK)  # type: ignore[return-value]  # has BinaryIO's methods


def _open_url(url: str) -> Any:
    import fsspec

    return fsspec.open(url, "rb").open()


class _FramesFile(io.RawIOBase):
    """Decompressed bytes of a .zst, .xz or .bz2 file of one or more frames.

    `zstandard`'s own reader accepts a truncated frame as complete. `bz2` and `lzma` drop everything from a frame on
    whose header is damaged.
    """

    def __init__(self, file: BinaryIO, ending: str):
        self.file, self.left = file, b""
        self.ending = ending
        self._output = b""
        self._next_frame()

    def _next_frame(self) -> None:
        new: dict[str, Callable[[], Any]] = {
            ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj(),
            ".xz": lzma.LZMADecompressor,
            ".bz2": bz2.BZ2Decompressor,
        }
        self.frame: Any = new[self.ending]()
        self.fresh = True  # no byte of this frame was read yet

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self.left or self.file.read(CHUNK // 8)
            self.left = b""
            if not data:
                if self.fresh:
                    return 0
                raise EOFError
            if self.fresh and self.ending == ".xz":
                data = data.lstrip(b"\0")  # padding between streams
                if not data:
                    continue
            self._output = self.frame.decompress(data)
            self.fresh = False
            if self.frame.eof:
                self.left = self.frame.unused_data
                self._next_frame()
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _paragraphs(stream: TextIO) -> Iterator[str]:
    """The paragraphs of a text, which are separated by empty lines; empty ones are left out."""
    parts: list[str] = []  # lines of the paragraph that has not ended yet
    while chunk := stream.read(CHUNK):
        last = parts[-1][-1] if parts else ""
        parts.append(chunk)
        if "\n\n" in last + chunk:
            *whole, rest = "".join(parts).split("\n\n")
            yield from (p for p in whole if p)
            parts = [rest] if rest else []
    if parts:
        yield "".join(parts)


def _values(text: str) -> list[Any]:
    """The JSON values that follow one another in `text`. Raises ValueError."""
    values, at, decoder = [], 0, json.JSONDecoder()
    text = text.strip()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return values


def _spans_lines(line: bytes, error: Exception) -> bool:
    """Whether a line is not JSON because its value continues on the next line: the error is then at its very end."""
    at_end = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip())
    return at_end and line.lstrip()[:1] in (b"{", b"[")


def _not_json(line: int, error: Exception) -> UserError:
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"cannot be read as json: line {line} is not UTF-8")
    if isinstance(error, RecursionError):
        return UserError(f"cannot be read as json: line {line} is nested too deeply")
    reason = getattr(error, "msg", error)
    return UserError(f"cannot be read as json: line {line} is not JSON: {reason}")


def _kind(value: Any) -> str:
    """JSON's name for the type of a value."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _explained(path: str, rows: Iterator[Optional[str]], kind: str) -> Iterator[Optional[str]]:
    """The same rows; an error while they are read becomes one line that names the file."""
    name = readable(path)
    ending = Path(path).suffix.lower()
    try:
        yield from rows
    except UserError as error:
        if str(error).startswith((name, "data.")):
            raise
        raise UserError(f"{name}: {error}") from error
    except EOFError as error:
        raise UserError(f"{name}: the {ending} file ends early; it was truncated, copy it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: {_not_utf8(path)}") from error
    except DAMAGE as error:
        raise UserError(f"{name}: cannot be decompressed as {ending}: {error}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # pyarrow's kinds are ValueErrors
        raise UserError(f"{name}: cannot be read as {kind}: {error}") from error


def _not_utf8(path: str) -> str:
    """A description of where a text file is not UTF-8."""
    with contextlib.suppress(EOFError, OSError, *DAMAGE), open_bytes(path) as raw:
        for number, line in enumerate(raw, 1):
            if number == 1 and line.startswith(UTF16_MARKS):
                return "is UTF-16; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8; convert the file, for example with iconv -f LATIN1 -t UTF-8"
    return "is not UTF-8"

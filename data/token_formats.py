"""Files of token ids as other projects write them, read in place: neither copied nor converted.

    megatron     NAME.bin + NAME.idx of Megatron-LM and GPT-NeoX; also one NAME.idx for NAME-00000-of-00020.bin …, as
                 Pythia's preshuffled Pile is stored
    llmc         shards of llm.c, modded-nanogpt and FineWeb: 256 int32 of header, then uint16 or uint32 ids
    nanogpt      a .bin of nothing but uint16 ids
    npy          an array of ids [N] or of rows [N, T]
    safetensors  such an array in a .safetensors file
    arrow        a column of id lists in .arrow files, as `datasets.save_to_disk` writes them
    mds, litdata a folder with an index.json of MosaicML streaming or of litdata
    parquet      a column of id lists; it is compressed, so row groups are decoded as they are used

Every error names the file. References: indexed_dataset of Megatron-LM and GPT-NeoX, data_common of llm.c, the formats
of NumPy and safetensors.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Optional, Sequence

import numpy as np

from bottleneck.core.errors import UserError, check
from bottleneck.data import indexed_folders
from bottleneck.data.file_array import FileArray
from bottleneck.data.local_files import listed_files, walk_once
from bottleneck.data.parquet_ids import ParquetFile
from bottleneck.data.readers import readable

FORMATS = ("megatron", "llmc", "nanogpt", "npy", "safetensors", "arrow", "parquet", "mds", "litdata")
ENDINGS = (".bin", ".npy", ".safetensors", ".arrow", ".parquet")
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = 34  # bytes: magic, version, dtype code, sequences, documents
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
LLMC_MAGICS = (20240520, 20240801)
SMALL_INDEX = 1 << 27  # bytes of an index table up to which it is kept in memory
LLMC_HEADER = 1024  # bytes
HALVES = 4096  # values of a bare .bin looked at: of wider ids, every second one is the upper half and close to 0
SHARD_OF = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.bin")
OTHER_MAGICS = {
    b"PK\x03\x04": "a zip file",
    b"\x7fELF": "a program",
    b"GGUF": "a GGUF model",
    b"\x93NUMPY": "an npy file",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "a Parquet file",
}
SAFETENSORS_DTYPES = {"I64": "int64", "I32": "int32", "I16": "int16", "U8": "uint8", "U16": "uint16", "U32": "uint32"}


@dataclass
class Shard:
    """The ids of one file.

    Attributes:
        ids: the ids [N], sliced as an array.
        documents: start of each document in `ids`, and N at the end; indexed like an array, but perhaps not one. None
            if the file has no boundaries but end-of-text tokens.
        rows: the same for rows; None if the file has no rows.
        first_row: number of the first row in its file.
    """

    name: str
    ids: Any
    documents: Optional[Any] = None
    rows: Optional[Any] = None
    first_row: int = 0

    @property
    def costly(self) -> bool:
        """Whether looking at one place of it decodes much more."""
        return getattr(self.ids, "costly", False)

    def announce(self, start: int, stop: int) -> None:
        """Ask the system to read ahead, from files that it can read ahead of."""
        if hasattr(self.ids, "announce"):
            self.ids.announce(start, stop)


class EvenStarts:
    """Starts of rows of one length: 0, length, 2 · length …"""

    def __init__(self, rows: int, length: int):
        self.rows, self.length = rows, length

    def __len__(self) -> int:
        return self.rows + 1

    def __getitem__(self, i: Any) -> Any:
        return np.arange(*i.indices(self.rows + 1)) * self.length if isinstance(i, slice) else i * self.length


class MegatronStarts:
    """Starts of sequences or documents, looked up in the index file; the index is never read as a whole."""

    def __init__(self, pointers: Any, itemsize: int, total: int, documents: Optional[Any] = None):
        self.pointers, self.itemsize, self.total, self.documents = pointers, itemsize, total, documents

    def __len__(self) -> int:
        return len(self.documents) if self.documents is not None else len(self.pointers) + 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self._between(*i.indices(len(self))[:2])
        sequence = i if self.documents is None else int(self.documents[i])
        return self.total if sequence == len(self.pointers) else int(self.pointers[sequence]) // self.itemsize

    def _between(self, start: int, stop: int) -> np.ndarray:
        if self.documents is not None:
            sequences = self.documents[start:stop]
            if isinstance(self.pointers, np.ndarray):
                known = self.pointers[np.minimum(sequences, len(self.pointers) - 1)] // self.itemsize
                return np.where(sequences == len(self.pointers), self.total, known)
            return np.array([self[i] for i in range(start, stop)], np.int64)
        found = self.pointers[start : min(stop, len(self.pointers))] // self.itemsize
        return np.append(found, self.total) if stop > len(self.pointers) else found


def index_array(path: Path, dtype: str, offset: int, count: int) -> Any:
    """A table of an index file: in memory if it is small, because looking up is faster there."""
    array = FileArray(path, dtype, offset, count)
    return array[:] if count * array.dtype.itemsize <= SMALL_INDEX else array


class SplitFile:
    """One array of ids that is stored in several files, cut at any byte."""

    def __init__(self, paths: list[Path], dtype: np.dtype):
        self.dtype = dtype
        self.files = [FileArray(p, np.uint8) for p in paths]
        self.ends = np.cumsum([len(f) for f in self.files])

    def __len__(self) -> int:
        return int(self.ends[-1]) // self.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        at, end = start * self.dtype.itemsize, max(start, stop) * self.dtype.itemsize
        pieces = [np.empty(0, np.uint8)]
        while at < end:
            i = int(np.searchsorted(self.ends, at, side="right"))
            first = int(self.ends[i]) - len(self.files[i])
            count = min(end, int(self.ends[i])) - at
            pieces.append(self.files[i][at - first : at - first + count])
            at += count
        return np.concatenate(pieces).view(self.dtype)

    def announce(self, start: int, stop: int) -> None:
        """Ask the system to read a part ahead."""
        at, end = start * self.dtype.itemsize, stop * self.dtype.itemsize
        for file, stops in zip(self.files, self.ends.tolist()):
            begin = stops - len(file)
            if at < stops and end > begin:
                file.announce(max(at, begin) - begin, min(end, stops) - begin)


# ---------------------------------------------------------------- which format
def format_of(path: Path) -> str:
    """The format of one file, by its ending, its companion or its header. Raises UserError if it is none of them."""
    ending = path.suffix.lower()
    if ending in (".npy", ".safetensors", ".arrow", ".parquet"):
        return ending[1:]
    where = readable(path)
    if path.name == "index.json":
        return indexed_folders.kind_of(path)
    check(ending == ".bin", f"{where}: not a file of token ids; known are {', '.join(ENDINGS)}")
    if index_of(path) is not None:
        return "megatron"
    with open(path, "rb") as f:
        head = f.read(8)
    if len(head) >= 4 and int.from_bytes(head[:4], "little") in LLMC_MAGICS:
        return "llmc"
    other = next((name for magic, name in OTHER_MAGICS.items() if head.startswith(magic)), None)
    check(other is None, f"{where}: is {other}, not token ids")
    check(not head.startswith(MEGATRON_MAGIC[:7]), f"{where}: is a Megatron index; its name must end with .idx")
    return "nanogpt"


def index_of(path: Path) -> Optional[Path]:
    """The .idx file of a .bin file or of one of its shards, or None."""
    own = path.with_suffix(".idx")
    match = SHARD_OF.fullmatch(path.name)
    shared = path.with_name(f"{match[1]}.idx") if match else own
    return next((p for p in (own, shared) if p.is_file()), None)


def files_in(folder: Path) -> list[str]:
    """Names of the token files in a folder, relative to it, sorted; of a `datasets` folder those that it lists."""
    found: list[str] = []
    for relative, files in walk_once(folder):
        here = folder / relative
        if "index.json" in files:
            found.append(str(relative / "index.json"))
            continue
        if "state.json" in files:
            files = listed_files(here / "state.json")
        found += [str(relative / f) for f in files if Path(f).suffix.lower() in ENDINGS and not f.startswith(".")]
    return sorted(found, key=by_number)


def by_number(name: str) -> list[tuple[str, int]]:
    """A key to sort names by, in which x_2 is before x_10."""
    parts = re.split(r"(\d+)", name)
    return [(text, int(number or 0)) for text, number in zip(parts[::2], [*parts[1::2], ""])]


def open_shards(paths: list[Path], kind: str, ids_field: str) -> list[Shard]:
    """Open files of token ids in the given order.

    Args:
        kind: one of `FORMATS`, or auto.
        ids_field: column or tensor of the ids, for arrow, parquet and safetensors.

    Raises: UserError for a file that is missing, truncated, or of another format.
    """
    shards: list[Shard] = []
    done: set[Path] = set()  # Megatron indices whose files are opened
    for path in paths:
        where = readable(path)
        found = format_of(path) if kind == "auto" else kind
        try:
            if found == "megatron":
                index = index_of(path)
                check(index is not None, f"{where}: there is no .idx file beside it")
                if index is not None and index not in done:
                    done.add(index)
                    shards.append(_megatron(path, index))
            elif found == "litdata":
                shards += [Shard(name, ids, starts, starts) for name, ids, starts in indexed_folders.litdata(path)]
            elif found == "mds":
                shards += [Shard(n, ids, ids.starts, ids.starts) for n, ids in indexed_folders.mds(path, ids_field)]
            elif found in ("arrow", "parquet"):
                shards += _arrow(path, ids_field) if found == "arrow" else _parquet(path, ids_field)
            else:
                openers: dict[str, Callable[[Path, str], Shard]] = {
                    "llmc": _llmc,
                    "nanogpt": _nanogpt,
                    "npy": _npy,
                    "safetensors": _safetensors,
                }
                shards.append(openers[found](path, ids_field))
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise UserError(f"{where}: cannot be read as {found}: {type(error).__name__}: {error}") from error
    return [shard for shard in shards if len(shard.ids)]


# ---------------------------------------------------------------- one function for each format
def _megatron(path: Path, index: Path) -> Shard:
    where = readable(index)
    size = index.stat().st_size
    check(size >= MEGATRON_HEADER, f"{where}: too short for a Megatron index; it was truncated")
    with open(index, "rb") as f:
        head = f.read(MEGATRON_HEADER)
    check(head[:9] == MEGATRON_MAGIC, f"{where}: not a Megatron index (it begins with {head[:9]!r})")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
    check(version == 1, f"{where}: Megatron index of version {version}; version 1 is known")
    check(code in MEGATRON_DTYPES, f"{where}: data type code {code}; known are {sorted(MEGATRON_DTYPES)}")
    expected = MEGATRON_HEADER + 12 * sequences + 8 * documents
    whole = size in (expected, expected + sequences)  # with modes of multimodal sequences
    check(whole, f"{where}: has {size} bytes, its header says {expected}; it was truncated or is another file")
    check(sequences > 0, f"{where}: holds no sequence")
    dtype = np.dtype(MEGATRON_DTYPES[code]).newbyteorder("<")
    sizes = index_array(index, "<i4", MEGATRON_HEADER, sequences)
    pointers = index_array(index, "<i8", MEGATRON_HEADER + 4 * sequences, sequences)
    starts = index_array(index, "<i8", MEGATRON_HEADER + 12 * sequences, documents) if documents else None
    files = [path] if path.with_suffix(".idx") == index else _all_shards(path)
    ids: Any = FileArray(path, dtype) if len(files) == 1 else SplitFile(files, dtype)
    end = int(pointers[-1]) // dtype.itemsize + int(sizes[-1])
    name = readable(path) if len(files) == 1 else f"{readable(path)} … ({len(files)} files)"
    check(len(ids) == end, f"{name}: has {len(ids)} ids, {where} says {end}; it was truncated or is another file")
    each = starts is None or int(starts[0]) != 0 or int(starts[-1]) != sequences
    _check_index(where, sizes, pointers, None if each else starts, dtype.itemsize)
    rows = MegatronStarts(pointers, dtype.itemsize, end)
    if each or (isinstance(starts, np.ndarray) and np.array_equal(starts, np.arange(sequences + 1))):
        return Shard(name, ids, rows, rows)  # every sequence is a document
    return Shard(name, ids, MegatronStarts(pointers, dtype.itemsize, end, starts), rows)


def _check_index(where: str, sizes: Any, pointers: Any, starts: Optional[Any], itemsize: int) -> None:
    """Check that sequences, and documents, are stored one after the other: all, or a thousand of a very large index."""
    last = len(pointers) - 1
    if isinstance(sizes, np.ndarray) and isinstance(pointers, np.ndarray):
        gaps = np.flatnonzero(pointers[:-1] + sizes[:-1].astype(np.int64) * itemsize != pointers[1:])
        gap = int(gaps[0]) if len(gaps) else None
    else:
        places = {int(i) for i in np.linspace(0, last, 1000)} - {last}
        apart = (i for i in sorted(places) if int(pointers[i]) + int(sizes[i]) * itemsize != int(pointers[i + 1]))
        gap = next(apart, None)
    check(gap is None, f"{where}: sequences {gap} and {(gap or 0) + 1} are not stored one after the other")
    if starts is None:
        return
    if isinstance(starts, np.ndarray):
        known = starts
    else:
        known = np.array([int(starts[int(i)]) for i in np.linspace(0, len(starts) - 1, 1000)])
    ordered = bool((np.diff(known) >= 0).all() and known[0] >= 0 and known[-1] <= len(pointers))
    check(ordered, f"{where}: its documents do not begin one after the other; the index is damaged")


def _all_shards(path: Path) -> list[Path]:
    match = SHARD_OF.fullmatch(path.name)
    assert match is not None, path
    last = int(match[3])  # Pythia counts 00000-of-00020 to 00020-of-00020, most others to 00019-of-00020
    names = [f"{match[1]}-{i:05d}-of-{match[3]}.bin" for i in range(last + 1)]
    files = [path.with_name(name) for name in names]
    if not files[-1].is_file():
        files.pop()
    missing = [f.name for f in files if not f.is_file()]
    check(not missing, f"{readable(path.parent)}: {missing[0] if missing else ''} is missing")
    return files


def _llmc(path: Path, _: str) -> Shard:
    where, size = readable(path), path.stat().st_size
    check(size >= LLMC_HEADER, f"{where}: too short for the header of an llm.c shard; it was truncated")
    header = FileArray(path, "<i4", 0, 256)[:]
    check(int(header[0]) in LLMC_MAGICS, f"{where}: not an llm.c shard (its magic number is {int(header[0])})")
    count = int(header[2])
    width, rest = divmod(size - LLMC_HEADER, max(count, 1))
    whole = count > 0 and rest == 0 and width in (2, 4)
    check(whole, f"{where}: has {size} bytes, its header says {count} ids; it was truncated")
    short = int(header[1]) != 1 or width == 2
    check(short, f"{where}: has {size} bytes, its header says {count} ids of 2 bytes (version 1); it is damaged")
    return Shard(where, FileArray(path, f"<u{width}", LLMC_HEADER, count))


def _nanogpt(path: Path, _: str) -> Shard:
    size = path.stat().st_size
    even = size > 0 and size % 2 == 0
    check(even, f"{readable(path)}: has {size} bytes, which is no whole number of uint16 ids; it was truncated")
    ids = FileArray(path, "<u2")
    first = ids[:HALVES]
    wide = len(first) >= 32 and int(first[1::2].max()) < 4 <= int(first.max())
    check(
        not wide,
        f"{readable(path)}: holds ids of 4 or 8 bytes, and a .bin without header or index has uint16 ids; write it as"
        " .npy, or with the header of llm.c",
    )
    return Shard(readable(path), ids)


def _npy(path: Path, _: str) -> Shard:
    with open(path, "rb") as f:
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(f)
        offset = f.tell()
    check(
        not (by_columns and len(shape) > 1), f"{readable(path)}: is stored by columns (Fortran order); write it by rows"
    )
    return _array(path, dtype, shape, offset)


def _array(path: Path, dtype: np.dtype, shape: Sequence[int], offset: int) -> Shard:
    where = readable(path)
    good = np.issubdtype(dtype, np.integer) and len(shape) in (1, 2)
    check(good, f"{where}: holds {dtype} {list(shape)}; ids are whole numbers [N] or rows [N, T]")
    ids = FileArray(path, dtype, offset, math.prod(shape))
    whole = offset + len(ids) * dtype.itemsize <= path.stat().st_size
    check(whole, f"{where}: ends before its {len(ids):,} ids do; it was truncated")
    if len(shape) == 1:
        return Shard(where, ids)
    starts = EvenStarts(shape[0], shape[1])
    return Shard(where, ids, starts, starts)


def _safetensors(path: Path, ids_field: str) -> Shard:
    where, size = readable(path), path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        check(8 + length <= size, f"{where}: not a safetensors file, or truncated")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    name = ids_field if ids_field in header or len(header) != 1 else next(iter(header))
    there = ", ".join(header) or "none"
    check(name in header, f"data.ids_field={ids_field}: no such tensor in {where}; tensors there: {there}")
    about = header[name]
    kind = SAFETENSORS_DTYPES.get(about["dtype"])
    check(kind is not None, f"{where}: {name} holds {about['dtype']}; ids are whole numbers")
    begin, end = about["data_offsets"]
    check(8 + length + end <= size, f"{where}: ends before {name} does; it was truncated")
    return _array(path, np.dtype(str(kind)).newbyteorder("<"), about["shape"], 8 + length + begin)


def _arrow(path: Path, ids_field: str) -> list[Shard]:
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        reader: Any = pa.ipc.open_stream(source)  # as `datasets` writes it
        batches: Iterable[Any] = reader
    except pa.ArrowInvalid:
        source.seek(0)
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    _check_column(path, reader.schema, ids_field)
    shards: list[Shard] = []
    row = 0
    for batch in batches:
        shards.append(_list_shard(path, batch.column(reader.schema.names.index(ids_field)), row))
        row += batch.num_rows
    return [s for s in shards if len(s.ids)]


def _parquet(path: Path, ids_field: str) -> list[Shard]:
    file = ParquetFile(path, ids_field)
    _check_column(path, file.schema, ids_field)
    return [Shard(readable(path), g, g.starts, g.starts, first_row=g.row) for g in file.groups()]


def _check_column(path: Path, schema: Any, ids_field: str) -> None:
    import pyarrow as pa

    there = ", ".join(schema.names)
    check(
        ids_field in schema.names,
        f"data.ids_field={ids_field}: no such column in {readable(path)}; columns there: {there}",
    )
    kind = schema.field(ids_field).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    good = lists and pa.types.is_integer(kind.value_type)
    check(good, f"data.ids_field={ids_field}: holds {kind} in {readable(path)}; ids are lists of whole numbers")


def _list_shard(path: Path, column: Any, row: int) -> Shard:
    import pyarrow as pa

    nulls = column.null_count or column.flatten().null_count
    check(not nulls, f"{readable(path)}: holds nulls among its ids")
    ids = column.flatten().to_numpy(zero_copy_only=True)
    if pa.types.is_fixed_size_list(column.type):
        starts: Any = EvenStarts(len(column), column.type.list_size)
    else:
        offsets = column.offsets.to_numpy(zero_copy_only=True)
        starts = offsets - offsets[0] if len(offsets) and offsets[0] else offsets
    return Shard(readable(path), ids, starts, starts, first_row=row)

"""Folders of shards with an index.json: MosaicML MDS (mosaicml-streaming) and litdata's token chunks, read in place.

    mds       a shard is u32 count, u32 offsets [count + 1], its config, then samples: u32 sizes of the columns without
              a fixed size, then the columns in the order of their names
    litdata   a chunk is u32 count, u32 offsets [count + 1], then the ids of its items one after the other

Compressed shards are refused: how many ids one holds is known only when it is decompressed, so opening would read all.

References: streaming/base/format/mds of mosaicml-streaming 0.13, streaming/item_loader.py of litdata 0.2.76.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import numpy as np

from bottleneck.core.errors import UserError, check
from bottleneck.data.file_array import FileArray
from bottleneck.data.readers import readable

NUMPY_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TORCH_TYPES = {11: "uint8", 12: "int8", 13: "int16", 14: "int16", 15: "int32", 16: "int32", 17: "int64", 18: "int64",
               20: "uint16"}  # fmt: skip
SHAPE_BYTES = (1, 2, 4, 8)  # of a length in an MDS array of any shape


def kind_of(index: Path) -> str:
    """litdata or mds, by the content of an index.json. Raises UserError if it is neither."""
    content = _content(index)
    kind = "litdata" if "chunks" in content else "mds" if "shards" in content else None
    check(kind is not None, f"{readable(index)}: neither an index of litdata nor of MosaicML MDS")
    return str(kind)


def _content(index: Path) -> dict[str, Any]:
    try:
        found = json.loads(index.read_text())
    except ValueError as error:
        raise UserError(f"{readable(index)}: not JSON, or truncated: {error}") from error
    check(isinstance(found, dict), f"{readable(index)}: not an index of shards")
    return found


class OffsetStarts:
    """Starts of items from their offsets in bytes."""

    def __init__(self, offsets: FileArray, itemsize: int):
        self.offsets, self.itemsize, self.first = offsets, itemsize, int(offsets[0])

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: Any) -> Any:
        found = self.offsets[i]
        if isinstance(i, slice):
            return (found.astype(np.int64) - self.first) // self.itemsize
        return (int(found) - self.first) // self.itemsize


def litdata(index: Path) -> list[tuple[str, Any, Any]]:
    """(name, ids, starts of its items) of each chunk. Raises UserError for what holds no tokens, or is truncated."""
    where, content = readable(index), _content(index)
    config = content.get("config", {})
    loader, packed = config.get("item_loader"), config.get("compression")
    check(loader == "TokensLoader", f"{where}: made for litdata's {loader}; token ids are made for its TokensLoader")
    check(not packed, f"{where}: its chunks are compressed ({packed}); write them without compression")
    name, _, number = str((config.get("data_format") or [""])[0]).partition(":")
    types = dict(enumerate(NUMPY_TYPES)) if name == "no_header_numpy" else TORCH_TYPES
    kind = types.get(int(number)) if number.isdigit() and name.startswith("no_header") else None
    check(kind is not None, f"{where}: holds {name}:{number}; ids are whole numbers")
    dtype, found = np.dtype(str(kind)).newbyteorder("<"), []
    for chunk in content["chunks"]:
        path = index.parent / chunk["filename"]
        check(path.is_file(), f"{where}: {chunk['filename']} is missing")
        items = int(FileArray(path, "<u4", 0, 1)[0])
        begin = 4 * (items + 2)
        count = (path.stat().st_size - begin) // dtype.itemsize
        whole = count == int(chunk["dim"]) and items == int(chunk["chunk_size"])
        check(whole, f"{readable(path)}: has {count} ids, index.json says {chunk['dim']}; it was truncated")
        starts = OffsetStarts(FileArray(path, "<u4", 4, items + 1), dtype.itemsize)
        found.append((readable(path), FileArray(path, dtype, begin, count), starts))
    return found


class SampleIds:
    """The ids of one column of an MDS shard, sliced as one array. `starts` are those of its samples."""

    def __init__(self, path: Path, dtype: np.dtype, places: np.ndarray, counts: np.ndarray):
        self.dtype, self.raw, self.places = dtype, FileArray(path, np.uint8), places
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        pieces = [np.zeros(0, self.dtype)]
        row = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[row + 1]))
            at = int(self.places[row]) + (start - int(self.starts[row])) * self.dtype.itemsize
            pieces.append(self.raw[at : at + (end - start) * self.dtype.itemsize].view(self.dtype))
            start, row = end, row + 1
        return np.concatenate(pieces)

    def announce(self, start: int, stop: int) -> None:
        """Ask the system to read a part ahead."""
        rows = np.searchsorted(self.starts, [start, max(start, stop - 1)], side="right") - 1
        size = int(self.starts[rows[1] + 1] - self.starts[rows[1]]) * self.dtype.itemsize
        self.raw.announce(int(self.places[rows[0]]), int(self.places[rows[1]]) + size)


def mds(index: Path, ids_field: str) -> list[tuple[str, SampleIds]]:
    """(name, ids) of each shard. Raises UserError for compressed or truncated shards, and columns without ids."""
    where, found = readable(index), []
    for shard in _content(index)["shards"]:
        check(shard.get("format") == "mds", f"{where}: shards of format {shard.get('format')}; only mds is read")
        path = index.parent / shard["raw_data"]["basename"]
        packed = shard.get("compression")
        reason = f", only its compressed form ({packed}) is there; decompress it to {path.name}" if packed else ""
        check(path.is_file(), f"{where}: {path.name} is missing{reason}")
        same = path.stat().st_size == int(shard["raw_data"]["bytes"])
        check(same, f"{readable(path)}: has {path.stat().st_size} bytes, index.json says {shard['raw_data']['bytes']}")
        names = list(shard["column_names"])
        name = next((n for n in (ids_field, "tokens", names[0]) if n in names), names[0])
        known = name in (ids_field, "tokens") or len(names) == 1
        check(known, f"data.ids_field={ids_field}: no such column in {where}; columns there: {', '.join(names)}")
        found.append((readable(path), _column(path, shard, names.index(name), where)))
    return found


def _column(path: Path, shard: dict[str, Any], column: int, where: str) -> SampleIds:
    name, encoding = shard["column_names"][column], str(shard["column_encodings"][column])
    kind, _, rest = encoding.partition(":")
    # plain bytes hold int64, as LLM Foundry writes them
    dtype_name = "int64" if kind == "bytes" else rest.partition(":")[0]
    good = kind == "bytes" or (kind == "ndarray" and dtype_name in NUMPY_TYPES)
    check(good, f"data.ids_field={name}: holds {encoding} in {where}; ids are an ndarray of whole numbers, or bytes")
    dtype = np.dtype(dtype_name).newbyteorder("<")
    samples = int(shard["samples"])
    offsets = FileArray(path, "<u4", 4, samples + 1)[:].astype(np.int64)
    sizes = _sizes(path, shard["column_sizes"], offsets)
    before = 4 * sum(size is None for size in shard["column_sizes"]) + sizes[:, :column].sum(1)
    own = sizes[:, column]
    shaped = kind == "ndarray" and shard["column_sizes"][column] is None
    header = _header(own, dtype.itemsize) if shaped else np.zeros(samples, np.int64)
    check(
        bool(((own - header) % dtype.itemsize == 0).all()), f"{readable(path)}: {name} holds no whole number of {dtype}"
    )
    return SampleIds(path, dtype, offsets[:-1] + before + header, (own - header) // dtype.itemsize)


def _header(sizes: np.ndarray, itemsize: int) -> np.ndarray:
    """Bytes before the ids of arrays [N]: one, and the length in as few bytes as hold it."""
    found = np.zeros(len(sizes), np.int64)
    for width in SHAPE_BYTES[::-1]:
        count, rest = np.divmod(sizes - 1 - width, itemsize)
        found[(rest == 0) & (count >= (0 if width == 1 else 256 ** (width // 2))) & (count < 256**width)] = 1 + width
    return found


def _sizes(path: Path, fixed: list[Optional[int]], offsets: np.ndarray) -> np.ndarray:
    """Bytes of each column of each sample [samples, columns]."""
    free = [i for i, size in enumerate(fixed) if size is None]
    sizes = np.tile(np.array([size or 0 for size in fixed], np.int64), (len(offsets) - 1, 1))
    if len(free) == 1:
        sizes[:, free[0]] = np.diff(offsets) - 4 - sizes.sum(1)
    elif free:
        raw = FileArray(path, np.uint8)
        for row, at in zip(sizes, offsets[:-1].tolist()):
            row[free] = raw[at : at + 4 * len(free)].view("<u4")
    whole = bool((sizes.sum(1) + 4 * len(free) == np.diff(offsets)).all())
    check(
        whole and bool((sizes >= 0).all()),
        f"{readable(path)}: its samples have other sizes than it says; it is damaged",
    )
    return sizes

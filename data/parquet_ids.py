"""Ids in parquet files. They are compressed, so a row group is decoded when it is used, and only a few are kept."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from bottleneck.core.errors import check
from bottleneck.data.readers import readable

KEPT = 3 << 26  # bytes of decoded row groups that are kept, of all files together: 192 MiB
LARGEST = 1 << 27  # ids of a row group, at most: one has to fit in memory
AT_ONCE = 4096  # rows decoded at once


class ParquetFile:
    """A parquet file with a column of id lists."""

    def __init__(self, path: Path, ids_field: str):
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        self.path, self.ids_field = path, ids_field
        self.schema, self.metadata = file.schema_arrow, file.metadata
        file.close()

    def groups(self) -> list[ParquetGroup]:
        """The row groups that hold ids. Raises UserError for one that is too large to be decoded."""
        if self.metadata.num_row_groups == 0:
            return []
        first = self.metadata.row_group(0)
        leaves = (i for i in range(first.num_columns) if first.column(i).path_in_schema.split(".")[0] == self.ids_field)
        leaf, found, row = next(leaves), [], 0
        for i in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(i)
            column = group.column(leaf)
            known = column.statistics is not None and column.statistics.has_null_count
            # an empty list counts as a value and as a null
            count = column.num_values - column.statistics.null_count if known else None
            check(
                column.num_values <= LARGEST,
                f"{readable(self.path)}: row group {i} holds {column.num_values:,} ids and is decoded as a whole;"
                f" at most {LARGEST:,} are: write it with smaller row groups, with datasets.save_to_disk, or as .npy",
            )
            one = ParquetGroup(self, i, row, group.num_rows, count)
            row += group.num_rows
            found += [one] if len(one) else []
        return found

    def decode(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [N] of a row group, and where its rows begin [rows + 1]. Raises UserError for nulls."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        pieces, lengths = [np.zeros(0, np.uint8)], [np.zeros(1, np.int64)]
        with pq.ParquetFile(self.path, metadata=self.metadata) as file:
            for batch in file.iter_batches(AT_ONCE, row_groups=[group], columns=[self.ids_field]):
                column = batch.column(0)
                values = column.flatten()
                check(not (column.null_count or values.null_count), f"{readable(self.path)}: holds nulls among its ids")
                pieces.append(_compact(values.to_numpy()))
                lengths.append(pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64))
        return np.concatenate(pieces), np.cumsum(np.concatenate(lengths))


def _compact(ids: np.ndarray) -> np.ndarray:
    """In 4 bytes each if they fit."""
    limits = np.iinfo(np.int32)
    small = ids.dtype.itemsize <= 4 or not len(ids) or (ids.min() >= limits.min and ids.max() <= limits.max)
    return ids.astype(np.int32) if small and ids.dtype.itemsize > 4 else ids


class ParquetGroup:
    """The ids of one row group, sliced as an array. `starts` are those of its rows."""

    costly = True  # looking at one place means to decode the whole group

    def __init__(self, file: ParquetFile, group: int, row: int, rows: int, count: int | None):
        self.file, self.group, self.row = file, group, row
        self.starts = GroupStarts(self, rows)
        self.count = count if count is not None else len(file.decode(group)[0])
        self.dtype = np.dtype(np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        return decoded.of(self)[0][part]


class GroupStarts:
    """Where the rows of a row group begin, and its end."""

    def __init__(self, group: ParquetGroup, rows: int):
        self.group, self.rows = group, rows

    def __len__(self) -> int:
        return self.rows + 1

    def __getitem__(self, part: Any) -> Any:
        return decoded.of(self.group)[1][part]


class _Decoded:
    """The row groups that were used last."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[ParquetFile, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self.bytes = 0

    def of(self, group: ParquetGroup) -> tuple[np.ndarray, np.ndarray]:
        key = group.file, group.group
        if key not in self.kept:
            found = group.file.decode(group.group)
            where = f"{readable(group.file.path)}: row group {group.group}"
            says = f"{where} holds {len(found[0])} ids, the file's statistics say {len(group)}; it is damaged"
            check(len(found[0]) == len(group) and len(found[1]) == len(group.starts), says)
            self.bytes += sum(a.nbytes for a in found)
            while self.kept and self.bytes > KEPT:
                _, old = self.kept.popitem(last=False)
                self.bytes -= sum(a.nbytes for a in old)
            self.kept[key] = found
        self.kept.move_to_end(key)
        return self.kept[key]


decoded = _Decoded()

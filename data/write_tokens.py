"""Prepared tokens as files that other projects read: a Megatron pair or an .npy array for each part.

Documents keep their end-of-text, as with `--append-eod` of Megatron-LM's preprocessing. `data=tokens` reads both back.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import Callable

import numpy as np

from bottleneck.core.errors import UserError, check
from bottleneck.data.cache import PARTS, Corpus
from bottleneck.data.readers import readable
from bottleneck.data.token_formats import MEGATRON_DTYPES, MEGATRON_MAGIC

COPIED = 1 << 24  # ids written at once


def write_tokens(corpus: Corpus, kind: str, folder: Path) -> list[Path]:
    """Write both parts of a corpus into a new folder, which appears when it is complete.

    Args:
        kind: megatron or npy.

    Raises: UserError if the folder exists or cannot be written.
    """
    check(not folder.exists(), f"--out {readable(folder)}: exists already; give another folder")
    half = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        half.mkdir(parents=True)
        names = [WRITERS[kind](getattr(corpus, part), half / part, int(corpus.manifest["eos"])) for part in PARTS]
        os.replace(half, folder)
    except OSError as error:
        raise UserError(f"--out {readable(folder)}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return [folder / name for name in names]


def _npy(stream: np.ndarray, path: Path, eos: int) -> str:
    out = np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", stream.dtype, stream.shape)
    for at in range(0, len(stream), COPIED):
        out[at : at + COPIED] = stream[at : at + COPIED]
    out.flush()
    return path.with_suffix(".npy").name


def _megatron(stream: np.ndarray, path: Path, eos: int) -> str:
    dtype = np.dtype("<u2" if stream.dtype.itemsize == 2 else "<i4")  # Megatron has no uint32
    code = next(code for code, name in MEGATRON_DTYPES.items() if np.dtype(name) == dtype)
    ends = [np.zeros(0, np.int64)]
    name = f"{path.name}_document"
    with open(path.with_name(f"{name}.bin"), "wb") as f:
        for at in range(1, len(stream), COPIED):  # the end-of-text before the first document belongs to no document
            ids = np.asarray(stream[at : at + COPIED])
            f.write(ids.astype(dtype).tobytes())
            ends.append(np.flatnonzero(ids == eos) + at)
    starts = np.concatenate([[0], *ends])  # document boundaries, in ids of the file: one after each end-of-text
    sizes = np.diff(starts)
    check(len(sizes) > 0 and sizes.max() < 2**31, f"{name}: a document has more than 2^31 ids")
    with open(path.with_name(f"{name}.idx"), "wb") as f:
        f.write(MEGATRON_MAGIC + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1))
        f.write(sizes.astype("<i4").tobytes())
        f.write((starts[:-1] * dtype.itemsize).astype("<i8").tobytes())
        f.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    return f"{name}.bin"


WRITERS: dict[str, Callable[[np.ndarray, Path, int], str]] = {"megatron": _megatron, "npy": _npy}

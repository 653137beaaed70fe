"""Token files of other projects, written from their layouts alone: independent of the code that reads them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

CODES = {np.dtype("uint16"): 8, np.dtype("int32"): 4, np.dtype("int64"): 5}


def megatron(prefix: Path, docs, dtype="uint16", sequences_a_document=1) -> Path:
    """A Megatron pair. Sequences may be parts of documents."""
    dtype = np.dtype(dtype)
    sequences, starts = [], [0]
    for d in docs:
        parts = [np.asarray(d, dtype)]
        if sequences_a_document > 1:
            parts = np.array_split(parts[0], sequences_a_document)
        sequences += parts
        starts.append(len(sequences))
    sizes = np.array([len(s) for s in sequences], "<i4")
    pointers = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)]) * dtype.itemsize
    with open(f"{prefix}.bin", "wb") as f:
        for s in sequences:
            f.write(s.tobytes())
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(starts))
    tables = sizes.tobytes() + pointers.astype("<i8").tobytes() + np.array(starts, "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(head + tables)
    return Path(f"{prefix}.bin")


def llmc(path: Path, stream, dtype="uint16", magic=20240520) -> Path:
    """A shard of llm.c."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1 if dtype == "uint16" else 7, len(stream)
    path.write_bytes(header.tobytes() + np.array(stream, dtype).tobytes())
    return path


def pythia(folder: Path, rows: np.ndarray, shards: int = 21) -> str:
    """Pythia's layout: one index, and the tokens in shards document-000NN-of-00020.bin that are cut at any byte."""
    folder.mkdir()
    whole = megatron(folder / "document", rows)
    raw = whole.read_bytes()
    whole.unlink()
    for i, part in enumerate(np.array_split(np.frombuffer(raw, np.uint8), shards)):
        (folder / f"document-{i:05d}-of-{shards - 1:05d}.bin").write_bytes(part.tobytes())
    return str(folder)

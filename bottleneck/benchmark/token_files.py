"""Token files to batches: time and memory to open very many tokens, and tokens/s in each order from a cold cache."""

from __future__ import annotations

import functools
import os
import resource
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from torchdata.stateful_dataloader import StatefulDataLoader

from bottleneck.backbone.model import load_tokenizer
from bottleneck.benchmark.table import Row, row, timed
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.data.module import TextData
from bottleneck.data.prepare import prepare

ROW = 2049  # ids of a row, as in Pythia's files
DOCUMENT = 500  # ids of a document, about
READ = 20_000_000  # most tokens of one timed pass
ORDERS = {"bin": ("shuffled", "chunks", "source"), "arrow": ("shuffled", "chunks"), "parquet": ("chunks",)}
BATCH = 256  # sequences in a step
BLOCKS = (512, 2048)  # tokens in a sequence


def peak_mib() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sizes(tokens: int) -> list[str]:
    """Cases of `start`."""
    return [f"{tokens:.0e} tokens, {layout}" for layout in ("1,000 llm.c shards", "one Megatron index of rows")]


def start(case: str, tokens: int, backbone: BackboneConfig) -> list[Row]:
    """Measure opening a sparse source, with one whole epoch as the budget, up to the first batch."""
    tokenizer = load_tokenizer(backbone)
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), "Megatron" in case
        (sparse_megatron if rows else sparse_llmc)(folder, tokens)
        validation = str(folder / "held.npy")
        np.save(validation, np.ones((4, ROW), np.uint16) if rows else np.ones(9000, np.uint16))
        cfg = DataConfig(
            tokens=str(folder / ("m.bin" if rows else "x_*.bin")),
            validation_files=validation,
            block_size=ROW - 1,
            packing="rows" if rows else "join",
        )

        def first_batch() -> Any:
            steps = tokens // ROW // BATCH - 2
            return TextData(prepare(cfg, tokenizer), ROW - 1, BATCH, steps, 8, 0, None)._steps(0, 1)[steps - 1]

        seconds, _ = timed(first_batch)
    return [row("start", case, "data=tokens", [seconds], peak_mib=peak_mib())]


def sparse_llmc(folder: Path, tokens: int, shards: int = 1000) -> None:
    """llm.c shards of zeros that take no room on the disk."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, tokens // shards
    for i in range(shards):
        with open(folder / f"x_{i:06d}.bin", "wb") as f:
            f.write(header.tobytes())
            f.truncate(1024 + 2 * (tokens // shards))


def sparse_megatron(folder: Path, tokens: int) -> None:
    """A Megatron pair of rows; the index is whole, the tokens take no room."""
    count = tokens // ROW
    with open(folder / "m.bin", "wb") as f:
        f.truncate(2 * ROW * count)
    with open(folder / "m.idx", "wb") as f:
        f.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1))
        for first in range(0, count, 1 << 20):
            np.full(min(1 << 20, count - first), ROW, "<i4").tofile(f)
        for step, last in ((2 * ROW, count), (1, count + 1)):
            for first in range(0, last, 1 << 20):
                (np.arange(first, min(first + (1 << 20), last), dtype="<i8") * step).tofile(f)


def write_shards(folder: Path, shards: int, tokens: int, eos: int, kind: str) -> None:
    """Shards of random ids in documents: nanoGPT's .bin, or .arrow or .parquet with a list for each document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    for i in range(shards):
        ids = rng.integers(1, 200, tokens).astype(np.uint16)
        ids[DOCUMENT - 1 :: DOCUMENT] = eos
        path = folder / f"x_{i:06d}.{kind}"
        lists = pa.ListArray.from_arrays(np.arange(0, len(ids) + 1, DOCUMENT, dtype=np.int32), ids.astype(np.int32))
        table = pa.table({"input_ids": lists})
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=1000)
        elif kind == "arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=1000)
        else:
            ids.tofile(path)
        with open(path, "rb") as f:
            os.fsync(f.fileno())


def forget(folder: Path) -> None:
    """Drop files from the system's cache, where that is possible."""
    for path in folder.iterdir():
        with open(path, "rb") as f:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(order: str, folder: Path, backbone: BackboneConfig, repeats: int) -> list[Row]:
    """Measure the training loader over the files of a folder in one order, from a cold cache."""
    return [one for block in BLOCKS for one in _read(order, block, folder, backbone, repeats)]


def _read(order: str, block: int, folder: Path, backbone: BackboneConfig, repeats: int) -> list[Row]:
    cfg = DataConfig(tokens=str(folder), block_size=block, order=order)  # type: ignore[arg-type]
    data = prepare(cfg, load_tokenizer(backbone))
    available = len(data.order(0, block)) // BATCH
    steps = min(READ // block // BATCH, available)
    if steps == 0:
        return []
    text = TextData(data, block, BATCH, steps, 1, 0, None)
    seconds, processor = [], []
    for _ in range(repeats):
        forget(folder)
        before = time.process_time()
        seconds.append(timed(functools.partial(_pass, text))[0])
        processor.append(time.process_time() - before)
    tokens = steps * BATCH * block
    note = f"{tokens / np.median(processor) / 1e6:.1f}M tokens per second of CPU time"
    count = len(list(folder.iterdir()))
    what = f"{count} {next(folder.iterdir()).suffix} shards, {BATCH} x {block}, {order}, {steps} steps"
    return [row("read", what, "data=tokens", seconds, tokens, "tokens", peak_mib=peak_mib(), note=note)]


def _pass(data: TextData) -> None:
    for _ in StatefulDataLoader(data._steps(0, 1), batch_size=None):
        pass

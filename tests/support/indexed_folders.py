"""Write tests/assets/indexed: folders of token ids by mosaicml-streaming and litdata themselves.

python tests/support/indexed_folders.py FOLDER        needs mosaicml-streaming (0.13.0 was used) and litdata (0.2.76)

They are kept as files because mosaicml-streaming 0.13 needs transformers < 5 and numpy < 2.2, so it cannot be installed
beside this project. The ids follow from `documents`, so the test does not take them from the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

LENGTHS = (5, 300, 17, 255, 256, 40, 1, 90, 33)
ROWS = (40, 17)


def documents() -> list[np.ndarray]:
    """Documents of ids below 300, without end-of-text (0)."""
    rng = np.random.default_rng(7)
    return [rng.integers(1, 300, n) for n in LENGTHS]


def rows() -> np.ndarray:
    return np.random.default_rng(8).integers(1, 300, ROWS)


def item(i: int):
    import torch

    return torch.tensor(documents()[i], dtype=torch.int32)


def write(folder: Path) -> None:
    from litdata import TokensLoader, optimize
    from streaming import MDSWriter

    def mds(name: str, columns: dict[str, str], samples: list[dict], **more) -> None:
        with MDSWriter(out=str(folder / name), columns=columns, **more) as writer:
            for sample in samples:
                writer.write(sample)

    docs = documents()
    mds("rows", {"input_ids": f"ndarray:uint16:{ROWS[1]}"}, [{"input_ids": r.astype(np.uint16)} for r in rows()])
    columns = {"id": "int", "name": "str", "tokens": "ndarray:int32"}
    samples = [{"id": i, "name": "x" * i, "tokens": d.astype(np.int32)} for i, d in enumerate(docs)]
    mds("documents", columns, samples, size_limit=2000)
    mds("bytes", {"tokens": "bytes"}, [{"tokens": d.astype(np.int64).tobytes()} for d in docs])
    few = [{"tokens": d.astype(np.int64).tobytes()} for d in docs[:2]]
    mds("compressed", {"tokens": "bytes"}, few, compression="zstd")
    optimize(fn=item, inputs=list(range(len(docs))), output_dir=str(folder / "litdata"), num_workers=1, chunk_size=400,
             item_loader=TokensLoader())  # fmt: skip


if __name__ == "__main__":
    write(Path(sys.argv[1]))

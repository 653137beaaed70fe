"""Trained heads as safetensors files."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from safetensors.torch import save

from bottleneck.core.files import write_atomic
from bottleneck.heads.bank import HeadBank


def save_heads(bank: HeadBank, folder: Path, metadata: dict[str, str]) -> None:
    """Write `<key>.safetensors` with the tensors of each head: A [V, R] and B [R, D] if low-rank.

    Equal heads give equal files.

    Raises: UserError on a full disk.
    """
    for key in bank.keys:
        tensors = {name: t.cpu().contiguous() for name, t in bank.tensors(key).items()}
        about = metadata | {"rank": key.rank, "lr": key.lr, "seed": key.seed} | key.facts
        # one metadata entry: safetensors writes several in random order
        content = save(tensors, metadata={"bottleneck": json.dumps(about, sort_keys=True)})
        write_atomic(folder / f"{key.name}.safetensors", functools.partial(Path.write_bytes, data=content))

"""A folder of prepared tokens: its content, its verification, and opening one that was made elsewhere.

`train.bin` and `validation.bin` hold one stream of token ids each: end-of-text, document, end-of-text, document …,
end-of-text. `manifest.json` describes them. Blocks are cut from the stream when it is read. Sizes and checksums are
verified whenever a folder is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from bottleneck.config.schema import DataConfig
from bottleneck.core.errors import check
from bottleneck.data.readers import local_path, readable

FORMAT = 1  # version of the folder; another one is refused
PARTS = ("train", "validation")


@dataclass(frozen=True)
class ValidationPart:
    """The validation text of one source: ids [M], and the ids from one block to the next."""

    name: str
    tokens: np.ndarray
    stride: int
    bytes: int

    @property
    def blocks(self) -> int:
        """Blocks that predict every token once."""
        return math.ceil((len(self.tokens) - 1) / self.stride)


@dataclass
class Corpus:
    """Prepared tokens. `train` and `validation` are read-only arrays on disk.

    Attributes:
        seconds: how long the preparation took; None if the tokens were there already.
    """

    name: str
    folder: Path
    manifest: dict[str, Any]
    seconds: Optional[float] = None
    own_epochs = False  # whether its order repeats what has to be repeated

    def __post_init__(self) -> None:
        dtype = np.dtype(self.manifest["dtype"])
        self.train: np.ndarray = np.memmap(self.folder / "train.bin", dtype=dtype, mode="r")
        self.validation: np.ndarray = np.memmap(self.folder / "validation.bin", dtype=dtype, mode="r")

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens, wherever they are stored."""
        parts = [f"{p}:{self.manifest[p]['tokens']}:{self.manifest[p]['crc32']:08x}" for p in PARTS]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the validation documents, which bits per byte are relative to."""
        return self.manifest["validation"]["bytes"]

    def validation_parts(self, block: int) -> list[ValidationPart]:
        """The validation text, as one part for each source."""
        return [ValidationPart(self.name, self.validation, block, self.validation_bytes)]

    def order(self, seed: int, block: int) -> Any:
        """The order of the training blocks: `order[:n]` are the first n."""
        return np.random.default_rng(seed).permutation((len(self.train) - 1) // block)

    def check_budget(self, order: Any, needed: int, block: int, epochs: int) -> None:
        """Raises UserError if an order is shorter than one epoch of `needed` blocks."""
        once = "" if epochs == 1 else f" for each of {epochs} epochs"
        have = len(order)
        check(
            needed <= have,
            f"tokens: {needed * block} are requested{once}, {self.name} has {have * block} training tokens in"
            f" blocks of {block}; give fewer, a smaller data.block_size, more text,"
            " or read it again with a larger data.epochs",
        )

    def read(self, indices: np.ndarray, block: int) -> np.ndarray:
        """Ids [len(indices), T + 1] of some blocks."""
        starts = indices[:, None] * block + np.arange(block + 1)
        return self.train[starts].astype(np.int64)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `find_fault` finds whole."""
    return json.loads((folder / "manifest.json").read_text())


def find_fault(folder: Path) -> Optional[str]:
    """What is wrong with a folder of prepared tokens, or None."""
    try:
        manifest = read_manifest(folder)
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for part in PARTS:
            path = folder / f"{part}.bin"
            about = manifest[part]
            if path.stat().st_size != about["tokens"] * np.dtype(manifest["dtype"]).itemsize:
                return f"{part}.bin: size"
            if _crc32(path) != about["crc32"]:
                return f"{part}.bin: checksum"
            if about["tokens"] < 2 or about["bytes"] < 1:
                return f"{part}.bin: no tokens"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


# A text on which tokenizers differ: capitals, digits, runs of white space, other scripts, what NFC changes, code.
PROBE = (
    "It's 12,345.60 — don't\tSTOP…\n\n    def f(x):  return {x: 'é' + 'e\u0301'}\r\n"
    " Καλημέρα, мир! 日本語 한국어 🙂 ﬁ\u00a0x <|endoftext|>  "
)


def tokenizer_hash(tokenizer: Any) -> str:
    """Identity of a tokenizer by what it does: its vocabulary, and the ids of a text on which tokenizers differ.

    Two things are not part of it: how the tokenizer is stored, which changes between versions of Transformers; and its
    end-of-text, which versions of Transformers read differently from one GGUF file (1 in 5.17, 2 in 5.23). Prepared
    tokens name their end-of-text in the manifest.
    """
    what = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE, add_special_tokens=False)["input_ids"]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def open_prepared(cfg: DataConfig, tokenizer: Any) -> Corpus:
    """The tokens in the folder `data.prepared`, which was made earlier, perhaps on another machine.

    Raises: UserError if it is not such a folder, is damaged, or was made with another tokenizer.
    """
    where = f"data.prepared={readable(cfg.prepared)}"
    given = bool(str(cfg.prepared).strip())
    check(given, "data.prepared: is empty; give the folder that python -m bottleneck.data.prepare printed")
    folder = local_path(cfg.prepared)
    check(
        (folder / "manifest.json").is_file(),
        f"{where}: not a folder of prepared tokens (no manifest.json);"
        " give the folder that python -m bottleneck.data.prepare printed, or a copy",
    )
    fault = find_fault(folder)
    check(fault is None, f"{where}: damaged ({fault}); copy it again")
    manifest = read_manifest(folder)
    made, own = manifest.get("tokenizer"), tokenizer_hash(tokenizer)
    check(
        made == own,
        f"{where}: its tokenizer ({made}) is not the backbone's ({own}); prepare the text with this backbone",
    )
    return Corpus(cfg.name or manifest.get("name") or readable(folder.name), folder, manifest)

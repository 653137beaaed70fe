"""A folder of prepared tokens: what it holds, whether it is whole, and opening one that was made elsewhere.

It has `train.bin` and `validation.bin` (one long stream of token ids each: end-of-text, document, end-of-text, document …,
end-of-text) and `manifest.json`. Blocks are cut from the stream when it is read. Sizes and checksums are compared
whenever a folder is opened.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from bottleneck.config.schema import DataConfig
from bottleneck.core.errors import check

FORMAT = 1  # of the folder; a change makes old ones unknown
PARTS = ("train", "validation")


@dataclass
class Corpus:
    """Prepared tokens. `train` and `validation` are read-only arrays on disk."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    seconds: Optional[float] = None  # that preparing took; None where the tokens were there already

    def __post_init__(self):
        dtype = np.dtype(self.manifest["dtype"])
        self.train = np.memmap(self.folder / "train.bin", dtype=dtype, mode="r")
        self.validation = np.memmap(self.folder / "validation.bin", dtype=dtype, mode="r")

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens themselves, wherever they are stored."""
        parts = [f"{p}:{self.manifest[p]['tokens']}:{self.manifest[p]['crc32']:08x}" for p in PARTS]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the validation documents: the unit of bits per byte."""
        return self.manifest["validation"]["bytes"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `verify` finds whole."""
    return json.loads((folder / "manifest.json").read_text())


def verify(folder: Path) -> Optional[str]:
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


# Tokenizers that differ differ here: capitals, digits, runs of white space, other scripts, what NFC changes, code.
PROBE = "It's 12,345.60 — don't\tSTOP…\n\n    def f(x):  return {x: 'é' + 'e\u0301'}\r\n Καλημέρα, мир! 日本語 한국어 🙂 ﬁ\u00a0x <|endoftext|>  "


def tokenizer_hash(tokenizer: Any) -> str:
    """Identity of a tokenizer by what it does: its vocabulary, and the ids of a text on which tokenizers differ.

    Not by how it is stored, which changes from one version of Transformers to the next, nor by its end of text, which
    they have read differently from one GGUF file (1 in 5.17, 2 in 5.23); prepared tokens name theirs in the manifest.
    """
    what = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE, add_special_tokens=False)["input_ids"]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def open_prepared(cfg: DataConfig, tokenizer: Any) -> Corpus:
    """The tokens in the folder `data.prepared`, made earlier and perhaps on another machine.

    Raises: UserError where the folder is not one, is damaged, or was made with another tokenizer.
    """
    folder = Path(cfg.prepared).expanduser()
    where = f"data.prepared={cfg.prepared}"
    check(
        (folder / "manifest.json").is_file(),
        f"{where}: not a folder of prepared tokens (no manifest.json); give the folder that python -m data.prepare printed, or a copy",
    )
    fault = verify(folder)
    check(fault is None, f"{where}: damaged ({fault}); copy it again")
    manifest = read_manifest(folder)
    same = manifest.get("tokenizer") == tokenizer_hash(tokenizer)
    check(
        same,
        f"{where}: its tokenizer ({manifest.get('tokenizer')}) is not the backbone's ({tokenizer_hash(tokenizer)}); prepare the text with this backbone",
    )
    return Corpus(cfg.name or manifest.get("name") or folder.name, folder, manifest)

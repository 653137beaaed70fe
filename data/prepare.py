"""Documents to a cache of tokens: split by document, tokenise, pack, write, verify.

A cache is a folder with `train.bin` and `validation.bin` (one long stream of token ids each: end-of-text, document,
end-of-text, document …, end-of-text) and `manifest.json`. Blocks are cut from the stream when it is read. The folder
is written under another name and renamed when it is whole; sizes and checksums are compared whenever it is opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional

import numpy as np
from filelock import FileLock

from bottleneck.config import DataConfig
from bottleneck.errors import UserError, check
from data.sources import Source

log = logging.getLogger(__name__)
FORMAT = 1  # of the cache; a change makes old caches unknown
FIRST_DOCUMENTS = 200  # among these at least one is held out, however small the text
BATCH_CHARS = 4 << 20  # text given to the tokenizer at once: bounds memory


@dataclass
class Corpus:
    """Prepared tokens. `train` and `validation` are read-only arrays on disk."""

    name: str
    folder: Path
    manifest: dict[str, Any]

    def __post_init__(self):
        dtype = np.dtype(self.manifest["dtype"])
        self.train = np.memmap(self.folder / "train.bin", dtype=dtype, mode="r")
        self.validation = np.memmap(self.folder / "validation.bin", dtype=dtype, mode="r")

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens themselves, wherever they are stored."""
        parts = [f"{p}:{self.manifest[p]['tokens']}:{self.manifest[p]['crc32']:08x}" for p in ("train", "validation")]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the validation documents: the unit of bits per byte."""
        return self.manifest["validation"]["bytes"]


def prepare(cfg: DataConfig, tokenizer: Any) -> Corpus:
    """Open the cache of this text and tokenizer, making it first where it is missing or damaged.

    Raises: UserError for missing or unreadable files, text without enough documents, or a full disk.
    """
    source = Source(cfg)
    key = _key(cfg, source, tokenizer)
    root = Path(cfg.cache_dir).expanduser()
    label = "".join(ch if ch.isalnum() else "-" for ch in source.name)[:40]
    folder = root / f"{label}-{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):  # several processes may start at once
            fault = verify(folder)
            if fault:
                if folder.exists():
                    log.warning("prepared tokens in %s are damaged (%s): preparing again", folder, fault)
                    shutil.rmtree(folder)
                _build(cfg, source, tokenizer, folder)
    except OSError as error:
        raise UserError(f"data.cache_dir={cfg.cache_dir}: cannot write prepared tokens there: {error}") from error
    return Corpus(source.name, folder, json.loads((folder / "manifest.json").read_text()))


def verify(folder: Path) -> Optional[str]:
    """What is wrong with a cache folder, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for part in ("train", "validation"):
            path = folder / f"{part}.bin"
            if path.stat().st_size != manifest[part]["tokens"] * np.dtype(manifest["dtype"]).itemsize:
                return f"{part}.bin: size"
            if _crc32(path) != manifest[part]["crc32"]:
                return f"{part}.bin: checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


def tokenizer_hash(tokenizer: Any) -> str:
    """Identity of a tokenizer: all of it where it is a fast one, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__}{tokenizer.eos_token_id}{text}".encode()).hexdigest()[:16]


def _key(cfg: DataConfig, source: Source, tokenizer: Any) -> str:
    what = [FORMAT, source.describe(), tokenizer_hash(tokenizer), cfg.block_size]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def encoder(tokenizer: Any) -> Callable[[list[str]], list]:
    """Texts to lists of ids without special tokens; fast tokenizers use all cores."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "encode_batch_fast"):
        return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return lambda texts: tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def document_hash(text: str, seed: int) -> int:
    """64 bits of a document and a seed: decides which side of the split it is on, copies of it alike."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "big")


class _Split:
    """Deals documents of one stream to train or validation by their hash."""

    def __init__(self, cfg: DataConfig):
        self.seed, self.limit = cfg.seed, int(cfg.validation_fraction * 2**64)

    def __call__(self, documents: Iterable[str]) -> Iterator[tuple[bool, str]]:
        """Yields (held out?, document)."""
        stream = iter(documents)
        first = [d for d, _ in zip(stream, range(FIRST_DOCUMENTS))]
        hashes = {document_hash(d, self.seed) for d in first}
        check(len(hashes) > 0, "data: there is no document in the text, or only empty ones")
        check(len(hashes) > 1, "data: the text is a single document, so none can be held out for validation; give data.validation_files, or data.text_unit=paragraph for plain text")
        forced = min(hashes)  # a text of few documents still has one for validation

        def held(document: str) -> bool:
            value = document_hash(document, self.seed)
            return value < self.limit or value == forced

        # held-out documents first, so that a small max_tokens does not end the reading before there is one
        for d in sorted(first, key=lambda d: not held(d)):
            yield held(d), d
        for d in stream:
            yield held(d), d


class _Writer:
    """Appends documents to one stream of tokens on disk."""

    def __init__(self, path: Path, dtype: np.dtype, eos: int, encode: Callable, limit: Optional[int]):
        self.file = open(path, "wb")
        self.path, self.dtype, self.eos, self.encode, self.limit = path, dtype, eos, encode, limit
        self.tokens = self.documents = self.bytes = self.crc = self._chars = 0
        self._texts: list[str] = []
        self._write(np.array([eos], dtype=dtype))

    @property
    def full(self) -> bool:
        return self.limit is not None and self.tokens > self.limit

    def add(self, text: str) -> None:
        if self.full:
            return
        self._texts.append(text)
        self._chars += len(text)
        # near the limit a short batch, so that a small limit is not overshot by far
        if self._chars >= (BATCH_CHARS if self.limit is None else min(BATCH_CHARS, max(4096, self.limit))):
            self.flush()

    def flush(self) -> None:
        for text, ids in zip(self._texts, self.encode(self._texts) if self._texts else []):
            if self.full:
                break
            self._write(np.array([*ids, self.eos], dtype=self.dtype))
            self.documents += 1
            self.bytes += len(text.encode("utf-8", "surrogatepass"))
        self._texts, self._chars = [], 0

    def _write(self, ids: np.ndarray) -> None:
        raw = ids.tobytes()
        self.file.write(raw)
        self.crc = zlib.crc32(raw, self.crc)
        self.tokens += len(ids)

    def close(self) -> dict[str, int]:
        self.flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "crc32": self.crc}


def _build(cfg: DataConfig, source: Source, tokenizer: Any, folder: Path) -> None:
    half = folder.with_name(folder.name + ".part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    eos = tokenizer.eos_token_id
    dtype = np.dtype("uint16" if max(len(tokenizer), eos + 1) <= 2**16 else "uint32")
    encode = encoder(tokenizer)
    train = _Writer(half / "train.bin", dtype, eos, encode, cfg.max_tokens)
    validation = _Writer(half / "validation.bin", dtype, eos, encode, cfg.validation_tokens)
    log.info("preparing %s (once; kept in %s)", source.name, folder.parent)
    start = said = time.monotonic()
    try:
        if source.has_validation:
            held: set[int] = set()
            for d in source.validation():
                held.add(document_hash(d, 0))
                validation.add(d)
                if validation.full:  # what is beyond the limit is not validated on, so need not be read
                    break
            # a training document that is also a validation document is not trained on
            dealt: Iterable[tuple[bool, str]] = ((False, d) for d in source.train() if document_hash(d, 0) not in held)
        else:
            dealt = _Split(cfg)(source.train())
        for held_out, d in dealt:
            (validation if held_out else train).add(d)
            if time.monotonic() - said > 5:
                said = time.monotonic()
                log.info("  %.1fM tokens, %.2fM tokens/s", train.tokens / 1e6, train.tokens / 1e6 / (said - start))
            if train.full:
                break
        parts = {"train": train.close(), "validation": validation.close()}
        for part in parts:
            check(parts[part]["documents"] > 0, f"data: no {part} documents in {source.name}")
        manifest = {"format": FORMAT, "name": source.name, "dtype": dtype.name, "eos": eos, "block_size": cfg.block_size,
                    "tokenizer": tokenizer_hash(tokenizer), "source": source.describe(), **parts}  # fmt: skip
        (half / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.replace(half, folder)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    log.info("prepared %s: %.2fM training tokens, %.3fM validation tokens in %.0f s",
             source.name, train.tokens / 1e6, validation.tokens / 1e6, time.monotonic() - start)  # fmt: skip

"""Documents to a cache of tokens: split by document, tokenise, write. What a cache folder holds: data/cache.py.

    python -m data.prepare backbone=… data=…     prepares only, for a run elsewhere: copy the folder that it prints, and
    python train.py backbone=… data=prepared data.prepared=FOLDER

The folder is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

import numpy as np
from filelock import FileLock

from bottleneck.backbone.model import load_tokenizer
from bottleneck.cli import one_line_errors as cli
from bottleneck.config.checks import as_list, check_config
from bottleneck.config.schema import DataConfig
from bottleneck.core.errors import Parser, UserError, check
from bottleneck.data.cache import FORMAT, PARTS, Corpus, open_prepared, read_manifest, tokenizer_hash, verify
from bottleneck.data.encode import Writer, background, encoder
from bottleneck.data.sources import Source

log = logging.getLogger(__name__)
FIRST_DOCUMENTS = 200  # among these at least one is held out, however small the text


def prepare(cfg: DataConfig, tokenizer: Any) -> Corpus:
    """Open the cache of this text and tokenizer, making it first where it is missing or damaged; or the folder `data.prepared`.

    Raises: UserError for missing or unreadable files, text without enough documents, a full disk, or a folder
        `data.prepared` that is damaged or of another tokenizer.
    """
    if cfg.prepared is not None:
        return open_prepared(cfg, tokenizer)
    source = Source(cfg)
    key = _key(cfg, source, tokenizer)
    root = Path(cfg.cache_dir).expanduser()
    label = "".join(ch if ch.isalnum() else "-" for ch in source.name).strip("-")[:40] or "text"
    folder = root / f"{label}-{key}"
    seconds = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):  # several processes may start at once
            fault = verify(folder)
            if fault:
                if folder.exists():
                    log.warning("prepared tokens in %s are damaged (%s): preparing again", folder, fault)
                    shutil.rmtree(folder)
                start = time.monotonic()
                _build(cfg, source, tokenizer, folder)
                seconds = time.monotonic() - start
    except OSError as error:
        raise UserError(f"data.cache_dir={cfg.cache_dir}: cannot write prepared tokens there: {error}") from error
    return Corpus(source.name, folder, read_manifest(folder), seconds)


def _key(cfg: DataConfig, source: Source, tokenizer: Any) -> str:
    what = [FORMAT, source.describe(), tokenizer_hash(tokenizer), tokenizer.eos_token_id, cfg.block_size]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def document_hash(text: str, seed: int) -> int:
    """64 bits of a document and a seed: decides which side of the split it is on, copies of it alike."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "big")


class _Split:
    """Deals documents of one stream to train or validation by their hash."""

    def __init__(self, cfg: DataConfig):
        self.seed, self.limit = cfg.seed, int(cfg.validation_fraction * 2**64)
        self.paragraphs = cfg.text_unit == "paragraph" or (
            cfg.text_unit == "auto" and len(as_list(cfg.files or [])) == 1
        )

    def __call__(self, documents: Iterable[str]) -> Iterator[tuple[bool, str]]:
        """Yields (held out?, document)."""
        stream = iter(documents)
        first: list[tuple[int, bytes]] = []  # packed, since documents may be long
        for d, _ in zip(stream, range(FIRST_DOCUMENTS)):
            first.append((document_hash(d, self.seed), zlib.compress(d.encode("utf-8", "surrogatepass"), 1)))
        hashes = {value for value, _ in first}
        check(len(hashes) > 0, "data: there is no document in the text, or only empty ones")
        check(
            len(hashes) > 1,
            "data: the text is a single document, so none can be held out for validation; give data.validation_files{'' if self.paragraphs else ', or data.text_unit=paragraph for plain text'}",
        )
        forced = min(hashes)  # a text of few documents still has one for validation

        def held(value: int) -> bool:
            return value < self.limit or value == forced

        # held-out documents first, so that a small max_tokens does not end the reading before there is one
        for value, packed in sorted(first, key=lambda f: not held(f[0])):
            yield held(value), zlib.decompress(packed).decode("utf-8", "surrogatepass")
        first.clear()
        for d in stream:
            yield held(document_hash(d, self.seed)), d


def _build(cfg: DataConfig, source: Source, tokenizer: Any, folder: Path) -> None:
    half = folder.with_name(folder.name + ".part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    eos = tokenizer.eos_token_id
    dtype = np.dtype("uint16" if max(len(tokenizer), eos + 1) <= 2**16 else "uint32")
    encode, pool = encoder(tokenizer, dtype), background(tokenizer)
    train = Writer(half / "train.bin", dtype, eos, encode, cfg.max_tokens, pool)
    validation = Writer(half / "validation.bin", dtype, eos, encode, cfg.validation_tokens, pool)
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
        manifest = {
            "format": FORMAT,
            "name": source.name,
            "dtype": dtype.name,
            "eos": eos,
            "block_size": cfg.block_size,
            "tokenizer": tokenizer_hash(tokenizer),
            "source": source.describe(),
            **parts,
        }
        (half / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.replace(half, folder)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    log.info(
        "prepared %s: %s training tokens, %s validation tokens in %.0f s",
        source.name,
        f"{train.tokens:,}",
        f"{validation.tokens:,}",
        time.monotonic() - start,
    )


def command(overrides: list[str]) -> Corpus:
    """`python -m data.prepare OVERRIDES`: the tokens of the run that `python train.py OVERRIDES` would be; no weights are loaded."""
    c = check_config(cli.composed(overrides))
    corpus = prepare(c.data, load_tokenizer(c.backbone))
    counts = {part: int(corpus.manifest[part]["tokens"]) for part in PARTS}
    took = (
        "already there"
        if corpus.seconds is None
        else f"{corpus.seconds:.1f} s, {sum(counts.values()) / corpus.seconds:,.0f} tokens/s"
    )
    print(
        f"{corpus.folder.resolve()}\n{corpus.name}: {counts['train']:,} training tokens, {counts['validation']:,} validation tokens; {took}"
    )
    return corpus


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, told in one line."""
    parser = Parser(
        prog="python -m data.prepare", description="Prepare the tokens of a run, without weights or training."
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py: backbone=… data=… data.files=…"
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return cli.one_line_errors(
        lambda: command(parser.parse_args(argv).overrides),
        after_interrupt="nothing is kept; the same command starts again",
    )


if __name__ == "__main__":
    sys.exit(main())

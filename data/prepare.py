"""Documents to a cache of tokens: split by document, tokenise, write. data/cache.py describes the cache folder.

    python -m bottleneck.data.prepare backbone=… data=…     prepares only and prints the folder, which can be copied
    python train.py backbone=… data=prepared data.prepared=FOLDER            for this
    python -m bottleneck.data.prepare … --write megatron    also writes a Megatron pair, or .npy, for other projects

The folder is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

import numpy as np
from filelock import FileLock

from bottleneck.backbone.model import load_tokenizer
from bottleneck.cli import one_line_errors as cli
from bottleneck.config.checks import check_config
from bottleneck.config.schema import DataConfig
from bottleneck.core.errors import Parser, UserError, check
from bottleneck.data.cache import FORMAT, PARTS, Corpus, find_fault, open_prepared, read_manifest, tokenizer_hash
from bottleneck.data.encode import Writer, background, encoder
from bottleneck.data.held_out import HashSplit, document_hash
from bottleneck.data.mix import MixCorpus, sources_of
from bottleneck.data.readers import local_path, readable
from bottleneck.data.sources import Source
from bottleneck.data.stream_pieces import StreamedText
from bottleneck.data.token_corpus import TokenCorpus
from bottleneck.data.write_tokens import WRITERS, write_tokens

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 5.0  # between two lines about the progress


def prepare(cfg: DataConfig, tokenizer: Any) -> Corpus:
    """The tokens of this text: the folder `data.prepared`, the files `data.tokens`, the sources of `data.mix`, or
    the cache, built if missing.

    A complete cache is opened without its lock, so it may be shared and read-only.

    Raises: UserError for missing or unreadable files, text without enough documents, a full disk or exhausted memory,
        or a folder `data.prepared` that is damaged or was made with another tokenizer.
    """
    if cfg.prepared is not None:
        return open_prepared(cfg, tokenizer)
    if cfg.tokens is not None:
        return TokenCorpus(cfg, tokenizer)
    if cfg.mix:
        return MixCorpus(cfg, {name: prepare(own, tokenizer) for name, own in sources_of(cfg).items()})
    source = Source(cfg)
    key = _key(cfg, source, tokenizer)
    root = local_path(cfg.cache_dir)
    label = "".join(ch if ch.isalnum() else "-" for ch in source.name).strip("-")[:40] or "text"
    folder = root / f"{label}-{key}"
    seconds = None
    try:
        if find_fault(folder) is not None:
            root.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            streamed = _streamed(source, tokenizer, folder) if cfg.dataset and cfg.streaming else None
            if streamed is not None and not folder.exists():
                log.info("preparing %s, with all processes that wait for it", source.name)
                with background(tokenizer) as pool:
                    streamed.make(pool)
            with FileLock(root / f"{key}.lock"):  # several processes may start at once
                built = _build_missing(cfg, source, tokenizer, folder, streamed)
                if streamed is not None:
                    streamed.remove()
            seconds = time.monotonic() - start if built else None
    except OSError as error:
        where = f"data.cache_dir={readable(cfg.cache_dir)}"
        raise UserError(f"{where}: cannot write prepared tokens there: {error}") from error
    except MemoryError as error:
        raise UserError(
            f"data: memory ran out while {source.name} was prepared ({error or 'out of memory'})"
        ) from error
    return Corpus(source.name, folder, read_manifest(folder), seconds)


def _build_missing(
    cfg: DataConfig, source: Source, tokenizer: Any, folder: Path, streamed: Optional[StreamedText]
) -> bool:
    """Build the cache unless another process has. Returns whether it was built."""
    fault = find_fault(folder)
    if fault is None:
        return False
    if folder.exists():
        log.warning("prepared tokens in %s are damaged (%s): preparing again", readable(folder), fault)
        shutil.rmtree(folder)
    _build(cfg, source, tokenizer, folder, streamed)
    return True


def _streamed(source: Source, tokenizer: Any, folder: Path) -> StreamedText:
    encode = encoder(tokenizer, _dtype(tokenizer))
    return StreamedText(
        folder.with_name(folder.name + ".pieces"), source, encode, tokenizer.eos_token_id, folder.exists
    )


def _dtype(tokenizer: Any) -> np.dtype:
    return np.dtype("uint16" if max(len(tokenizer), tokenizer.eos_token_id + 1) <= 2**16 else "uint32")


def _key(cfg: DataConfig, source: Source, tokenizer: Any) -> str:
    what = [FORMAT, source.describe(), tokenizer_hash(tokenizer), tokenizer.eos_token_id, cfg.block_size]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _build(cfg: DataConfig, source: Source, tokenizer: Any, folder: Path, streamed: Optional[StreamedText]) -> None:
    half = folder.with_name(folder.name + ".part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    eos, dtype = tokenizer.eos_token_id, _dtype(tokenizer)
    encode, pool = encoder(tokenizer, dtype), background(tokenizer)
    train = Writer(half / "train.bin", dtype, eos, encode, cfg.max_tokens, pool)
    validation = Writer(half / "validation.bin", dtype, eos, encode, cfg.validation_tokens, pool)
    log.info("preparing %s (once; kept in %s)", source.name, readable(folder.parent))
    start = time.monotonic()
    try:
        copies, waiting = 0, 0
        if streamed is not None:
            streamed.make(pool)
            copies = streamed.write(train, validation)
        else:
            copies, waiting = _fill(cfg, source, train, validation)
        parts = {"train": train.close(), "validation": validation.close()}
        reason = f"; its {copies:,} documents are copies of validation documents" if copies else ""
        check(parts["train"]["documents"] > 0, f"data: no train documents in {source.name}{reason}")
        check(parts["validation"]["documents"] > 0, f"data: no validation documents in {source.name}")
        about = {"name": source.name, "dtype": dtype.name, "eos": eos, "block_size": cfg.block_size}
        manifest = {"format": FORMAT, **about, "tokenizer": tokenizer_hash(tokenizer), "source": source.describe()}
        read = _account(source, train, validation, copies=copies, waiting=waiting)
        (half / "manifest.json").write_text(json.dumps(manifest | parts | {"read": read}, indent=1))
        os.replace(half, folder)
    except BaseException:
        train.abandon()
        validation.abandon()
        shutil.rmtree(half, ignore_errors=True)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    seconds = time.monotonic() - start
    counts = f"{train.tokens:,} training tokens, {validation.tokens:,} validation tokens"
    log.info("prepared %s: %s in %.0f s", source.name, counts, seconds)


def _fill(cfg: DataConfig, source: Source, train: Writer, validation: Writer) -> tuple[int, int]:
    """Write the documents up to the limits on tokens.

    Returns: the number of training documents left out as copies of validation documents, and the number of documents
        that were read but not written because the limit was reached.
    """
    split = HashSplit(cfg.seed, cfg.validation_fraction)
    held: set[int] = set()
    copies = 0
    if source.has_validation:
        hashes = []
        for d in source.validation():
            hashes.append(document_hash(d, 0))
            validation.add(d)
            if validation.full:  # text beyond the limit is not used for validation, so it need not be read
                break
        validation.finish()
        held = set(hashes[: validation.documents])
    documents = ((False, d) for d in source.train()) if source.has_validation else split(source.train())
    for held_out, d in _with_progress(documents, train):
        if held and document_hash(d, 0) in held:
            copies += 1
            continue
        (validation if held_out else train).add(d)
        if train.full:
            break
    train.finish()
    validation.finish()
    return copies, split.waiting


def _with_progress(documents: Iterable[tuple[bool, str]], train: Writer) -> Iterator[tuple[bool, str]]:
    start = last = time.monotonic()
    for document in documents:
        yield document
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            log.info("  %.1fM tokens, %.2fM tokens/s", train.tokens / 1e6, train.tokens / 1e6 / (last - start))


def _account(source: Source, train: Writer, validation: Writer, *, copies: int, waiting: int) -> dict[str, int]:
    """Account for every row and document that was read; the sums must agree. Logs what was left out."""
    beyond = waiting + sum(w.offered - w.documents for w in (train, validation))
    rows = source.counts
    read = {
        "rows": rows.rows,
        "rows_empty": rows.empty,
        "rows_bad": rows.bad,
        "documents": source.documents,
        "documents_blank": source.blank,
        "copies": copies,
        "beyond_limits": beyond,
    }
    if source.documents != train.documents + validation.documents + copies + beyond:
        written = f"{train.documents} + {validation.documents} were written"
        raise RuntimeError(f"documents were lost in preparation: {written}, left out and read are {read}")
    reasons = (
        (rows.empty + source.blank, "without text"),
        (rows.bad, "whose text is not a string"),
        (copies, "copies of validation documents"),
        (beyond, "beyond data.max_tokens or data.validation_tokens"),
    )
    left_out = "; ".join(f"{count:,} {reason}" for count, reason in reasons if count)
    if left_out:
        log.info("left out of %s: %s", source.name, left_out)
    return read


def command(overrides: list[str], write: Optional[str] = None, out: Optional[Path] = None) -> Corpus:
    """Prepare the tokens of the run that `python train.py OVERRIDES` would be, without loading weights.

    Args:
        write: also write them as megatron or npy, for other projects.
        out: folder for that; default: one named after the format in the folder of the prepared tokens.
    """
    check(out is None or write is not None, "--out: names the folder of --write, which is not given")
    c = check_config(cli.composed(overrides))
    in_place = "data.tokens: token files are read in place, there is nothing to prepare; give them to train.py"
    check(c.data.tokens is None, in_place)
    check(not c.data.mix, "data.mix: train.py prepares each source when it is first used; or prepare them one by one")
    corpus = prepare(c.data, load_tokenizer(c.backbone))
    counts = {part: int(corpus.manifest[part]["tokens"]) for part in PARTS}
    took = "already there"
    if corpus.seconds is not None:
        took = f"{corpus.seconds:.1f} s, {sum(counts.values()) / corpus.seconds:,.0f} tokens/s"
    print(readable(corpus.folder.resolve()))
    print(f"{corpus.name}: {counts['train']:,} training tokens, {counts['validation']:,} validation tokens; {took}")
    if write:
        for path in write_tokens(corpus, write, out or corpus.folder / write):
            print(readable(path.resolve()))
    return corpus


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, which is reported in one line."""
    parser = Parser(
        prog="python -m bottleneck.data.prepare",
        description="Prepare the tokens of a run, without weights or training.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py: backbone=… data=… data.files=…"
    )
    parser.add_argument("--write", choices=WRITERS, help="also write the tokens in a format that other projects read")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for --write (default: in the prepared folder)")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def run() -> Corpus:
        args = parser.parse_args(argv)
        return command(args.overrides, args.write, args.out)

    return cli.one_line_errors(
        run,
        after_interrupt="the same command starts again; of a Hub stream, rows that were read are kept",
    )


if __name__ == "__main__":
    sys.exit(main())

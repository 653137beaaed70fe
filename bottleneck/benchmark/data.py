"""Text to tokens against plain `datasets.map` with the same tokenizer; prepared tokens and token files to batches.

Every measurement runs in a fresh process. The implementations alternate, so other load on the machine affects all.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator

import datasets
import transformers
from torchdata.stateful_dataloader import StatefulDataLoader

from bottleneck.backbone.model import label, load_tokenizer
from bottleneck.benchmark import token_files
from bottleneck.benchmark.table import Row, row, timed
from bottleneck.cli.one_line_errors import composed
from bottleneck.config.checks import check_config
from bottleneck.config.numbers import as_count
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.core.environment import cores
from bottleneck.core.paths import ROOT
from bottleneck.data.module import TextData
from bottleneck.data.prepare import prepare
from bottleneck.data.sources import Source

NAME = "data"
SHAPES = ((512, 16), (512, 256), (2048, 16), (2048, 256))  # tokens in a sequence, sequences in a step
LOADED = 20_000_000  # most tokens of one timed pass of the loader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="of the backbone, whose tokenizer is used: backbone=pythia-160m",
    )
    parser.add_argument(
        "--files",
        nargs="+",
        default=[str(ROOT / "data/sample")],
        help="text: folders, globs or files (default: the embedded sample)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each implementation (default: 3)")
    parser.add_argument("--shards", type=int, default=64, help="shards of token files that are read (default: 64)")
    parser.add_argument(
        "--shard-tokens", type=int, default=16_000_000, help="tokens of such a shard (default: 16,000,000)"
    )
    parser.add_argument(
        "--start-tokens", type=float, default=1e11, help="tokens of the sparse files that are opened (default: 1e11)"
    )


def run(args: argparse.Namespace) -> list[Row]:
    """Rows of `prepare`, `datasets.map` and the loader. Raises UserError for an unknown backbone or missing files."""
    for option in ("repeats", "shards", "shard_tokens", "start_tokens"):
        setattr(args, option, as_count(f"--{option.replace('_', '-')}", getattr(args, option)))
    backbone = check_config(composed(args.overrides)).backbone
    files = args.files if len(args.files) > 1 else args.files[0]
    cfg = DataConfig(files=files, validation_tokens=10**15)  # all text is tokenised on both sides
    name = f"{Source(cfg).name}, {label(backbone)}"
    load_tokenizer(backbone)  # raises errors before anything is measured
    found: dict[str, list[tuple[float, int, float]]] = {}
    for _ in range(args.repeats):
        for measure in (_prepare, _map):
            for implementation, seconds, tokens, peak in _apart(measure, cfg, backbone):
                found.setdefault(implementation, []).append((seconds, tokens, peak))
    rows = []
    for implementation, runs in found.items():
        seconds, tokens, peaks = zip(*runs)
        rows.append(row("prepare", name, implementation, list(seconds), tokens[0], "tokens", peak_mib=max(peaks)))
    return rows + _apart(_load, cfg, backbone, args.repeats) + _token_files(args, backbone)


def _token_files(args: argparse.Namespace, backbone: BackboneConfig) -> list[Row]:
    """Measure opening very many tokens, and reading shards of them in each order."""
    rows: list[Row] = []
    for case in token_files.sizes(args.start_tokens):
        rows += _apart(token_files.start, case, args.start_tokens, backbone)
    eos = int(load_tokenizer(backbone).eos_token_id)
    for kind, orders in token_files.ORDERS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokens = max(token_files.DOCUMENT, args.shard_tokens // token_files.DOCUMENT * token_files.DOCUMENT)
            token_files.write_shards(folder, args.shards, tokens, eos, kind)
            for order in orders:
                rows += _apart(token_files.read, order, folder, backbone, args.repeats)
    return rows


def _apart(measure: Callable, *args: Any) -> list:
    """Call in a fresh process: memory is counted from zero and no cache is warm."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        return pool.submit(measure, *args).result()


def _quiet() -> None:
    """Turn off progress bars and expected warnings."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*'set_vital' is deprecated.*")


def _peak_mib(children: int = 0) -> float:
    """Peak memory of this process and of its ended children, each counted as large as the largest of them."""
    most = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        + children * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    )
    return most / 1024


def _prepare(cfg: DataConfig, backbone: BackboneConfig) -> list[tuple[str, float, int, float]]:
    tokenizer = load_tokenizer(backbone)
    with tempfile.TemporaryDirectory() as folder:
        seconds, corpus = timed(lambda: prepare(replace(cfg, cache_dir=folder), tokenizer))
        return [("prepare", seconds, len(corpus.train) + len(corpus.validation), _peak_mib())]


def _map(cfg: DataConfig, backbone: BackboneConfig) -> list[tuple[str, float, int, float]]:
    """Measure the tutorials' `load_dataset(…).map(…)` on all cores, with and without the time to read the files."""
    tokenizer = load_tokenizer(backbone)
    source = Source(cfg)
    reading = mapping = 0.0
    tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        for reader, files, options in source.readers(source.files + source.validation_files):
            load = functools.partial(datasets.load_dataset, reader, data_files=files, split="train", **options)
            seconds, rows = timed(functools.partial(load, cache_dir=folder))
            reading += seconds
            tokenize = functools.partial(_tokenize, tokenizer, cfg.text_field)
            seconds, mapped = timed(functools.partial(rows.map, tokenize, batched=True, num_proc=cores()))
            mapping += seconds
            lengths = (
                len(ids) for table in mapped.with_format("arrow").iter(1000) for ids in table.column("input_ids")
            )
            tokens += sum(lengths)
            del rows, mapped  # open files in the folder
    peak = _peak_mib(cores())
    return [("datasets.map", mapping, tokens, peak), ("load_dataset + map", reading + mapping, tokens, peak)]


def _tokenize(tokenizer: Any, column: str, batch: dict[str, Any]) -> Any:
    return tokenizer(batch[column])


def _load(cfg: DataConfig, backbone: BackboneConfig, repeats: int) -> list[Row]:
    """Measure the training loader over prepared tokens, for each shape that the text is long enough for."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare(replace(cfg, cache_dir=folder), load_tokenizer(backbone))
        return list(_loader_rows(corpus, repeats))


def _read(data: TextData) -> None:
    for _ in StatefulDataLoader(data._steps(0, 1), batch_size=None):
        pass


def _loader_rows(corpus: Any, repeats: int) -> Iterator[Row]:
    for block, batch in SHAPES:
        steps = min(LOADED, len(corpus.train) - 1) // block // batch
        if steps == 0:
            continue
        data = TextData(corpus, block, batch, steps, 1, 0, None)
        seconds = [timed(functools.partial(_read, data))[0] for _ in range(repeats)]
        yield row(
            "load",
            f"{batch} x {block}, {steps} steps",
            "StatefulDataLoader",
            seconds,
            steps * batch * block,
            "tokens",
            peak_mib=_peak_mib(),
        )

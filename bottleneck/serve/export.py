"""A trained head for use elsewhere: as a whole Transformers model, as a model to serve, or as its two matrices.

    python -m bottleneck.export RUN_DIR --rank R --to DIR [--form dense|serve|factored|modelling]

dense: the run's backbone with W = A B as its output head, untied: AutoModelForCausalLM loads it. serve: the backbone
with the head as two matrices, logits = up(down(h)), at the cost of the rank: AutoModelForCausalLM loads it with
trust_remote_code=True, vLLM with the plugin of this package. factored: the two tensors alone, lm_head.down.weight
[R, D] and lm_head.up.weight [V, R], the layout of low-rank draft heads. modelling: the backbone with a head of any
built-in kind, computed by a small modelling file in the folder (trust_remote_code=True). A folder is written under
another name and renamed when it is complete; before that, whole models are loaded again and compared.

Dims: N sequences, T sequence length, D hidden size, R rank, V vocabulary. W_VD = A_VR @ B_RD.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from bottleneck.backbone.model import DTYPES, Backbone, label, load_model, load_tokenizer
from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import check
from bottleneck.heads.head import Head
from bottleneck.heads.key import LOW_RANK, HeadKey
from bottleneck.results.labels import kind_of
from bottleneck.serve import truncated
from bottleneck.serve.arguments import parser
from bottleneck.serve.folder import (
    Seen,
    add_older_names,
    check_logits,
    check_same,
    new_folder,
    read_back,
    save_model,
    see,
    write_json,
)
from bottleneck.serve.modelling import check_kind, rounded_logits, write_modelling
from bottleneck.serve.served import note_tokenizer, write_served
from bottleneck.serve.swap import prove, replace_head, set_head
from bottleneck.training.finished_run import FinishedRun, open_run

__all__ = ["command", "export", "main", "open_run", "prove", "quiet", "set_head"]
FACTS = "bottleneck.json"  # origin of a head
HEAD_FACTS = ("rank", "lr", "seed", "init", "parameters", "loss", "perplexity", "bits_per_byte", "initial_loss")
RUN_FACTS = ("data", "data_hash", "tokens", "validation_tokens", "recipe", "reference", "versions")


def facts(run: FinishedRun, row: dict[str, Any], *, form: str, dtype: str, family: str) -> dict[str, Any]:
    """The provenance of a head, for readers who have only its folder."""
    b = run.backbone
    V, R, D = run.curve["vocab_size"], row["rank"], run.curve["hidden_size"]
    tensors: dict[str, Any] = {"tensors": {"lm_head.down.weight": [R, D], "lm_head.up.weight": [V, R]}, "bias": False}
    return {
        "format": "bottleneck-head",
        "version": 1,
        "form": form,
        "rank": R,
        "hidden_size": D,
        "vocab_size": V,
        "dtype": dtype,
        **(tensors if form in ("serve", "factored") else {}),
        "backbone": {
            "name": label(b) if b.name else run.curve["backbone"],
            "path": b.path,
            "revision": b.revision,
            "gguf_file": b.gguf_file,
            "hash": run.curve["backbone_hash"],
            "model_type": family,
        },
        "head": {k: row[k] for k in HEAD_FACTS} | HeadKey.of(row).facts,
        "run": {k: run.curve[k] for k in RUN_FACTS if k in run.curve},
    }


@torch.no_grad()
def write_dense(model: Any, backbone: Backbone, W_VD: Tensor, *, fresh: Any, part: Path) -> None:
    """Save `model` with the head W into a folder.

    Args:
        backbone: over the same model.
        fresh: loads the model anew, for families that rewrite their weights when they run (RWKV).
    """
    scale = set_head(model, W_VD)
    if backbone.rewrites_weights:
        model = fresh()
        replace_head(model, W_VD / scale)
    save_model(model, part)


class Source(NamedTuple):
    """A run's backbone to put a head on.

    Attributes:
        model: with plain weights in the dtype to write.
        backbone: over the same model.
        seen: what the written folder is compared with.
        fresh: loads the model anew.
    """

    model: Any
    backbone: Backbone
    seen: Seen
    fresh: Callable[[], Any]


@torch.no_grad()
def _source(run: FinishedRun, dtype: str) -> Source:
    name, loaded = run.curve["backbone"], _dtype_to_load(run, dtype)

    def fresh() -> Any:
        again = load_model(dataclasses.replace(run.backbone, dtype=cast(Any, loaded)))
        _prepare(again, name, dtype)
        return again

    model, backbone = run.model(loaded)
    _prepare(model, name, dtype)
    return Source(model, backbone, see(model, backbone, dtype), fresh)


def _describe(run: FinishedRun, row: dict[str, Any], seen: Seen, *, form: str, tokenizer: Any, part: Path) -> None:
    """Add the tokenizer and the facts to a folder that has a model."""
    tokenizer.save_pretrained(part)
    write_json(part / FACTS, facts(run, row, form=form, dtype=seen.dtype, family=seen.family))


@torch.no_grad()
def _dense(run: FinishedRun, row: dict[str, Any], W_VD: Tensor, *, dtype: str, tokenizer: Any, to: Path) -> None:
    model, backbone, seen, fresh = _source(run, dtype)
    with new_folder(to) as part:
        write_dense(model, backbone, W_VD, fresh=fresh, part=part)
        _describe(run, row, seen, form="dense", tokenizer=tokenizer, part=part)
        add_older_names(part)
        del model, backbone  # a second copy is loaded
        b = run.backbone
        check_same(read_back(part, seen, attention=b.attn_implementation, code=b.trust_remote_code), W_VD, seen)


@torch.no_grad()
def _served(
    run: FinishedRun, row: dict[str, Any], factors: tuple[Tensor, Tensor], *, dtype: str, tokenizer: Any, to: Path
) -> None:
    model, backbone, seen, fresh = _source(run, dtype)
    with new_folder(to) as part:
        write_served(model, backbone, factors, fresh=fresh, part=part)
        _describe(run, row, seen, form="serve", tokenizer=tokenizer, part=part)
        note_tokenizer(part)
        del model, backbone
        A, B = (t.to(DTYPES[dtype]).float() for t in factors)
        check_logits(part, seen, seen.hidden_NTD @ B.T @ A.T)


@torch.no_grad()
def _modelling(run: FinishedRun, row: dict[str, Any], head: Head, *, dtype: str, tokenizer: Any, to: Path) -> None:
    model, backbone, seen, fresh = _source(run, dtype)
    with new_folder(to) as part:
        write_modelling(model, backbone, HeadKey.of(row), head.tensors(), fresh=fresh, part=part)
        _describe(run, row, seen, form="modelling", tokenizer=tokenizer, part=part)
        del model, backbone
        check_logits(part, seen, rounded_logits(head, seen), rounding=5e-2)


def _prepare(model: Any, name: str, dtype: str) -> None:
    """Plain weights in the dtype to write. Raises UserError for packed ones, which no plain model can hold.

    Weights that were unpacked on loading (GGUF) are plain.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        plain = all(p.dtype in DTYPES.values() for p in model.parameters())
        check(
            plain and not getattr(quantizer, "packed_modules", None),
            f"backbone {name}: its weights are kept quantized ({model.config.model_type}); only an unquantized "
            "backbone can be exported as dense",
        )
        quantizer.remove_quantization_config(model)
    for p in model.parameters():  # not buffers, some of which are meant to be float32
        p.data = p.data.to(DTYPES[dtype])


def _dtype_to_load(run: FinishedRun, dtype: str) -> str:
    """The dtype in which the backbone's hash can be compared: float16 rounds differently from the hash."""
    if run.backbone.dtype == "float16":
        return "float16"
    return "bfloat16" if dtype == "bfloat16" else "float32"


def _factored(
    run: FinishedRun, row: dict[str, Any], factors: tuple[Tensor, Tensor], *, dtype: str, tokenizer: Any, to: Path
) -> None:
    family = run.model(_dtype_to_load(run, "bfloat16"))[1].family  # bfloat16: half the memory
    up, down = (t.to(DTYPES[dtype]).contiguous() for t in factors)
    check(
        all(bool(t.isfinite().all()) for t in (up, down)),
        f"--dtype {dtype}: cannot hold all values of the head; use a wider one",
    )
    with new_folder(to) as part:
        save_file(
            {"lm_head.down.weight": down, "lm_head.up.weight": up},
            part / "model.safetensors",
            metadata={"format": "pt"},
        )
        about = facts(run, row, form="factored", dtype=dtype, family=family)
        for name in (FACTS, "config.json"):  # config.json is where earlier versions kept the facts
            write_json(part / name, about)
        tokenizer.save_pretrained(part)


def _truncated(run: FinishedRun, row: dict[str, Any], *, dtype: str, tokenizer: Any, to: Path) -> None:
    tensors = {n: t if n == "tokens_K" else t.to(DTYPES[dtype]) for n, t in run.tensors(row).items()}
    check(
        all(bool(t.isfinite().all()) for t in tensors.values()),
        f"--dtype {dtype}: cannot hold all values of the head; use a wider one",
    )
    family = run.model(_dtype_to_load(run, "bfloat16"))[1].family
    about = facts(run, row, form="factored", dtype=dtype, family=family)
    with new_folder(to) as part:
        truncated.write_truncated(tensors, run.curve["vocab_size"], about, part)
        write_json(part / FACTS, about)
        tokenizer.save_pretrained(part)


def export(run: FinishedRun, row: dict[str, Any], to: Path, *, form: str = "dense", dtype: str = "float32") -> Path:
    """Write one head of a run, with the tokenizer, as a folder.

    Args:
        row: of `run.pick`.
        dtype: of the stored weights.
    Returns: the folder. Raises: UserError for everything that the user can fix; then nothing is left behind.
    """
    to = to.expanduser().resolve()
    free = not to.exists() or (to.is_dir() and not any(to.iterdir()))
    check(free, f"--to {to}: exists and is not empty; give another folder")
    kind, other = HeadKey.of(row).kind, "--form modelling writes every built-in kind"
    same_rank = [HeadKey.of(h) for h in run.curve["heads"] if h["best"] and h["rank"] == row["rank"]]
    if fits := [k.name for k in same_rank if k.kind == LOW_RANK]:  # these have every form
        other += f"; --head {fits[0]} is a low_rank head of the same rank"
    if form == "modelling":
        check_kind(HeadKey.of(row))
        _modelling(run, row, run.head(row), dtype=dtype, tokenizer=load_tokenizer(run.backbone), to=to)
        return to
    matrix = form != "dense" or run.is_matrix(row)
    check(matrix, f"--form dense: a head of kind {kind} is not one matrix; {other}")
    factored = form == "dense" or kind == LOW_RANK or (form == "factored" and kind in truncated.KINDS)
    lacks = f"has no form {form}" if kind in truncated.KINDS else "has no factors A and B"
    check(factored, f"--form {form}: a head of kind {kind} {lacks}; {other}")
    tokenizer = load_tokenizer(run.backbone)
    if form == "factored" and HeadKey.of(row).kind in truncated.KINDS:
        _truncated(run, row, dtype=dtype, tokenizer=tokenizer, to=to)
        return to
    factors = run.factors(row) if form != "dense" else None  # only low-rank heads have some
    if factors is None:
        _dense(run, row, run.dense(row), dtype=dtype, tokenizer=tokenizer, to=to)
    elif form == "serve":
        _served(run, row, factors, dtype=dtype, tokenizer=tokenizer, to=to)
    else:
        _factored(run, row, factors, dtype=dtype, tokenizer=tokenizer, to=to)
    return to


def quiet() -> None:
    """Log our own lines on stderr, and of the libraries only errors."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "transformers", "lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def command(argv: list[str]) -> Path:
    """Parse the arguments and export. Returns the new folder."""
    args = parser().parse_args(argv)
    run = open_run(args.run, args.backbone)
    if args.trust_remote_code:  # the run's own setting is not followed: its folder may come from somebody else
        run.backbone = dataclasses.replace(run.backbone, trust_remote_code=True)
    if args.head is not None:
        check(args.lr is None and args.seed is None, "--head: names a rate and a seed; leave --lr and --seed out")
    row = run.named(args.head) if args.head is not None else run.pick(args.rank, args.lr, args.seed)
    to = export(run, row, args.to, form=args.form, dtype=args.dtype)
    kind = kind_of(row)
    head = (f"{kind}, " if kind else "") + f"rank {row['rank']}, lr {row['lr']:.6g}, seed {row['seed']}"
    print(f"{to}\n{head}: loss {row['loss']:.4f} on {run.curve['data']}; {args.form}, {args.dtype}")
    if args.form in ("serve", "modelling"):
        print(f"load it with AutoModelForCausalLM.from_pretrained({str(to)!r}, trust_remote_code=True)")
    return to


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, with one line."""
    quiet()
    return cli.one_line_errors(
        lambda: command(sys.argv[1:] if argv is None else argv), after_interrupt="nothing is written"
    )

"""A trained head for use elsewhere: as a whole Transformers model, or as its two matrices.

    python -m bottleneck.export RUN_DIR --rank R --to DIR [--form dense|factored]

dense: the run's backbone with W = A B as its output head, untied: what AutoModelForCausalLM loads. factored: tensors
lm_head.down.weight [R, D] and lm_head.up.weight [V, R], logits = up(down(h)), the layout of low-rank draft heads. The folder
is written under another name and renamed when it is whole and, for dense, has been loaded again and compared.

Dims: N sequences, T sequence length, D hidden size, R rank, V vocabulary. W_VD = A_VR @ B_RD.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Iterator, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from bottleneck.backbone.model import DTYPES, Backbone, label, load_model, load_tokenizer
from bottleneck.cli import one_line_errors as cli
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import Parser, UserError, check
from bottleneck.core.files import leftovers
from bottleneck.training.finished_run import Run, open_run

FORMS = ("dense", "factored")
FACTS = "bottleneck.json"  # beside a dense model: where its head comes from
HEAD_FACTS = ("rank", "lr", "seed", "init", "parameters", "loss", "perplexity", "bits_per_byte", "initial_loss")
RUN_FACTS = ("data", "data_hash", "tokens", "validation_tokens", "recipe", "reference", "versions")


@torch.no_grad()
def set_head(model: Any, W_VD: Tensor) -> None:
    """Make `model` predict through W alone: logits = h Wᵀ. Its own head is lost; the input embeddings stay as they are.

    The head is untied from the embeddings; a bias becomes zero; a cap (Gemma 2) goes and a scale (Cohere, Granite) becomes 1,
    in the config, so that it is also true of the model once saved, and where the model has copied them.
    """
    lm_head = model.get_output_embeddings()
    W = W_VD.to(device=lm_head.weight.device, dtype=lm_head.weight.dtype)
    check(
        bool(W.isfinite().all()),
        f"head: has values that {str(W.dtype).removeprefix('torch.')} cannot hold; take a wider dtype",
    )
    lm_head.weight = nn.Parameter(W.clone(), requires_grad=False)  # a new one: the old may be the embeddings'
    if getattr(lm_head, "bias", None) is not None:
        lm_head.bias.zero_()
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
        for holder in (config, model):
            if getattr(holder, "final_logit_softcapping", None) is not None:
                holder.final_logit_softcapping = None
            for scale in ("logit_scale", "logits_scaling"):
                if getattr(holder, scale, None) is not None:
                    setattr(holder, scale, 1.0)
    model.tie_weights()  # there is nothing left to tie: brings the model's own record of what is tied up to date
    kept = torch.equal(model.get_output_embeddings().weight, W)
    check(
        kept,
        f"head: family {model.config.model_type} ties its head to its embeddings whatever its config says; it cannot have another head",
    )


def prove(model: Any, name: str) -> Backbone:
    """That the logits of a model from `set_head` are h Wᵀ. Raises UserError naming a family that does something else."""
    backbone = Backbone(model, name)  # logits are its head's
    head, family = backbone.head, backbone.family
    zero = head.bias_V is None or not head.bias_V.any()
    plain = zero and head.scale == 1.0 and head.softcap is None
    check(
        plain,
        f"backbone {name}: family {family} keeps a bias, scale or cap on its logits, which a trained head has not",
    )
    return backbone


@contextlib.contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `to` when the block ends, and is gone where the block fails.

    Raises: UserError where `to` is there and not empty, or cannot be written.
    """
    part = to.with_name(f".{to.name}.{os.getpid()}.part")
    made = [p for p in to.parents if not p.exists()]
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        for beside in leftovers(to):
            shutil.rmtree(beside, ignore_errors=True)
        part.mkdir()
        yield part
        for path in part.rglob("*"):
            if path.is_file():
                path.chmod(part.stat().st_mode & 0o666)  # safetensors lets only the owner read
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())
        os.replace(part, to)
    except (OSError, SafetensorError) as error:  # a full disk is either
        raise UserError(f"--to {to}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made if not to.exists() else ():
            with contextlib.suppress(OSError):
                folder.rmdir()


def facts(run: Run, row: dict[str, Any], form: str, dtype: str, family: str) -> dict[str, Any]:
    """Where a head comes from, for whoever gets the folder alone."""
    b = run.backbone
    V, R, D = run.curve["vocab_size"], row["rank"], run.curve["hidden_size"]
    return {
        "format": "bottleneck-head",
        "version": 1,
        "form": form,
        "rank": R,
        "hidden_size": D,
        "vocab_size": V,
        "dtype": dtype,
        **(
            {"tensors": {"lm_head.down.weight": [R, D], "lm_head.up.weight": [V, R]}, "bias": False}
            if form == "factored"
            else {}
        ),
        "backbone": {
            "name": label(b) if b.name else run.curve["backbone"],
            "path": b.path,
            "revision": b.revision,
            "gguf_file": b.gguf_file,
            "hash": run.curve["backbone_hash"],
            "model_type": family,
        },
        "head": {k: row[k] for k in HEAD_FACTS},
        "run": {k: run.curve[k] for k in RUN_FACTS if k in run.curve},
    }


@torch.no_grad()
def _dense(run: Run, row: dict[str, Any], W_VD: Tensor, dtype: str, tokenizer: Any, to: Path) -> None:
    model, backbone = run.model(_loads_as(run, dtype))
    _unpacked(model, run.curve["backbone"])
    for p in model.parameters():  # not buffers, of which some are meant to be float32
        p.data = p.data.to(DTYPES[dtype])
    ids = torch.randint(
        0, model.get_input_embeddings().weight.shape[0], (2, 16), generator=torch.Generator().manual_seed(1)
    )
    h_NTD, family = backbone(ids).float(), backbone.family
    set_head(model, W_VD)
    W = W_VD.to(DTYPES[dtype])
    with new_folder(to) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        _write_json(part / FACTS, facts(run, row, "dense", dtype, family))
        del model, backbone  # a second copy is loaded
        attention = run.backbone.attn_implementation
        again = prove(
            load_model(BackboneConfig(path=str(part), dtype=dtype, attn_implementation=attention)),
            run.curve["backbone"],
        )
        error = (again(ids).float() - h_NTD).abs().max() / h_NTD.abs().max()
        same = torch.equal(again.head.W_VD, W) and error < (1e-4 if dtype == "float32" else 2e-2)
        check(
            same,
            f"backbone {run.curve['backbone']}: family {family} cannot be exported: Transformers does not load it again as it was saved",
        )


def _unpacked(model: Any, name: str) -> None:
    """Weights that were unpacked at loading (GGUF) are ordinary from here on; packed ones cannot be written as a plain model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    ordinary = all(p.dtype in DTYPES.values() for p in model.parameters()) and not getattr(
        quantizer, "packed_modules", None
    )
    check(
        ordinary,
        f"backbone {name}: its weights are kept quantized ({model.config.model_type}); only an unquantized backbone can be exported as dense",
    )
    quantizer.remove_quantization_config(model)


def _loads_as(run: Run, dtype: str) -> str:
    """The dtype to load the backbone in, so that its hash can be compared: float16 rounds otherwise than the hash does."""
    if run.backbone.dtype == "float16":
        return "float16"
    return "bfloat16" if dtype == "bfloat16" else "float32"


def _factored(
    run: Run, row: dict[str, Any], factors: tuple[Tensor, Tensor], dtype: str, tokenizer: Any, to: Path
) -> None:
    family = run.model(_loads_as(run, "bfloat16"))[1].family  # half the memory
    up, down = (t.to(DTYPES[dtype]).contiguous() for t in factors)
    check(
        all(bool(t.isfinite().all()) for t in (up, down)),
        f"--dtype {dtype}: cannot hold all values of the head; take a wider one",
    )
    with new_folder(to) as part:
        save_file(
            {"lm_head.down.weight": down, "lm_head.up.weight": up},
            part / "model.safetensors",
            metadata={"format": "pt"},
        )
        _write_json(part / "config.json", facts(run, row, "factored", dtype, family))
        tokenizer.save_pretrained(part)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def export(run: Run, row: dict[str, Any], to: Path, form: str = "dense", dtype: str = "float32") -> Path:
    """Write one head of a run as a folder of its own; the tokenizer is in it.

    Args:
        row: of `run.pick`.
        dtype: of the stored weights.
    Returns: the folder. Raises: UserError for whatever the user can mend; then nothing is left behind.
    """
    to = to.expanduser().resolve()
    free = not to.exists() or (to.is_dir() and not any(to.iterdir()))
    check(free, f"--to {to}: is there and not empty; give another folder")
    A, B = run.factors(row)
    tokenizer = load_tokenizer(run.backbone)
    if form == "dense":
        _dense(run, row, A @ B, dtype, tokenizer, to)
    else:
        _factored(run, row, (A, B), dtype, tokenizer, to)
    return to


def quiet() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "transformers", "lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def command(argv: list[str]) -> Path:
    parser = Parser(
        prog="python -m bottleneck.export",
        description="Write a trained head as a Transformers model, or as its two matrices.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--rank", type=int, required=True, help="rank of the head")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--form", choices=FORMS, default="dense", help="whole model, or lm_head.down and lm_head.up (default: dense)"
    )
    parser.add_argument("--lr", type=float, help="the head of this rate (default: the best of the rank)")
    parser.add_argument("--seed", type=int, help="the head of this seed (default: the best of the rank)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the weights written (default: float32)"
    )
    parser.add_argument(
        "--backbone", metavar="PATH", help="where the backbone is now, if it has moved: folder or Hub name"
    )
    args = parser.parse_args(argv)
    run = open_run(args.run, args.backbone)
    row = run.pick(args.rank, args.lr, args.seed)
    to = export(run, row, args.to, args.form, args.dtype)
    print(
        f"{to}\nrank {row['rank']}, lr {row['lr']:.6g}, seed {row['seed']}: loss {row['loss']:.4f} on {run.curve['data']}; {args.form}, {args.dtype}"
    )
    return to


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, told in one line."""
    quiet()
    return cli.one_line_errors(
        lambda: command(sys.argv[1:] if argv is None else argv), after_interrupt="nothing is written"
    )

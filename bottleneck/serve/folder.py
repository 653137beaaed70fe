"""Model folders: written under another name and renamed when they are complete; read back and compared."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from bottleneck.backbone.model import DTYPES, Backbone, load_model
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError, check
from bottleneck.core.files import leftovers
from bottleneck.serve.swap import prove


@contextlib.contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `to` when the block ends, and is removed if the block fails.

    Raises: UserError if `to` exists and is not empty, or cannot be written.
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
                path.chmod(part.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())
        os.replace(part, to)
    except (OSError, SafetensorError) as error:  # a full disk raises either
        raise UserError(f"--to {to}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made if not to.exists() else ():
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def add_older_names(folder: Path) -> None:
    """Repeat in a folder what readers of Transformers 4's files, llama.cpp's converter above all, look for.

    Transformers 5 writes GPT-NeoX's rotary settings under new names only, so that older readers take the defaults (a
    quarter of a head, base 10,000) whatever the model has; and it names a tokenizer class that is unknown to them.
    Transformers 5 reads both names.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rotary = config.get("rope_parameters") or {}
    if config["model_type"] == "gpt_neox" and {"partial_rotary_factor", "rope_theta"} <= rotary.keys():
        config |= {"rotary_pct": rotary["partial_rotary_factor"], "rotary_emb_base": rotary["rope_theta"]}
        write_json(path, config)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":
            write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def save_model(model: Any, folder: Path, without: Optional[str] = None) -> None:
    """`save_pretrained`; weights that are still shared are written under each of their names.

    Untying the head in the config also unties a family's other shared weights (Zamba's shared layers). A reload then
    needs every name.

    Args: without: weights whose names begin so are left out.
    """
    state = {k: t for k, t in model.state_dict().items() if without is None or not k.startswith(without)}
    storages = [t.data_ptr() for t in state.values() if t.numel()]
    shared = len(set(storages)) < len(storages)
    try:
        if shared:
            state = {k: t.clone() for k, t in state.items()}
        model.save_pretrained(folder, **({"state_dict": state} if shared or without else {}))
    except (OSError, SafetensorError):
        raise
    except Exception as error:
        raise UserError(
            f"backbone: family {model.config.model_type} cannot be exported: Transformers does not save it: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


class Seen(NamedTuple):
    """A backbone before its head was exchanged: what a folder that is written from it is compared with.

    Attributes:
        dtype: of the weights written.
        ids_NT: token ids.
        hidden_NTD: the backbone's hidden states of them, float32.
    """

    name: str
    family: str
    dtype: str
    ids_NT: Tensor
    hidden_NTD: Tensor


def see(model: Any, backbone: Backbone, dtype: str) -> Seen:
    """Run a backbone on some tokens. Args: model: the whole one."""
    ids_NT = probe(model).clamp(max=backbone.vocab_size - 1)
    return Seen(backbone.name, backbone.family, dtype, ids_NT, backbone(ids_NT).float())


def probe(model: Any) -> Tensor:
    """Token ids [2, 16] to compare models on."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, len(model.get_input_embeddings().weight), (2, 16), generator=g)


def read_back(folder: Path, seen: Seen, *, attention: Optional[str], code: bool) -> Backbone:
    """The model in a folder that was just written, after a check that its logits are h Wᵀ.

    Args: attention: implementation. code: run the folder's own code.
    Raises: UserError that names the family, not the folder.
    """
    cfg = BackboneConfig(
        path=str(folder), dtype=cast(Any, seen.dtype), attn_implementation=attention, trust_remote_code=code
    )
    try:
        return prove(load_model(cfg), seen.name)
    except UserError as error:
        text = str(error).replace(f"backbone.path={folder}: ", "").replace(str(folder), "the new folder")
        raise _unlike(seen, f"it differs: {text}") from error


def check_same(again: Backbone, W_VD: Tensor, seen: Seen) -> None:
    """Raise UserError unless a model that was read back has the head W and the hidden states of before."""
    error = (again(seen.ids_NT).float() - seen.hidden_NTD).abs().max() / seen.hidden_NTD.abs().max()
    head = again.head
    W = W_VD.to(DTYPES[seen.dtype])
    rounding = 0.0 if head.scale == 1 else {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[seen.dtype]
    off = (head.W_VD.float() * head.scale - W.float()).abs()
    same = bool((off <= rounding * W.float().abs()).all())
    same &= float(error) < (1e-4 if seen.dtype == "float32" else 2e-2)
    check(
        same,
        f"backbone {again.name}: family {again.family} cannot be exported: Transformers does not load it again as it "
        "was saved",
    )


@torch.no_grad()
def check_logits(folder: Path, seen: Seen, want_NTV: Tensor, *, rounding: float = 2e-2) -> None:
    """Load a folder that was just written, with its own code, and compare its logits of `seen.ids_NT`.

    Args: rounding: largest difference with 16-bit weights, relative to the largest logit.
    Raises: UserError if it does not load, or the logits differ by more than rounding.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=DTYPES[seen.dtype]).eval()
        got = model(input_ids=seen.ids_NT, use_cache=False).logits.float()
    except Exception as error:  # any kind of error: this checks the written folder
        raise _unlike(seen, f"{type(error).__name__}: {str(error)[:200]}") from error
    off = float((got[..., : want_NTV.shape[-1]] - want_NTV).abs().max() / want_NTV.abs().max())
    if not off < (1e-4 if seen.dtype == "float32" else rounding):  # not: a NaN differs too
        raise _unlike(seen, f"its logits differ by {off:.2g}")


def _unlike(seen: Seen, how: str) -> UserError:
    return UserError(f"backbone {seen.name}: family {seen.family} cannot be exported: loaded again, {how}")

"""One folder that Transformers loads with a head of any built-in kind: `--form modelling`.

Dims: N sequences, T sequence length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable

import torch
import transformers
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import UserError, check
from bottleneck.core.extensions import HEAD_KINDS
from bottleneck.heads.head import Head
from bottleneck.heads.key import HeadKey
from bottleneck.serve import kind_head
from bottleneck.serve.folder import save_model, write_json
from bottleneck.serve.served import add_head, check_wrappable
from bottleneck.serve.swap import replace_head, set_head


def check_kind(key: HeadKey) -> None:
    """Raises UserError for a kind without a formula in the modelling file: one of a plugin."""
    known = ", ".join(kind_head.FORMULAS)
    check(key.kind in kind_head.FORMULAS, f"--form modelling: has no formula of kind {key.kind}; it has {known}")


@torch.no_grad()
def write_modelling(
    model: Any, backbone: Backbone, key: HeadKey, tensors: dict[str, Tensor], *, fresh: Callable[[], Any], part: Path
) -> None:
    """Write a model and a head of any built-in kind into a folder.

    Args: tensors: of the head's file. fresh: loads the model anew, see `export.write_dense`.
    Raises: UserError if the family cannot be served so.
    """
    check_wrappable(model, backbone, "modelling")
    architecture = type(model).__name__
    W_VD = backbone.head.W_VD.float().clone()  # any head of the family's: it shows the scale and is left out below
    divisor = set_head(model, W_VD)
    if backbone.rewrites_weights:
        model = fresh()
        replace_head(model, W_VD)
    weight = model.get_output_embeddings().weight
    named = {name.replace(".", "_"): t for name, t in tensors.items()}
    whole = [name for name, t in named.items() if not t.is_floating_point()]
    stored = {name: t if name in whole else t.to(weight) for name, t in named.items()}
    check(
        all(bool(t.isfinite().all()) for t in stored.values()),
        "--dtype: cannot hold all values of the head; use a wider one",
    )
    save_model(model, part, without="lm_head.")
    add_head(part, {f"lm_head.{name}": t for name, t in stored.items()})
    name = kind_head.PREFIX + architecture
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    options = {**HEAD_KINDS[key.kind].options, **dict(key.options)}
    config |= {
        "architectures": [name],
        "auto_map": {"AutoModelForCausalLM": f"{Path(kind_head.__file__).stem}.{name}"},
        "tie_word_embeddings": False,
        "kind_head": {
            "kind": key.kind,
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
            | {"vocab_size": backbone.vocab_size},
            "shapes": {name: list(t.shape) for name, t in named.items()},
            "whole": whole,
            "divisor": divisor,
        },
    }
    write_json(part / "config.json", config)
    shutil.copyfile(kind_head.__file__, part / Path(kind_head.__file__).name)


@torch.no_grad()
def check_modelling(
    part: Path, backbone: Backbone, head: Head, *, ids_NT: Tensor, hidden: Tensor, dtype: torch.dtype
) -> None:
    """Load a folder with Transformers and compare its logits with the bank's. Raises UserError if they differ.

    Args: head: in float32. hidden: the backbone's hidden states [N, T, D] of ids_NT, before its head was exchanged.
    """
    name, family = backbone.name, backbone.family
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(part, trust_remote_code=True, dtype=dtype).eval()
        got = model(input_ids=ids_NT, use_cache=False).logits.float()
    except Exception as error:  # any kind of error: this checks the written folder
        raise UserError(
            f"backbone {name}: family {family} cannot be exported: loaded again, {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error
    for p in head.parameters():
        p.copy_(p.to(dtype).float())
    want = head.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
    off = float((got[..., : want.shape[-1]] - want).abs().max() / want.abs().max())
    check(
        off < (1e-4 if dtype == torch.float32 else 5e-2),
        f"backbone {name}: family {family} cannot be exported: loaded again, its logits differ by {off:.2g}",
    )

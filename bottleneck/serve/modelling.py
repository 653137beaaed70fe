"""One folder that Transformers loads with a head of any built-in kind: `--form modelling`.

Dims: N sequences, T sequence length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor

from bottleneck.backbone.model import DTYPES, Backbone
from bottleneck.core.errors import check
from bottleneck.core.extensions import HEAD_KINDS
from bottleneck.heads.head import Head
from bottleneck.heads.key import HeadKey
from bottleneck.serve import kind_head
from bottleneck.serve.folder import Seen, save_model, write_json
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
def rounded_logits(head: Head, seen: Seen) -> Tensor:
    """Logits [N, T, V] of a head whose weights are rounded to the dtype written. The head keeps the rounded weights."""
    for p in head.parameters():
        p.copy_(p.to(DTYPES[seen.dtype]).float())
    h_NTD = seen.hidden_NTD
    return head.logits(h_NTD.flatten(0, 1)).view(*h_NTD.shape[:2], -1)

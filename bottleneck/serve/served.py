"""One folder that Transformers and vLLM load, with the head as two matrices: `--form serve`.

Dims: D hidden size, R rank, V vocabulary. Logits = up(down(h)), up.weight [V, R], down.weight [R, D].
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.serve import low_rank_head
from bottleneck.serve.folder import save_model, write_json
from bottleneck.serve.low_rank_head import DOWN, INDEX, PREFIX, REFUSED, UP, WHOLE
from bottleneck.serve.swap import replace_head, set_head

HEAD_FILE = "model-head.safetensors"
BODY_FILE = "model-body.safetensors"


@torch.no_grad()
def write_served(
    model: Any, backbone: Backbone, factors: tuple[Tensor, Tensor], *, fresh: Callable[[], Any], part: Path
) -> None:
    """Write a model and a low-rank head into a folder.

    Args: factors: A [V, R], B [R, D]. fresh: loads the model anew, see `write_dense`.
    Raises: UserError if the family cannot be served so.
    """
    check_wrappable(model, backbone, "serve")
    architecture = type(model).__name__
    A, B = factors
    scale = set_head(model, A @ B)
    if backbone.rewrites_weights:
        model = fresh()
        replace_head(model, A @ B)
    weight = model.get_output_embeddings().weight
    up = weight.new_zeros(len(weight), A.shape[1])
    up[: len(A)] = (A / scale).to(up)
    down = B.to(up).contiguous()
    check(
        bool(up.isfinite().all()) and bool(down.isfinite().all()),
        "--dtype: cannot hold all values of the head; use a wider one",
    )
    save_model(model, part, without="lm_head.")
    add_head(part, {DOWN: down, UP: up})
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    name = PREFIX + architecture
    config |= {
        "architectures": [name],
        "auto_map": {"AutoModelForCausalLM": f"{Path(low_rank_head.__file__).stem}.{name}"},
        "tie_word_embeddings": False,
        "head_rank": A.shape[1],
        "head_shape": list(weight.shape),
    }
    write_json(part / "config.json", config)
    shutil.copyfile(low_rank_head.__file__, part / Path(low_rank_head.__file__).name)


def note_tokenizer(part: Path) -> None:
    """Write the identity of the folder's tokenizer into its config, so that loaders detect another tokenizer."""
    if (part / "tokenizer.json").is_file():
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        config["head_tokenizer"] = low_rank_head.file_hash(part / "tokenizer.json")
        write_json(part / "config.json", config)


def check_wrappable(model: Any, backbone: Backbone, form: str) -> None:
    """Raises UserError for a model whose head cannot be replaced by a module, as `--form` wants it."""
    architecture, family = type(model).__name__, backbone.family
    check(
        getattr(transformers, architecture, None) is type(model),
        f"backbone {backbone.name}: family {family} has code of its own ({architecture}); --form {form} cannot wrap it",
    )
    place = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    check(
        place == "lm_head",
        f"backbone {backbone.name}: family {family} keeps its head in {place or 'no module'}, "
        f"--form {form} needs lm_head",
    )


def add_head(part: Path, tensors: dict[str, Tensor]) -> None:
    """Add the head's tensors to the index as one more file; loaders ignore files that the index does not list.

    With them go the tensors that make Transformers refuse the folder without its own code (`REFUSED`).
    """
    tensors = tensors | {name: torch.zeros(1) for name in REFUSED}
    if (part / INDEX).is_file():
        index = json.loads((part / INDEX).read_text(encoding="utf-8"))
    else:
        from safetensors import safe_open

        (part / WHOLE).rename(part / BODY_FILE)
        with safe_open(part / BODY_FILE, "pt") as f:
            index = {"metadata": {}, "weight_map": dict.fromkeys(f.keys(), BODY_FILE)}
    save_file({name: t.clone() for name, t in tensors.items()}, part / HEAD_FILE, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, HEAD_FILE)
    files = sorted(set(index["weight_map"].values()))
    index["metadata"]["total_size"] = sum((part / name).stat().st_size for name in files)
    write_json(part / INDEX, index)

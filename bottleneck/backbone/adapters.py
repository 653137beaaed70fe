"""PEFT adapters: merged into the weights, so that a backbone with one is an ordinary model everywhere else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bottleneck.core.errors import check


@torch.no_grad()
def merge(model: Any, name: str) -> None:
    """Merge the adapters that Transformers has put into `model` and put the plain layers back in place.

    Raises: UserError for an adapter of a kind that cannot be merged, such as prompt tuning.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = 0
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()  # type: ignore[operator]  # nn.Module's __getattr__ hides the method's type
            _put(model, path, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            saved = getattr(module, "modules_to_save", None)
            check(saved is not None, f"backbone {name}: its adapter trains single tokens, which cannot be merged")
            assert saved is not None
            _put(model, path, saved[module.active_adapters[0]])
        else:
            continue
        found += 1
    check(bool(found), f"backbone {name}: its adapter changes no layer; only adapters that can be merged are supported")
    # Otherwise `save_pretrained` would write the adapter, under PEFT's names
    model._hf_peft_config_loaded = False
    for name_of_memory in ("peft_config", "_weight_conversions"):
        vars(model).pop(name_of_memory, None)


def reload(model: Any, folder: str, absent: set[str], extra: set[str]) -> tuple[set[str], set[str]]:
    """Load an adapter's weights once more with PEFT itself where Transformers left some out (the magnitudes of DoRA).

    Args: absent, extra: names that Transformers reports as missing from the files, and as unknown in them.
    Returns: the names that still are.
    """
    if not absent and not extra:
        return absent, extra
    import peft
    from peft.utils.save_and_load import load_peft_weights

    name = model.active_adapters()[0]
    weights = load_peft_weights(folder, device="cpu")
    peft.set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    wanted = {_bare(key) for key in peft.get_peft_model_state_dict(model, adapter_name=name)}
    given = {_bare(key) for key in weights}
    ours = {key for key in absent | extra if f".{name}" in key}
    return (absent - ours) | (wanted - given), (extra - ours) | (given - wanted)


def _bare(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)

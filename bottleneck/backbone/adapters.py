"""PEFT adapters: merged into the weights, so that a backbone with one is an ordinary model everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from bottleneck.core.errors import UserError, check

ADAPTER = "adapter_config.json"  # what PEFT writes beside an adapter's weights
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Adapters that add virtual tokens or shared parts instead of changing weights
UNMERGED = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT", "ADAPTION_PROMPT", "XLORA")


@functools.lru_cache(maxsize=64)
def _on_the_hub(path: str, revision: Optional[str]) -> Optional[str]:
    return find_adapter_config_file(path, revision=revision)  # asks the network


def adapter_of(path: str, revision: Optional[str] = None) -> Optional[Path]:
    """The adapter_config.json of a folder or Hub repository; None if it holds no adapter.

    Raises: UserError for an adapter without config, of a kind that cannot be merged, or without PEFT to apply it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        there = [name for name in WEIGHTS if (folder / name).is_file()]
        found = folder / ADAPTER if (folder / ADAPTER).is_file() else None
        check(
            found is not None or not there,
            f"backbone.path={path}: holds the weights of a PEFT adapter ({', '.join(there)}) without {ADAPTER}",
        )
    else:
        name = _on_the_hub(path, revision)
        found = Path(name) if name else None
    if found is None:
        return None
    check(
        importlib.util.find_spec("peft") is not None,
        f"backbone.path={path}: holds a PEFT adapter ({ADAPTER}), which PEFT must apply: pip install -e '.[peft]'",
    )
    kind = _content(found, path).get("peft_type")
    check(
        kind not in UNMERGED,
        f"backbone.path={path}: its adapter is of kind {kind}, which is no change of weights and cannot be merged",
    )
    return found


def base_of(path: str, revision: Optional[str] = None) -> Optional[tuple[str, Optional[str]]]:
    """Path and revision of the base model if `path` holds an adapter alone; None if it holds a model or no adapter.

    Raises: UserError as `adapter_of`; if the adapter does not say where its base is, or the base has an adapter too.
    """
    found = adapter_of(path, revision)
    if found is None:
        return None
    if found.parent.joinpath("config.json").is_file():
        return None
    if not Path(path).expanduser().is_dir() and cached_file(
        path, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    ):
        return None
    content = _content(found, path)
    base = content.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"backbone.path={path}: {ADAPTER} does not name its base model (base_model_name_or_path)")
    where = f"backbone.path={path}: its base model {base} ({ADAPTER}, base_model_name_or_path)"
    local = Path(base).expanduser()
    looks_local = local.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1
    check(not looks_local or local.is_dir(), f"{where} does not exist")
    check(local.resolve() != found.parent.resolve(), f"{where} is the adapter itself")
    given = content.get("revision")
    own = given if isinstance(given, str) and given and not local.is_dir() else None
    # Transformers would load the base without its adapter
    check(adapter_of(base, own) is None, f"{where} has an adapter itself; merge that one into its base first")
    return base, own


def _content(found: Path, path: str) -> dict[str, Any]:
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"backbone.path={path}: {ADAPTER} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


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

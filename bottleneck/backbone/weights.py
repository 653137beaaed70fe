"""A Transformers model taken apart: its layers, its parameters one part at a time, and the identity of its weights."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn

from bottleneck.core.errors import UserError, check

LARGEST = 1e8  # far above any trained weight; a larger one overflows in the next product or norm


def body_of(model: Any) -> nn.Module:
    """The part that Transformers calls the base model; the model itself if it has none under its own name."""
    body = getattr(model, model.base_model_prefix, None)
    return body if isinstance(body, nn.Module) else model


def layers_of(body: nn.Module) -> list[nn.Module]:
    """The repeated layers of a body, as its family names them; empty if it does not."""
    names = set(getattr(body, "_no_split_modules", None) or ())
    return [m for m in body.modules() if type(m).__name__ in names]


def units(model: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """A model in parts that are handled one after the other: each layer, the rest of the body, the rest of the model.

    Returns: each part's outermost module, and the modules whose parameters belong to it.
    """
    out: list[tuple[nn.Module, list[nn.Module]]] = []
    seen: set[nn.Module] = set()
    body = body_of(model)
    for part in [*layers_of(body), body, model]:
        modules = [m for m in part.modules() if m not in seen]
        if modules:
            out.append((part, modules))
        seen.update(modules)
    return out


def materialise(
    modules: list[nn.Module], make: Callable[[nn.Parameter], Tensor], memo: Optional[dict[int, Any]] = None
) -> None:
    """Replace the parameters that `modules` own by frozen ones with the values `make(old)`.

    Args: memo: of earlier calls, if parts share parameters.
    """
    memo = {} if memo is None else memo
    for module in modules:
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in memo:
                    # the old parameter stays alive beside the new one: its id is the key
                    memo[id(old)] = (nn.Parameter(make(old), requires_grad=False), old)
                module._parameters[name] = memo[id(old)][0]


def untie(model: Any) -> None:
    """Give the head a weight of its own if it shares the embeddings'."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        head.weight.__dict__.update(embedding.weight.__dict__)


def randoms(model: Any, device: torch.device) -> Callable[[nn.Parameter], Tensor]:
    """Random values for the parameters of an `empty_model`, independent of the order of the requests.

    The model's buffers get their proper values. Scales are 1, biases 0; matrices have the standard deviation of the
    family's initialisation.
    """
    for name, p in model.named_parameters():
        vars(p)["drawn_as"] = name  # an attribute, so that `untie` can hand it to the head's copy
    width = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    with torch.no_grad():
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
            if module._buffers and not module._parameters:
                model._init_weights(module)

    def draw(old: nn.Parameter) -> Tensor:
        name = vars(old)["drawn_as"]
        if old.ndim < 2:
            return torch.full(old.shape, float(not name.endswith("bias")), dtype=old.dtype, device=device)
        g = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(old.shape, dtype=old.dtype, device=device).normal_(0, width, generator=g)

    return draw


def check_numbers(model: nn.Module, name: str) -> None:
    """Raise UserError if a weight is NaN, infinite or beyond `LARGEST`: its file was damaged or badly converted.

    Buffers of the file count as well, such as the routing biases of experts, but not their large negative numbers, with
    which families mask.
    """
    for key, b in model.named_buffers():
        if not b.is_meta and b.is_floating_point() and b.element_size() > 1 and b.numel():
            bad = ~(b.detach().float() < LARGEST)
            check(
                not bool(bad.any()),
                f"backbone {name}: {int(bad.sum())} of the numbers {key} are not usable; its file is damaged",
            )
    for key, p in model.named_parameters():
        if p.is_meta or not p.is_floating_point() or p.element_size() < 2 or not p.numel():
            continue
        low, high = (float(v) for v in torch.aminmax(p.detach()))
        if low > -LARGEST and high < LARGEST:  # false for NaN
            continue
        bad = ~(p.detach().float().abs() < LARGEST)
        where = bad.nonzero()[0].tolist()
        value = p.detach()[tuple(where)].item()
        raise UserError(
            f"backbone {name}: {int(bad.sum())} of the weights {key} are not usable numbers, the first is {value:.3g} "
            f"at {where}; its file is damaged"
        )


def hash_weights(backbone: nn.Module) -> str:
    """Identity of the weights: names, shapes, and values rounded to bfloat16, so that the dtype does not matter."""
    digest = hashlib.sha256()
    for name, p in sorted(backbone.named_parameters()):
        digest.update(f"{name}{list(p.shape)}".encode())
        for part in p.detach().reshape(-1).split(1 << 24):
            digest.update(part.to(torch.bfloat16).view(torch.int16).cpu().numpy())
    return digest.hexdigest()[:16]


def shape_hash(model: nn.Module) -> str:
    """Identity of random weights: the same for all models of one shape."""
    names = sorted(f"{name}{list(p.shape)}" for name, p in model.named_parameters())
    return hashlib.sha256("\n".join(["random", *names]).encode()).hexdigest()[:16]

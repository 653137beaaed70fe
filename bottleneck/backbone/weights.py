"""A Transformers model taken apart: its layers, its parameters put in place one part at a time, and the identity of its weights."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn


def layers_of(body: nn.Module) -> list[nn.Module]:
    """The repeated layers of a body, as its family names them; none where it does not."""
    names = set(getattr(body, "_no_split_modules", None) or ())
    return [m for m in body.modules() if type(m).__name__ in names]


def units(model: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """A model in parts that are handled one after the other: each layer, the rest of the body, the rest of the model (its head).

    Returns: each part's outermost module, and the modules whose parameters belong to it.
    """
    body = getattr(model, model.base_model_prefix)
    out: list[tuple[nn.Module, list[nn.Module]]] = []
    seen: set[nn.Module] = set()
    for part in [*layers_of(body), body, model]:
        modules = [m for m in part.modules() if m not in seen]
        if modules:
            out.append((part, modules))
        seen.update(modules)
    return out


def materialise(
    modules: list[nn.Module], make: Callable[[nn.Parameter], Tensor], memo: Optional[dict[int, Any]] = None
) -> None:
    """Put frozen parameters with the values `make(old)` in the place of those that modules own.

    Args: memo: of earlier calls, where parts share parameters.
    """
    memo = {} if memo is None else memo
    for module in modules:
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in memo:
                    memo[id(old)] = (
                        nn.Parameter(make(old), requires_grad=False),
                        old,
                    )  # old stays alive: its id is a key
                module._parameters[name] = memo[id(old)][0]


def untie(model: Any) -> None:
    """Give the head a weight of its own, where it shares the embeddings'."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        head.weight.__dict__.update(embedding.weight.__dict__)


def randoms(model: Any, device: torch.device) -> Callable[[nn.Parameter], Tensor]:
    """Random values for the parameters of an `empty_model`, the same whatever the order they are asked for in; its buffers get
    the values they should have. Scales are 1, biases 0, matrices as wide as the family starts them."""
    for name, p in model.named_parameters():
        p.drawn_as = name
    width = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    with torch.no_grad():
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
            if module._buffers and not module._parameters:
                model._init_weights(module)

    def draw(old: nn.Parameter) -> Tensor:
        if old.ndim < 2:
            return torch.full(old.shape, float(not old.drawn_as.endswith("bias")), dtype=old.dtype, device=device)
        g = torch.Generator(device).manual_seed(zlib.crc32(old.drawn_as.encode()))
        return torch.empty(old.shape, dtype=old.dtype, device=device).normal_(0, width, generator=g)

    return draw


def hash_weights(backbone: nn.Module) -> str:
    """Identity of the weights: names, shapes, and every value rounded to bfloat16, so that it is the same whatever dtype
    they are loaded in."""
    digest = hashlib.sha256()
    for name, p in sorted(backbone.named_parameters()):
        digest.update(f"{name}{list(p.shape)}".encode())
        for part in p.detach().reshape(-1).split(1 << 24):
            digest.update(part.to(torch.bfloat16).view(torch.int16).cpu().numpy())
    return digest.hexdigest()[:16]


def shape_hash(model: nn.Module) -> str:
    """Identity of random weights: all models of one shape are one."""
    names = sorted(f"{name}{list(p.shape)}" for name, p in model.named_parameters())
    return hashlib.sha256("\n".join(["random", *names]).encode()).hexdigest()[:16]

"""The backbone's original head, and a measurement of how a family turns that head's product into logits.

Dims: N sequences, T sequence length, D hidden size (width of the head's input), V vocabulary of the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bottleneck.losses.products import matmul_f32


@dataclass
class FullHead:
    """The backbone's original head: logits = cap(scale · (h Wᵀ + b)), cap(x) = c · tanh(x / c) if it has a cap."""

    W_VD: Tensor
    bias_V: Optional[Tensor] = None
    scale: float = 1.0
    softcap: Optional[float] = None

    @property
    def plain(self) -> bool:
        """True if the head is W alone, as in the paper."""
        return self.bias_V is None and self.scale == 1.0 and self.softcap is None

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V], in the dtype of W."""
        bias = None if self.bias_V is None else self.bias_V.to(self.W_VD.dtype)
        return self._capped(F.linear(h.to(self.W_VD.dtype), self.W_VD, bias))

    def float_logits(self, h_ND: Tensor) -> Tensor:
        """Hidden states [N, D] to float32 logits [N, V]; 16-bit products are accumulated in float32 and not rounded.

        Between 16 and 32, bfloat16 has steps of 0.125: rounded logits tie at the top, and the loss gains up to a
        hundredth of a nat.
        """
        z = matmul_f32(h_ND.to(self.W_VD.dtype), self.W_VD.T)
        return self._capped(z if self.bias_V is None else z + self.bias_V.float())

    def _capped(self, z: Tensor) -> Tensor:
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


@dataclass
class HeadMap:
    """How logits follow from the product of a linear head: cap(scale · (product + added)), the first V columns.

    Attributes: V: columns of the logits, at most the rows of the head; added_V: a bias besides the module's own.
    """

    V: int
    scale: float = 1.0
    softcap: Optional[float] = None
    added_V: Optional[Tensor] = None

    def of(self, linear: nn.Module) -> FullHead:
        """The head that a linear module makes with this map; its tensors are the module's own where possible."""
        weight, bias = _weight(linear), getattr(linear, "bias", None)
        bias = None if bias is None else bias[: self.V]
        if self.added_V is not None:
            bias = self.added_V if bias is None else bias + self.added_V
        return FullHead(weight[: self.V] if len(weight) > self.V else weight, bias, self.scale, self.softcap)


class UnknownHeadError(Exception):
    """A family's logits are not a function of its head that `FullHead` can express. The message says why."""


class _ReachedHead(Exception):
    """Ends a forward pass at the head: carries the head's input."""

    def __init__(self, hidden: Tensor):
        super().__init__("the forward pass reached the head")
        self.hidden = hidden


def head_input(run: Callable[[], Any], head: nn.Module) -> Tensor:
    """Input [N, T, D] that `head` receives when `run()` is called; nothing after the head is computed."""

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise _ReachedHead(args[0])

    handle = head.register_forward_pre_hook(stop)
    try:
        run()
    except _ReachedHead as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise UnknownHeadError("its output head is not called by its forward pass")


def _matrices(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with a weight matrix [out, in], embeddings excepted."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            yield module


def find_head(model: Any, run: Callable[[], Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
    """The linear module that computes the logits, its input [N, T, D], and the logits [N, T, V] of one pass.

    Raises: UnknownHeadError if no linear module's output has as many columns as the logits.
    """
    calls: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            calls.append((module, args[0]))

    named = model.get_output_embeddings()
    single = isinstance(getattr(named, "weight", None), Tensor)
    for watched in ([named] if single else []), list(_matrices(model)):
        handles = [m.register_forward_pre_hook(note) for m in watched]
        try:
            logits = run() if handles else torch.empty(0)
        finally:
            for handle in handles:
                handle.remove()
        for module, hidden in reversed(calls):
            if logits.ndim == 3 and hidden.shape[:-1] == logits.shape[:-1] and len(_weight(module)) >= logits.shape[-1]:
                return module, hidden, logits
    raise UnknownHeadError("it has no linear LM head")


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


# Values that replace h Wᵀ + b: powers of two, so that multiplying by a scale is exact
_GRID = [0.0, *(s * 2.0**k for k in (-3, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14) for s in (1, -1)), 0.0]


@torch.no_grad()
def measure(run: Callable[[], Tensor], head: nn.Module, config: Any) -> HeadMap:
    """Measure what a family does to the product of `head`: scale, soft cap, bias and a cut of the vocabulary.

    The product is replaced by known numbers, the same for every token of the vocabulary. The logits then show the map
    exactly, whatever the family's config calls its parts.

    Args:
        run: a forward pass over ids [2, 16], to logits [2, 16, V].
        config: of the model; a measured number that equals one of its numbers up to rounding is replaced by it.
    Raises: UnknownHeadError if the map is not cap(scale · (x + b)).
    """
    grid = torch.tensor(_GRID, dtype=torch.float32)

    def replace(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        z = grid.to(output.device).view(2, 16, 1)
        return z.expand(output.shape).clone()

    handle = head.register_forward_hook(replace)
    try:
        logits = run()
    finally:
        handle.remove()
    f = logits.double().flatten(0, 1).cpu()  # [32, V]
    rounded = logits.dtype not in (torch.float32, torch.float64)  # a family that casts its logits
    tolerance, near = (1e-2, 4e-3) if rounded else (1e-4, 1e-6)
    at_zero = f[0]
    x = grid.double()
    moved = f - at_zero
    if not bool(moved.isfinite().all()):
        raise UnknownHeadError("it masks some tokens of its vocabulary")
    y = moved.mean(1)
    if bool(((moved - y[:, None]).abs() > tolerance * (1 + y.abs()[:, None])).any()):
        raise UnknownHeadError("it treats the tokens of its vocabulary differently")
    numbers = numbers_of(config)
    cap = _cap(y)
    if cap is None:
        scale = snapped(float(y[_GRID.index(2.0**10)]) / 2.0**10, numbers, near)
    else:
        cap = snapped(cap, numbers, near)
        scale = snapped(cap * math.atanh(float(y[_GRID.index(0.5)]) / cap) / 0.5, numbers, near)
    told = FullHead(torch.ones(1, 1, dtype=torch.float64), None, scale, cap)._capped(x)
    if scale == 0 or bool(((told - y).abs() > tolerance * (1e-3 + y.abs())).any()):
        raise UnknownHeadError("its logits are not a scaled or capped product of its head")
    added = None
    if at_zero.abs().max() > 1e-6:
        if cap is not None:
            raise UnknownHeadError("it adds a bias to capped logits")
        added = (at_zero / scale).to(_weight(head))
    return HeadMap(f.shape[1], scale, cap, added)


def _cap(y: Tensor) -> Optional[float]:
    """The limit of an odd, saturating map; None if it does not saturate."""
    top, below = float(y[_GRID.index(2.0**14)]), float(y[_GRID.index(2.0**11)])
    return top if top > 0 and top < 2 * below else None


def numbers_of(config: Any) -> list[float]:
    """Every number of a config, nested ones included, and its reciprocal."""

    def walk(value: Any) -> Iterator[float]:
        if isinstance(value, dict):
            for inner in value.values():
                yield from walk(inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value and math.isfinite(value):
            yield float(value)

    found = list(walk(config.to_dict()))
    return [1.0, *found, *(1.0 / v for v in found)]


def snapped(value: float, numbers: list[float], near: float) -> float:
    """The config's number within a relative distance `near` of a measured, rounded one; else the measured one."""
    nearest = min(numbers, key=lambda n: abs(n - value))
    return nearest if abs(nearest - value) <= near * abs(value) else value

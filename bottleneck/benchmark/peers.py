"""Other implementations of a head step that `benchmark heads` runs if they are installed, each imported on first use.

Peers run in their fastest setting: parameters and gradients in 16 bits, autograd. A peer that does not support a shape
raises, which the benchmark reports as a finding. How their wheels reach a machine without a network: docs/speed.md.

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUACK_CHUNKS = (2048, 4096, 8192)


class Case(NamedTuple):
    """Tensors of one step: h [N, D], A [V, R], B [R, D] in the dtype of h, y [N]."""

    h: Tensor
    A: Tensor
    B: Tensor
    y: Tensor


Work = Callable[[], tuple[Tensor, Tensor, Tensor]]  # one step: mean loss, dA, dB


def autograd(c: Case, loss: Callable[[], Tensor]) -> Work:
    """A step through autograd."""

    def work() -> tuple[Tensor, Tensor, Tensor]:
        c.A.grad = c.B.grad = None
        value = loss()
        value.backward()
        assert c.A.grad is not None and c.B.grad is not None
        return value.detach(), c.A.grad, c.B.grad

    return work


def products(c: Case) -> Work:
    """The three products alone, without softmax, logits in 16 bits: not a loss, but a lower bound on a step's time."""
    z = (c.h @ c.B.T).detach()

    def work() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            G = z @ c.A.T
            return G[0, 0], G.T @ z, (G @ c.A).T @ c.h

    return work


def eager(h: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
    """The loss in plain PyTorch."""
    return F.cross_entropy((h @ B.T @ A.T).float(), y)


def installed(c: Case) -> Iterator[tuple[str, Work]]:
    """Yield a label and a step for every peer that is installed."""
    yield "eager", autograd(c, lambda: eager(c.h, c.A, c.B, c.y))
    if hasattr(F, "linear_cross_entropy"):
        options: Any = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=1024)
        native: Any = F.linear_cross_entropy
        yield "torch native, chunks of 1024", autograd(c, lambda: native(c.h @ c.B.T, c.A, c.y, options=options))
    if c.h.is_cuda:
        yield from _on_a_gpu(c)


def _on_a_gpu(c: Case) -> Iterator[tuple[str, Work]]:
    torch._dynamo.reset()
    compiled = torch.compile(eager)
    yield "torch.compile", autograd(c, lambda: compiled(c.h, c.A, c.B, c.y))
    if importlib.util.find_spec("quack"):
        yield from _quack(c)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        yield "Liger, Triton", autograd(c, lambda: liger(c.A, c.h @ c.B.T, c.y))
    if importlib.util.find_spec("liger_kernel") and importlib.util.find_spec("cutlass"):
        yield "Liger, SM90", autograd(c, lambda: _liger_sm90(c))
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        yield "cut-cross-entropy", autograd(c, lambda: cut(c.h @ c.B.T, c.A, c.y))


def _quack(c: Case) -> Iterator[tuple[str, Work]]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    for size in [s for s in QUACK_CHUNKS if s <= len(c.h)] or [len(c.h)]:
        call = functools.partial(chunked_linear_cross_entropy, chunk_size=size)
        yield f"QuACK, chunks of {size}", autograd(c, functools.partial(_projected, call, c))


def _projected(call: Callable[..., Tensor], c: Case) -> Tensor:
    return call(c.h @ c.B.T, c.A, c.y)


def _liger_sm90(c: Case) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return liger_fused_linear_cross_entropy_sm90(c.h @ c.B.T, c.A, c.y)

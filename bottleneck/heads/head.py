"""`Head`, the base class of all kinds of heads: the interface that the bank and the evaluation use.

A kind must define its parameters, `logits` and `begin`. `Head` trains it with autograd, a chunk of tokens at a time, so
that only a few chunks of logits are held; it also saves, loads and evaluates the parameters. A kind whose loss can be
written in two numbers of each row of logits also defines `fused_loss`, which holds no logits on a GPU (see
`heads.parts`). A kind with a faster implementation, such as `low_rank`, overrides `read`, `token_losses`, `step` and
`taught_steps`.

Dims: N tokens, n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from bottleneck.backbone.model import FullHead
from bottleneck.core.errors import UserError, check
from bottleneck.core.extensions import HEAD_KINDS
from bottleneck.heads import parts
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.key import HeadKey
from bottleneck.losses import usable
from bottleneck.losses.chunked import chunk_rows
from bottleneck.losses.objective import BoundObjective
from bottleneck.losses.products import product

__all__ = ["Factored", "FactoredStates", "Head", "build_head", "count_parameters", "cross_entropy", "product"]

# (hidden states [n, D], targets [n], hidden states that the teacher reads [n, D']) -> loss [n]
TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
FUSED = "fused"  # `Head.impl` of kinds that use `fused_loss`
FUSIBLE = ("auto", "chunked", FUSED)  # `HeadKind.impls` of them
HELD_BYTES = 256 << 20  # of logits that `fused_loss` holds
MOST_TOKENS = 1 << 16  # of one call of `fused_loss`


class Head(nn.Module):
    """One head of a bank. Its parameters are float32 and must all receive a gradient.

    Args:
        start_rank: rank of the factors that `begin` is given.

    Attributes:
        wide: approximate number of float32 values per token and vocabulary entry held by its forward and backward pass.
        recordable: `step` with the fused loss only launches kernels: no autograd, no value read back by the host.
    """

    wide: int = 4
    recordable: bool = False

    def __init__(self, vocab_size: int, start_rank: int):
        super().__init__()
        self.vocab_size, self.start_rank = vocab_size, start_rank

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits [n, V] of hidden states, differentiable; float32 for 16-bit states, see `product`."""
        raise NotImplementedError

    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """Set the parameters from the factors of a start of rank `start_rank`."""
        raise NotImplementedError

    @property
    def held_entries(self) -> Optional[int]:
        """Entries of the vocabulary whose logits `fused_loss` holds; None: the kind does not define it."""
        return None

    def fused_loss(self, h_nD: Tensor, y_n: Tensor) -> Tensor:
        """Cross-entropy [n] of targets within the vocabulary, differentiable; equal to that of `logits`."""
        raise NotImplementedError

    def dense(self) -> Optional[Tensor]:
        """W [V, D] with logits = h Wᵀ, or None where the logits are not linear in h."""
        return None

    @property
    def parameters_count(self) -> int:
        """Number of trainable parameters, from which the learning rate is computed."""
        return sum(p.numel() for p in self.parameters())

    @property
    def flops_per_token(self) -> int:
        """FLOPs of its matrix products for one token: 2 for each time that a weight is used; here each once."""
        return 2 * self.parameters_count

    def tensors(self, whiten_DD: Optional[Tensor] = None) -> dict[str, Tensor]:
        """The tensors of its file, by name: parameters and buffers, in coordinates of h."""
        return {name: t.detach() for name, t in self.state_dict().items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the parameters from `tensors`. Raises UserError if names or shapes differ."""
        own = self.state_dict()
        for what, ours, theirs in (
            ("tensors", sorted(own), sorted(tensors)),
            ("shapes", *([list(t[k].shape) for k in sorted(own) if k in t] for t in (own, tensors))),
        ):
            check(ours == theirs, f"head file: its {what} are {theirs}; a head of this kind and rank has {ours}")
        for name, p in own.items():
            p.copy_(tensors[name])

    def use_coordinates(self, root_DD: Tensor) -> None:
        """See `HeadBank.use_coordinates`; only for kinds that declare `coordinates`."""
        raise NotImplementedError

    def finish_gradients(self, whiten_DD: Tensor) -> None:
        """See `HeadBank.finish_gradients`; only for kinds that declare `coordinates`."""
        raise NotImplementedError

    def impl(self, dtype: torch.dtype, tokens: int, wanted: str) -> str:
        """Name of the implementation of its training step; auto takes kernels where they multiply 16-bit states."""
        kernels = wanted == FUSED or (wanted == "auto" and dtype.itemsize == 2)
        if kernels and self.held_entries is not None and FUSED in usable(next(self.parameters()).device.type, dtype):
            return FUSED
        return "autograd, chunked"

    def read(
        self, dtype: torch.dtype, impl: str, whiten_DD: Optional[Tensor] = None, *, memory: Optional[int] = None
    ) -> Any:
        """Anything that can be prepared once per step; passed to the methods below until the parameters change.

        Here: the implementation. Args: memory: bytes that a step may take on a GPU, see `losses.memory`.
        """
        return impl

    @torch.no_grad()
    def float_logits(self, h_nD: Tensor, read: Any) -> Tensor:
        """Logits [n, V] in float32, without a graph."""
        return self.logits(h_nD).float()

    @torch.no_grad()
    def token_losses(self, h_ND: Tensor, y_N: Tensor, read: Any) -> Tensor:
        """Cross-entropy [N] of every token in nats, float32; 0 where the target is -1."""
        parts = []
        for h, y in self._chunks(h_ND, y_N, read):
            target = y.clamp(min=0).long()
            loss = self.fused_loss(h, target) if read == FUSED else cross_entropy(self.float_logits(h, read), target)
            parts.append(loss.masked_fill(y < 0, 0.0))
        return torch.cat(parts)

    def step(self, h_ND: Tensor, y_N: Tensor, read: Any, scale: float) -> Tensor:
        """Cross-entropy [N] of every token; scale · the gradient of its sum is added to every parameter's .grad."""

        def loss(h: Tensor, y: Tensor, t: Tensor) -> Tensor:
            return self.fused_loss(h, y) if read == FUSED else cross_entropy(self.logits(h), y)

        return self._autograd_step(h_ND, y_N, scale, loss, h_ND, read)

    @classmethod
    def taught_steps(
        cls, heads: Sequence[Head], h_ND: Tensor, y_N: Tensor, reads: Sequence[Any], scale: float, o: BoundObjective
    ) -> list[Tensor]:
        """`step` of several heads of this kind for an objective other than cross-entropy."""

        def of(head: Head) -> TokenLoss:
            return lambda h, y, t: o.loss(head.logits(h), y, o.log_teacher(t))

        return [head._autograd_step(h_ND, y_N, scale, of(head), o.read_by_teacher(h_ND)) for head in heads]

    def _chunks(self, h_ND: Tensor, y_N: Tensor, read: Any = None) -> list[tuple[Tensor, Tensor]]:
        if read == FUSED:
            rows = min(MOST_TOKENS, max(128, HELD_BYTES // (4 * max(1, self.held_entries or 0))))
        else:
            rows = max(1, chunk_rows(self.vocab_size, h_ND.device.type) // max(1, self.wide // 2))
        return list(zip(h_ND.split(rows), y_N.split(rows)))

    def _autograd_step(
        self, h_ND: Tensor, y_N: Tensor, scale: float, loss: TokenLoss, teacher_ND: Tensor, read: Any = None
    ) -> Tensor:
        parameters, parts = list(self.parameters()), []
        for (h, y), (t, _) in zip(self._chunks(h_ND.detach(), y_N, read), self._chunks(teacher_ND.detach(), y_N, read)):
            with torch.enable_grad():
                found = loss(h, y.clamp(min=0).long(), t).masked_fill(y < 0, 0.0)
                gradients = torch.autograd.grad(found.sum(), parameters)
            for p, gradient in zip(parameters, gradients):
                assert p.grad is not None  # never None after `HeadBank.zero_gradients`
                p.grad.add_(gradient, alpha=scale)
            parts.append(found.detach().float())
        return torch.cat(parts)


class Factored(Head):
    """Base of kinds with factors A [V, R] and B [R, D], which `begin` sets to the factors of the start."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int):
        super().__init__(vocab_size, start_rank=rank)
        self.A = nn.Parameter(torch.zeros(vocab_size, rank))
        self.B = nn.Parameter(torch.zeros(rank, hidden_size))

    def states(self, h_nD: Tensor) -> Tensor:
        """z = B h [n, R] in the dtype of h."""
        return product(h_nD, self.B).to(h_nD.dtype)

    @torch.no_grad()
    def begin(self, key: HeadKey, A_VR: Tensor, B_RD: Tensor, *, head: FullHead, moments: Calibration) -> None:
        """Set the factors to those of the start."""
        self.A.copy_(A_VR)
        self.B.copy_(B_RD)


class FactoredStates(Factored):
    """Base of kinds with logits = A z, which differ from a low-rank head in `states`, the z of a context, alone."""

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits z Aᵀ [n, V]."""
        return product(self.states(h_nD), self.A)

    @property
    def held_entries(self) -> int:
        """All of the vocabulary above the rank of the kernels."""
        return parts.held(self.A)

    def fused_loss(self, h_nD: Tensor, y_n: Tensor) -> Tensor:
        """lse − own of the one part z Aᵀ."""
        own, lse = parts.statistics(self.states(h_nD), self.A, y_n)
        return lse - own


class Pointwise(Factored):
    """Base of kinds with logits = f(A B h) for an increasing function f of one number, which a kind defines twice.

    Attributes: limit: for the kernels, where f is piecewise linear: the pieces are equal parts of [-limit, limit].
    """

    limit: float = 0.0

    def f(self, s_nV: Tensor) -> Tensor:
        """f of each logit, differentiable."""
        raise NotImplementedError

    def piece_slopes(self) -> Optional[Tensor]:
        """f for the kernels: the slopes [K] of its pieces, or None where it is s + log σ(s)."""
        return None

    def logits(self, h_nD: Tensor) -> Tensor:
        """Logits f(A B h) [n, V]."""
        return self.f(product(self.states(h_nD), self.A))

    @property
    def held_entries(self) -> int:
        """All of the vocabulary above the rank of the kernels."""
        return parts.held(self.A)

    def fused_loss(self, h_nD: Tensor, y_n: Tensor) -> Tensor:
        """lse − own of f(z Aᵀ)."""
        own, lse = parts.pointwise(self.states(h_nD), self.A, y_n, self.f, self.piece_slopes(), self.limit)
        return lse - own


def build_head(key: HeadKey, vocab_size: int, hidden_size: int) -> Head:
    """Build the head of a key; its parameters are not started yet. Raises UserError for an option that does not fit."""
    kind = HEAD_KINDS[key.kind]
    try:
        head: Head = kind.build(vocab_size, key.rank, hidden_size, **{**kind.options, **dict(key.options)})
    except UserError as error:  # about an option, which several kinds may have
        raise UserError(f"kind {key.kind}: {error}") from error
    return head


def count_parameters(key: HeadKey, vocab_size: int, hidden_size: int) -> int:
    """Number of trainable parameters of the head of a key, without allocating it."""
    with torch.device("meta"):
        return build_head(key, vocab_size, hidden_size).parameters_count


def cross_entropy(logits_nV: Tensor, y_n: Tensor) -> Tensor:
    """Loss [n] of targets, nats."""
    return nn.functional.cross_entropy(logits_nV, y_n, reduction="none")

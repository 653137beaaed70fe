"""The bank that trains many heads on one hidden state.

Dims: N tokens, D hidden size, R rank, V vocabulary, H heads. W_VD = A_VR @ B_RD for low-rank heads (Godey et al. 2024,
Sec. 5.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from bottleneck.core.errors import check
from bottleneck.core.extensions import HEAD_KINDS, OBJECTIVES
from bottleneck.heads.head import Head, build_head
from bottleneck.heads.key import HeadKey, full_rank_index
from bottleneck.losses import targets
from bottleneck.losses.objective import BoundObjective

__all__ = ["HeadBank", "HeadKey"]


class HeadBank(nn.Module):
    """Heads keyed by (rank, learning rate, seed, kind), all reading the same hidden states.

    Heads share nothing but their input. The gradient of the summed loss with respect to a head is the gradient of that
    head's loss, so a head trained in a bank equals the head trained alone, bit for bit on a CPU.

    Args:
        loss_impl: see `losses.linear_cross_entropy`; "auto" picks for each rank.
        tokens: tokens of one micro-batch, for the choice of "auto".
        loss_memory: see `losses.memory`; auto or bytes.
        coordinates: heads are trained in other coordinates, from `use_coordinates`; see `head.whiten` and
            `optim.lr_ratio`.

    Attributes:
        keys: the heads' keys, in order.
        objective: the training objective; None: cross-entropy. Validation losses are always cross-entropy. If the
            objective needs a teacher and has none, the bank's single head of rank D is the teacher: it is trained on
            cross-entropy, the others on its logits at the same step. A head has the same bits in a bank as beside its
            teacher alone.
        diverged: [H] flags, 1.0 for heads whose gradient has been non-finite; on the device, saved with the heads.
        whiten_DD: M^-1 of `use_coordinates`, None if heads are trained in coordinates of h; saved with the heads.

    Raises: UserError for a duplicate head, or a kind that cannot be trained in other coordinates.
    """

    diverged: Tensor
    whiten_DD: Optional[Tensor]

    def __init__(
        self,
        keys: list[HeadKey],
        vocab_size: int,
        hidden_size: int,
        loss_impl: str = "auto",
        tokens: int = 4096,
        coordinates: bool = False,
        loss_memory: str | int = "auto",
        objective: Optional[BoundObjective] = None,
    ):
        super().__init__()
        names = [k.name for k in keys]
        doubled = sorted({n for n in names if names.count(n) > 1})
        check(
            not doubled, f"ranks, rates and seeds: duplicate head {', '.join(doubled)} (rates are compared to 6 digits)"
        )
        for key in keys if coordinates else ():
            check(
                HEAD_KINDS[key.kind].coordinates,
                f"head.kind={key.kind}: does not go with head.whiten or optim.lr_ratio, which need factors A B",
            )
        self.keys, self.loss_impl, self.tokens, self.hidden_size = keys, loss_impl, tokens, hidden_size
        self.loss_memory = loss_memory
        self.memory: Optional[int] = None  # bytes of a head step, set by `losses.memory.decide`
        self.objective = objective
        self.heads = nn.ModuleDict({k.name: build_head(k, vocab_size, hidden_size) for k in keys})
        self.register_buffer("diverged", torch.zeros(len(keys)))
        self.register_buffer("whiten_DD", torch.eye(hidden_size) if coordinates else None)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, key: HeadKey) -> Any:
        return self.heads[key.name]

    @torch.no_grad()
    def use_coordinates(self, root_DD: Tensor, inverse_DD: Tensor) -> None:
        """Train B in other coordinates: from now on the parameter B holds C = B M [R, D], which reads x = M^-1 h.

        The heads stay the same functions of h. A step of AdamW moves all entries of a parameter by about the same
        amount. In many language models one entry of h is a thousand times larger than the others: a rate at which the
        others learn then moves its column of B far too much. With M = Σ^½ all entries of x have variance 1. With M / s
        a step of C is s times as long in B.

        Args: M and its inverse: Σ^½ and Σ^-½ of the hidden states' covariance from `calibration.roots`, or a multiple
            of them.
        """
        for head in self._heads():
            head.use_coordinates(root_DD)
        assert self.whiten_DD is not None
        self.whiten_DD.copy_(inverse_DD)

    def factors(self, key: HeadKey) -> tuple[Tensor, Tensor]:
        """A [V, R] and B [R, D] of a low-rank head, in coordinates of h."""
        factors: tuple[Tensor, Tensor] = self[key].factors(self.whiten_DD)
        return factors

    def tensors(self, key: HeadKey) -> dict[str, Tensor]:
        """The tensors stored in a head's file, by name, in coordinates of h."""
        tensors: dict[str, Tensor] = self[key].tensors(self.whiten_DD)
        return tensors

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """After the last tokens of a step, turn the gradients of B into those of C: dC = dB M^-1."""
        if self.whiten_DD is not None:
            for head in self._heads():
                head.finish_gradients(self.whiten_DD)

    def impl(self, key: HeadKey, dtype: torch.dtype) -> str:
        """The loss implementation that a head uses for hidden states of a dtype; never "auto"."""
        impl: str = self[key].impl(dtype, self.tokens, self.loss_impl)
        return impl

    def cast(self, dtype: torch.dtype, impl: Optional[str] = None) -> list[Any]:
        """The form of each head that `accumulate`, `losses` and `float_logits` read; valid until parameters change.

        Args: impl: loss implementation that replaces each head's own.
        """
        return [
            self[key].read(dtype, impl or self.impl(key, dtype), self.whiten_DD, memory=self.memory)
            for key in self.keys
        ]

    def zero_gradients(self) -> None:
        """Set all gradients to zeros, in place where they exist: `accumulate` adds to them."""
        gradients = []
        for p in self.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        torch._foreach_zero_(gradients)

    @torch.no_grad()
    def accumulate(
        self, h_ND: Tensor, y_N: Tensor, cast: list[Any], scale: float, teacher_ND: Optional[Tensor] = None
    ) -> Tensor:
        """Add scale · gradient of every head's summed loss to its .grad.

        Args: teacher_ND: see `BoundObjective.states_ND`.
        Returns: summed losses of the heads, [H], nats, float64.
        """
        t, heads, o = targets(y_N), self._heads(), self.objective
        teacher = self.teacher_index if self._teaches_itself else None
        taught = [i for i in range(len(heads)) if i != teacher] if o is not None else []
        if o is not None and teacher_ND is not None:
            o = dataclasses.replace(o, states_ND=teacher_ND)
        found = {i: heads[i].step(h_ND, t, cast[i], scale) for i in range(len(heads)) if i not in taught}
        if o is not None and teacher is not None:
            o = dataclasses.replace(o, teacher_logits=lambda h_nD: heads[teacher].float_logits(h_nD, cast[teacher]))
        for kind in dict.fromkeys(type(heads[i]) for i in taught):
            group = [i for i in taught if type(heads[i]) is kind]
            assert o is not None
            losses = kind.taught_steps([heads[i] for i in group], h_ND, t, [cast[i] for i in group], scale, o)
            found |= zip(group, losses)
        return _sums(found[i] for i in range(len(heads)))

    @property
    def _teaches_itself(self) -> bool:
        o = self.objective
        return o is not None and o.declared.teacher and o.teacher_logits is None

    def describe_objective(self) -> str:
        """One line for the log: the objective, its options and the teacher."""
        o = self.objective
        if o is None:
            return OBJECTIVES["ce"].summary
        options = "".join(f", {name} {value}" for name, value in o.options.items())
        whose = (
            f"{self.keys[self.teacher_index].name}, the head trained beside them" if self._teaches_itself else o.whose
        )
        return f"{o.declared.summary}{options}" + (f"; teacher: {whose}" if o.declared.teacher else "")

    @property
    def teacher_index(self) -> int:
        """Index of the teacher among `keys` under head.teacher=trained: the head of rank D.

        Raises UserError unless there is exactly one.
        """
        return full_rank_index(self.keys, self.hidden_size)

    @torch.no_grad()
    def losses(self, h_ND: Tensor, y_N: Tensor, cast: list[Any]) -> Tensor:
        """Summed cross-entropy of every head on the same tokens: [H], nats, float64 sums of float32 losses."""
        t = targets(y_N)
        return _sums(head.token_losses(h_ND, t, read) for head, read in zip(self._heads(), cast))

    def _heads(self) -> list[Head]:
        return [self[key] for key in self.keys]


def _sums(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack([loss_N.sum(dtype=torch.float64) for loss_N in losses])

"""Low-rank heads `W = A B` and the bank that trains many of them on one hidden state.

Dims: N tokens, D hidden size, R rank, V vocabulary, H heads. W_VD = A_VR @ B_RD (Godey et al. 2024, Sec. 5.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Optional

import torch
from torch import Tensor, nn

import bottleneck.losses.distill as distill
from bottleneck.core.errors import UserError, check
from bottleneck.losses import Weights, choose, step, targets, weights


@dataclass(frozen=True)
class HeadKey:
    """What tells one head of a bank from another. Everything about a head follows from its key and the run's config."""

    rank: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """File and module name without dots, such as r64_lr1e-2_s0; exact to 6 digits of the rate."""
        d = Decimal(f"{self.lr:.6g}").normalize().as_tuple()
        return f"r{self.rank}_lr{''.join(map(str, d.digits))}e{d.exponent}_s{self.seed}"


class LowRankHead(nn.Module):
    """One head: parameters A [V, R] and B [R, D] in float32."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(vocab_size, rank))
        self.B = nn.Parameter(torch.zeros(rank, hidden_size))

    @property
    def parameters_count(self) -> int:
        """r (V + d): what the learning rate is scaled by."""
        return self.A.numel() + self.B.numel()

    @torch.no_grad()
    def set(self, A_VR: Tensor, B_RD: Tensor) -> None:
        self.A.copy_(A_VR)
        self.B.copy_(B_RD)


class HeadBank(nn.Module):
    """Heads keyed by (rank, learning rate, seed), all reading the same hidden states.

    Heads share nothing but their input: the sum of their losses has for each head the gradient of its own loss alone,
    so a head trained in a bank is the head trained by itself, bit for bit on a CPU.

    Args:
        loss_impl: see `losses.linear_cross_entropy`; "auto" picks for each rank.
        tokens: tokens of one micro-batch, which "auto" picks by.
        loss_memory: see `losses.memory`; auto or bytes.
        coordinates: B is trained in other coordinates, from `use_coordinates`, see `head.whiten` and `optim.lr_ratio`.

    Attributes:
        keys: the heads' keys, in order.
        objective: what heads are trained on instead of cross-entropy, see `losses.distill`; their `losses` stay cross-entropy.
            Where it has no teacher, the one head of rank D is that: it is trained on cross-entropy, the others on what it says
            at that step. Any of them has the bits that it has with its teacher alone.
        diverged: [H] flags, 1.0 for heads whose gradient has been non-finite; on the device, saved with the heads.
        whiten_DD: what `use_coordinates` was given, None where B is trained as it is; saved with the heads.
    """

    def __init__(
        self,
        keys: list[HeadKey],
        vocab_size: int,
        hidden_size: int,
        loss_impl: str = "auto",
        tokens: int = 4096,
        coordinates: bool = False,
        loss_memory: str | int = "auto",
    ):
        super().__init__()
        names = [k.name for k in keys]
        doubled = {n for n in names if names.count(n) > 1}
        if doubled:
            raise UserError(
                f"ranks, rates and seeds: the head {', '.join(sorted(doubled))} is there twice (rates count to 6 digits)"
            )
        self.keys, self.loss_impl, self.tokens = keys, loss_impl, tokens
        self.loss_memory = loss_memory
        self.memory: Optional[int] = None  # bytes of a head step once they are decided
        self.objective: Optional[distill.Objective] = None
        self.heads = nn.ModuleDict({k.name: LowRankHead(vocab_size, k.rank, hidden_size) for k in keys})
        self.register_buffer("diverged", torch.zeros(len(keys)))
        self.register_buffer("whiten_DD", torch.eye(hidden_size) if coordinates else None)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, key: HeadKey) -> LowRankHead:
        return self.heads[key.name]  # type: ignore[return-value]

    @torch.no_grad()
    def use_coordinates(self, root_DD: Tensor, inverse_DD: Tensor) -> None:
        """Heads stay what they are; from now on their parameter B holds C = B M [R, D], which reads x = M^-1 h.

        A step of AdamW moves every entry of a parameter alike. Where one entry of h is a thousand times the others, as in many
        language models, a rate at which the others learn throws its column of B about; with M = Σ^½ entries of x are all of
        variance 1. With M / s a step of C is s times as long, in B.

        Args: M and its inverse: Σ^½ and Σ^-½ of the hidden states' covariance from `initial.roots`, or a multiple of them.
        """
        for head in self.heads.values():
            head.B.copy_(head.B.double() @ root_DD.to(head.B.device))
        self.whiten_DD.copy_(inverse_DD)

    def factors(self, key: HeadKey) -> tuple[Tensor, Tensor]:
        """A [V, R] and B [R, D] of a head, which reads hidden states as they are."""
        head = self[key]
        return head.A.detach(), head.B.detach() if self.whiten_DD is None else head.B.detach() @ self.whiten_DD

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """`accumulate` adds to gradients of B; once all tokens of a step are in, those of C are dC = dB Σ^-½."""
        for head in self.heads.values() if self.whiten_DD is not None else ():
            head.B.grad.copy_(head.B.grad @ self.whiten_DD.T)  # in place: it may be a part of a bucket of DDP's

    def impl(self, key: HeadKey, dtype: torch.dtype) -> str:
        """The implementation of the loss that a head runs on for hidden states of a dtype: never "auto"."""
        A = self[key].A
        return choose(A.device, dtype, self.tokens, *A.shape) if self.loss_impl == "auto" else self.loss_impl

    def cast(self, dtype: torch.dtype) -> list[Weights]:
        """All heads as the products read them, for `accumulate` and `losses`; good until the parameters change."""
        return [weights(*self.factors(key), dtype, self.impl(key, dtype), self.memory) for key in self.keys]

    def zero_gradients(self) -> None:
        """Gradients of zeros, in place where there are some: `accumulate` adds to them."""
        for p in self.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        torch._foreach_zero_([p.grad for p in self.parameters()])

    @torch.no_grad()
    def accumulate(self, h_ND: Tensor, y_N: Tensor, cast: list[Weights], scale: float) -> Tensor:
        """Add scale · gradient of every head's summed loss to its .grad, without autograd and without a copy.

        Returns: summed losses of the heads, [H], nats, float64.
        """
        t = targets(y_N)
        heads = [self[key] for key in self.keys]
        o = self.objective
        teacher = self.teacher if o is not None and o.teacher is None else None
        taught = [i for i in range(len(heads)) if i != teacher] if o is not None else []
        found = {
            i: step(h_ND, cast[i], t, heads[i].A.grad, heads[i].B.grad, scale)
            for i in range(len(heads))
            if i not in taught
        }
        if taught:
            if teacher is not None:
                o = o._replace(teacher=lambda h_nD: distill.head_logits(h_nD, cast[teacher]))
            gradients = [(heads[i].A.grad, heads[i].B.grad) for i in taught]
            found |= zip(taught, distill.steps(h_ND, [cast[i] for i in taught], t, gradients, scale, o))
        return _sums(found[i] for i in range(len(heads)))

    @property
    def teacher(self) -> int:
        """Which of `keys` has the rank of the hidden state. Raises UserError where not exactly one has."""
        hidden_size = self[self.keys[0]].B.shape[1]
        full = [i for i, key in enumerate(self.keys) if key.rank == hidden_size]
        check(
            len(full) == 1,
            f"head.teacher=trained: wants one head of the full rank {hidden_size} in the run, with one rate and one seed; here are {len(full)}",
        )
        return full[0]

    @torch.no_grad()
    def losses(self, h_ND: Tensor, y_N: Tensor, cast: list[Weights]) -> Tensor:
        """Summed cross-entropy of every head on the same tokens: [H], nats, float64."""
        t = targets(y_N)
        return _sums(step(h_ND, w, t) for w in cast)


def _sums(losses: Any) -> Tensor:
    return torch.stack([loss_N.sum(dtype=torch.float64) for loss_N in losses])

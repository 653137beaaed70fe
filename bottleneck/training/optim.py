"""Learning rates from parameter counts, AdamW with one group a head, its schedule, and clipping per head."""

from __future__ import annotations

import math
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from bottleneck.config.schema import OptimConfig
from bottleneck.heads.bank import HeadBank, HeadKey


def power_rate(c: OptimConfig, init: str, rank: int, hidden_size: int, vocab_size: int) -> float:
    """lr = lr_ref · (n_ref / n)^γ with n = r (V + d) trainable parameters; 3 significant digits.

    The paper searches a rate per rank because n changes with r (its Fig. 11); this is the rule through such a search.
    """
    lr_ref, gamma = (float(v[init] if isinstance(v, dict) else v) for v in (c.lr_ref, c.gamma))
    n_ref = hidden_size * (vocab_size + hidden_size) if c.n_ref is None else c.n_ref
    return float(f"{lr_ref * (n_ref / (rank * (vocab_size + hidden_size))) ** gamma:.3g}")


def rates(c: OptimConfig, init: str, rank: int, hidden_size: int, vocab_size: int) -> list[float]:
    """The learning rates to train at one rank."""
    if c.lr is not None:
        return list(c.lr)
    if c.lr_rule == "table":
        return list(c.table[rank])
    power = power_rate(c, init, rank, hidden_size, vocab_size)
    if c.lr_rule == "power":
        return [power]
    return list(c.lrs) if c.lrs is not None else [float(f"{power * f:.3g}") for f in c.grid_factors]


def bank_keys(
    c: OptimConfig, init: str, ranks: list[int], seeds: list[int], hidden_size: int, vocab_size: int
) -> list[HeadKey]:
    """The bank: ranks x rates x seeds."""
    return [
        HeadKey(rank, lr, seed)
        for rank in ranks
        for lr in rates(c, init, rank, hidden_size, vocab_size)
        for seed in seeds
    ]


class HeadAdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, with a divisor of the gradient and a flag that skips the update for each parameter group.

    The fused kernels already take both (`grad_scale` and `found_inf`, made for loss scaling); here every group has its own, so
    clipping costs no pass over the gradients, and a diverged head stays as it is without the host ever asking the device.

    Args: flags: [groups], 1.0 where a group is skipped; read at every step.
    Attributes: divisors: [groups], what gradients are divided by in the next step; from `clip_per_head`.
    """

    def __init__(self, groups: list[dict[str, Any]], flags: Tensor, **options: Any):
        super().__init__(groups, fused=True, **options)
        self.flags, self.divisors = flags, torch.ones_like(flags)

    def norms(self) -> Tensor:
        """Norms of the groups' gradients, [groups]."""
        return _norms([g["params"] for g in self.param_groups])

    def number(self, group: dict[str, Any]) -> int:
        """Which entry of flags and divisors is a group's."""
        return next(i for i, g in enumerate(self.param_groups) if g is group)

    def _init_group(self, group: dict[str, Any], *args: Any) -> Any:
        index = self.number(group)
        self.found_inf, self.grad_scale = self.flags[index], self.divisors[index]
        return super()._init_group(group, *args)


def build_optimizer(bank: HeadBank, c: OptimConfig) -> HeadAdamW:
    """One parameter group a head, at its own rate."""
    groups = [{"params": [bank[key].A, bank[key].B], "lr": key.lr, "name": key.name} for key in bank.keys]
    return HeadAdamW(groups, bank.diverged, betas=tuple(c.betas), eps=c.eps, weight_decay=c.weight_decay)


def schedule(c: OptimConfig, steps: int) -> Callable[[int], float]:
    """Share of the peak rate at a step: linear warm-up, then cosine, `lr_final` when the last step is done."""
    warmup = max(1, round(c.warmup * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return c.lr_final + (1 - c.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


@torch.no_grad()
def clip_per_head(
    bank: HeadBank, clip: float | None, losses: Tensor, norms: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """What scales each head's gradient to norm `clip` at most, each by itself; flag heads whose loss or norm is not finite.

    Clipping over all heads together (as Lightning's gradient_clip_val does) would make a head depend on its company.
    Losses and gradients are equal on all processes here, so every process flags alike. Nothing waits for the device.

    Args:
        losses: [H]; only asked whether they are finite.
        norms: of the gradients, [H], where they lie elsewhere than in the heads' own .grad (`HeadAdamW.norms`).
    Returns: gradient norms [H], and what to divide the gradients by [H] (`HeadAdamW.divisors`).
    """
    norms = _norms([[bank[key].A, bank[key].B] for key in bank.keys]) if norms is None else norms
    sick = ~(torch.isfinite(norms) & torch.isfinite(losses))
    bank.diverged.copy_(torch.maximum(bank.diverged, sick.float()))
    divisors = torch.ones_like(norms) if clip is None else ((norms + 1e-6) / clip).clamp(min=1.0)
    return norms, divisors


@torch.no_grad()
def _norms(groups: list[list[Tensor]]) -> Tensor:
    parts = torch._foreach_norm([p.grad for group in groups for p in group])
    return torch.linalg.vector_norm(torch.stack(parts).view(len(groups), -1), dim=1)

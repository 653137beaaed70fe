"""Learning rates from parameter counts, AdamW with one group per head, its schedule, and clipping per head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from bottleneck.config.head_groups import HeadGroup
from bottleneck.config.numbers import as_list
from bottleneck.config.schema import OptimConfig
from bottleneck.core.errors import check
from bottleneck.core.extensions import STARTS
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.head import count_parameters
from bottleneck.heads.key import LOW_RANK, HeadKey, as_options
from bottleneck.training.fused_adamw import HeadAdamW, group_norms


def power_rate(
    c: OptimConfig,
    init: str,
    rank: int,
    hidden_size: int,
    vocab_size: int,
    *,
    parameters: Optional[int] = None,
    kind: str = LOW_RANK,
) -> float:
    """lr = lr_ref · (n_ref / n)^γ with n trainable parameters, to 3 significant digits.

    The paper searches a rate per rank because n changes with r (its Fig. 11); this is the rule through such a search.

    Args: parameters: n; default: r (V + d), those of a low-rank head. kind: whose lr_ref, if it is given, is used.
    Raises: UserError if the rate is not a number above 0.
    """
    start = STARTS[init]
    lr_ref, gamma = (
        float(given.get(init, declared) if isinstance(given, dict) else given)
        for given, declared in ((c.lr_ref, start.lr_ref), (c.gamma, start.gamma))
    )
    lr_ref = float(c.kind_lr_ref.get(kind, lr_ref))
    n_ref = hidden_size * (vocab_size + hidden_size) if c.n_ref is None else c.n_ref
    n = rank * (vocab_size + hidden_size) if parameters is None else parameters
    # at rank d a closed form equals the original head, and a large rate would only make it worse
    factor = c.full_rank if start.closed_form and rank == hidden_size else 1.0
    try:
        rate = float(f"{lr_ref * (n_ref / n) ** gamma * factor:.3g}")
    except OverflowError:
        rate = math.inf
    rule = f"optim.lr_ref={lr_ref:g}, optim.gamma={gamma:g}, optim.full_rank={factor:g}"
    check(0 < rate < math.inf, f"{rule}: the power rule gives the rate {rate:g} at rank {rank}; give other values")
    return rate


def rates(
    c: OptimConfig,
    init: str,
    rank: int,
    hidden_size: int,
    vocab_size: int,
    *,
    parameters: Optional[int] = None,
    kind: str = LOW_RANK,
) -> list[float]:
    """The learning rates of one rank. Args: parameters, kind: see `power_rate`. Raises: UserError as it does."""
    if c.lr is not None:
        return list(as_list(c.lr))
    if c.lr_rule == "table":
        return list((c.table or {})[rank])
    power = power_rate(c, init, rank, hidden_size, vocab_size, parameters=parameters, kind=kind)
    if c.lr_rule == "power":
        return [power]
    if c.lrs is not None:
        return list(c.lrs)
    grid = [float(f"{power * f:.3g}") for f in c.grid_factors]
    wrong = [rate for rate in grid if not 0 < rate < math.inf]
    factors = f"optim.grid_factors={list(c.grid_factors)}: gives a rate of {wrong[0] if wrong else 0:g} at rank {rank}"
    check(not wrong, f"{factors}; give other factors")
    return grid


def bank_keys(
    c: OptimConfig, init: str, groups: Sequence[HeadGroup], seeds: list[int], hidden_size: int, vocab_size: int
) -> list[HeadKey]:
    """The keys of the bank: for each group ranks x rates x seeds.

    Args: groups: with ranks as lists. Options that differ from their default become part of the keys.
    Raises: UserError where two groups have a head in common, as `rates` does.
    """
    keys: list[HeadKey] = []
    owners: dict[str, str] = {}  # name of a head -> its entry of `heads`
    for group in groups:
        declared, before = group.declared.options, len(keys)
        chosen = as_options({name: value for name, value in group.options.items() if value != declared[name]})
        for rank in group.ranks:
            assert isinstance(rank, int)  # auto is resolved
            first = HeadKey(rank, 1.0, 0, group.kind, chosen)
            parameters = count_parameters(first, vocab_size, hidden_size)
            shape = rank, hidden_size, vocab_size
            for lr in group.lr or rates(c, init, *shape, parameters=parameters, kind=group.kind):
                keys += [dataclasses.replace(first, lr=lr, seed=seed) for seed in seeds]
        entry = group.where.removesuffix(".kind")
        for key in keys[before:]:
            owner = owners.setdefault(key.name, entry)
            check(owner == entry, f"{entry}: the same head as {owner}, {key.name}; give every head once")
    return keys


def trained_parameters(bank: HeadBank, key: HeadKey) -> list[nn.Parameter]:
    """A head's parameters in the order of the optimizer and of checkpoints."""
    return list(bank[key].parameters())


def build_optimizer(bank: HeadBank, c: OptimConfig) -> HeadAdamW:
    """AdamW with one parameter group per head, at the head's own rate."""
    groups = [{"params": trained_parameters(bank, key), "lr": key.lr, "name": key.name} for key in bank.keys]
    return HeadAdamW(groups, bank.diverged, betas=tuple(c.betas), eps=c.eps, weight_decay=c.weight_decay)


def schedule(c: OptimConfig, steps: int) -> Callable[[int], float]:
    """Share of the peak rate at a step: linear warm-up, then a cosine that reaches `lr_final` after the last step."""
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
    """Scale each head's gradient to norm `clip` at most, and flag heads whose loss or norm is not finite.

    Heads are clipped separately: a norm over all heads together, as in Lightning's gradient_clip_val, would make a head
    depend on the others. Losses and gradients are already equal on all processes, so all processes set the same flags.
    Nothing waits for the device.

    Args:
        losses: [H]; only checked for being finite.
        norms: gradient norms [H], if the gradients are not in the heads' .grad (`HeadAdamW.norms`).
    Returns: gradient norms [H], and what to divide the gradients by [H] (`HeadAdamW.divisors`).
    """
    norms = group_norms([trained_parameters(bank, key) for key in bank.keys]) if norms is None else norms
    sick = ~(torch.isfinite(norms) & torch.isfinite(losses))
    bank.diverged.copy_(torch.maximum(bank.diverged, sick.float()))
    divisors = torch.ones_like(norms) if clip is None else ((norms + 1e-6) / clip).clamp(min=1.0)
    return norms, divisors

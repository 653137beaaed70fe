"""AdamW with a gradient divisor and a skip flag for each parameter group, by a hook into torch's fused AdamW.

torch's fused kernels take `grad_scale` and `found_inf`, made for loss scaling. `step` reads both from the optimizer
once, for all groups. `_init_group` runs just before each group is updated, so this module sets both there.
tests/training/test_private_hooks.py fails if torch changes this order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class HeadAdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, one parameter group per head.

    Clipping needs no extra pass over the gradients, and a diverged head is frozen without the host reading the device.

    Args: flags: [groups], 1.0 where a group is skipped; read at every step.
    Attributes: divisors: [groups], what gradients are divided by in the next step; from `optim.clip_per_head`.
    """

    def __init__(self, groups: list[dict[str, Any]], flags: Tensor, **options: Any):
        super().__init__(groups, fused=True, **options)
        self.flags, self.divisors = flags, torch.ones_like(flags)

    def norms(self) -> Tensor:
        """Norms of the groups' gradients, [groups]."""
        return group_norms([g["params"] for g in self.param_groups])

    def group_index(self, group: dict[str, Any]) -> int:
        """The entry of flags and divisors that belongs to a group."""
        return next(i for i, g in enumerate(self.param_groups) if g is group)

    def _init_group(self, group: dict[str, Any], *args: Any) -> Any:
        index = self.group_index(group)
        self.found_inf, self.grad_scale = self.flags[index], self.divisors[index]
        return super()._init_group(group, *args)


@torch.no_grad()
def group_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """Gradient norms of groups of parameters, [groups]. A norm has the same bits whatever the other groups are."""
    gradients = [p.grad for group in groups for p in group if p.grad is not None]  # never None, for mypy
    parts = iter(torch._foreach_norm(gradients))
    norms = [[next(parts) for _ in group] for group in groups]
    if {len(n) for n in norms} == {2}:  # low-rank heads only: one operation for all
        return torch.linalg.vector_norm(torch.stack([x for n in norms for x in n]).view(-1, 2), dim=1)
    return torch.stack([functools.reduce(_joined, n) for n in norms])


def _joined(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([a, b]).view(1, 2), dim=1).squeeze(0)

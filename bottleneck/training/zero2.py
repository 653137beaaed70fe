"""Optimizer state of the heads sharded by DeepSpeed's ZeRO stage 2: each process holds a share of AdamW's moments.

DeepSpeed concatenates A and B of a head, as one parameter group, and assigns an equal part of it to every process. It
reduces the gradient of a part to its owner, the owner updates the part, and DeepSpeed gathers the heads again. The
optimizer is `HeadAdamW`, whose divisors and flags belong to a whole group, so clipping, divergence and rates of a head
are the same as under DDP. DeepSpeed's own clipping and overflow check, which combine all heads, are off.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from bottleneck.backbone.sharding import deepspeed
from bottleneck.config.schema import OptimConfig
from bottleneck.heads.bank import HeadBank
from bottleneck.training.fused_adamw import HeadAdamW
from bottleneck.training.optim import build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # elements that are reduced or gathered together
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 2,
        "compute_grad_norm": False,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    },
}


class Zero2Strategy(DDPStrategy):
    """DDP's processes, with gradients reduced by DeepSpeed."""

    def configure_ddp(self) -> None:
        """Return the module without DDP's wrapper, which would reduce the gradients a second time."""

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        sharded: Any = self.optimizers[0]
        sharded.backward(closure_loss)
        return closure_loss


class Zero2AdamW(torch.optim.Optimizer):
    """The sharded optimizer, with the interface, groups and state of `HeadAdamW`.

    A checkpoint can therefore be resumed with another number of processes, and with or without ZeRO. DeepSpeed's engine
    is built at the first backward pass, once heads and state have their initial values.

    Attributes: divisors: as `HeadAdamW`.
    """

    def __init__(self, bank: HeadBank, c: OptimConfig):
        self.inner = _GroupByGroup(bank, c)
        super().__init__([dict(g) for g in self.inner.param_groups], self.inner.defaults)
        self.bank, self.divisors = bank, self.inner.divisors
        self.engine: Any = None
        self._restored: dict[int, Any] = {}
        self._whole: Optional[dict[int, Any]] = None

    def backward(self, loss: Tensor) -> None:
        """Reduce every gradient to the process that holds the parameter's moments."""
        if self.engine is None:
            self._begin()
        self.engine.backward(loss)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Norms of the heads' reduced gradients, [H], the same on every process."""
        parts = self.engine.optimizer.averaged_gradients
        squares = torch.stack(
            [torch.stack(torch._foreach_norm(parts[i])).double().square().sum() for i in range(len(self.param_groups))]
        )
        dist.all_reduce(squares)
        return squares.sqrt().float()

    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        result = closure() if closure is not None else None
        for mine, theirs in zip(self.param_groups, self.inner.param_groups):
            theirs["lr"] = mine["lr"]
        self.inner.divisors = self.divisors
        self.engine.step()
        return result

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the moments on one process, in CPU memory. Lightning calls this on all processes before it saves."""
        self._whole = {}
        for group, flat, shapes in self._groups() if self.engine is not None else ():
            state = self.inner.state[flat]
            whole: dict[str, Any] = {name: _gather(state[name], to) for name in MOMENTS}
            if dist.get_rank() != to:
                continue
            start = 0
            for index, shape in zip(group, shapes):
                cut = {name: whole[name][start : start + shape.numel()].view(shape).clone() for name in MOMENTS}
                self._whole[index] = {"step": state["step"].cpu().clone(), **cut}
                start += shape.numel()
        if self.engine is None:
            self._whole = self._restored

    def state_dict(self) -> dict[str, Any]:
        """As `HeadAdamW.state_dict`. Only the process that gathered the moments has them."""
        state, self._whole = self._whole or {}, None
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._restored = state_dict["state"]

    def _groups(self) -> list[tuple[list[int], Tensor, list[torch.Size]]]:
        """For each group: indices of its parameters, this process's flat part of them, their shapes."""
        out, first = [], 0
        for mine, theirs in zip(self.param_groups, self.inner.param_groups):
            shapes = [p.shape for p in mine["params"]]
            out.append((list(range(first, first + len(shapes))), theirs["params"][0], shapes))
            first += len(shapes)
        return out

    def _begin(self) -> None:
        device = self.bank.diverged.device
        self.engine = deepspeed(device).initialize(model=self.bank, optimizer=self.inner, config=CONFIG)[0]
        if not self._restored:
            return
        for group, flat, _ in self._groups():
            saved = [self._restored[index] for index in group]
            state = {"step": saved[0]["step"].to(device, torch.float32)}
            for name in MOMENTS:
                whole = torch.cat([s[name].flatten() for s in saved])
                first = dist.get_rank() * flat.numel()
                part = whole[first : first + flat.numel()]
                state[name] = torch.nn.functional.pad(part, (0, flat.numel() - len(part))).to(flat)
            self.inner.state[flat] = state
        self._restored = {}


class _GroupByGroup(HeadAdamW):
    """`HeadAdamW` for DeepSpeed, which steps one group at a time, with only that group in `param_groups`."""

    def __init__(self, bank: HeadBank, c: OptimConfig):
        plain = build_optimizer(bank, c)
        super().__init__(plain.param_groups, plain.flags)
        self.order = [g["name"] for g in self.param_groups]

    def group_index(self, group: dict[str, Any]) -> int:
        return self.order.index(group["name"])


def _gather(part: Tensor, to: int) -> Optional[Tensor]:
    """Gather equal parts of all processes end to end, on the CPU of process `to`. Returns None on the others."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if dist.get_rank() == to else None
    dist.gather(part, parts, to)
    return None if parts is None else torch.cat([p.cpu() for p in parts])

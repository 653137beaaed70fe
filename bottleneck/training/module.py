"""The LightningModule: one frozen forward, many heads. One training batch is one optimizer step."""

from __future__ import annotations

import logging
import math
import time
from typing import Any, Callable, Iterable, Optional, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.backbone.target import Target
from bottleneck.config.schema import OptimConfig
from bottleneck.core.errors import check
from bottleneck.core.extensions import metrics
from bottleneck.evaluation.agreement import compare
from bottleneck.evaluation.sums import derived, validate
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.micro_steps import MicroSteps
from bottleneck.losses import memory
from bottleneck.training.optim import build_optimizer, clip_per_head, schedule
from bottleneck.training.signals import Flag
from bottleneck.training.timing import StepTimer

log = logging.getLogger(__name__)


class HandOver(torch.autograd.Function):
    """Returns 0; its backward adds zeros to existing gradients so that DDP's hooks fire."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.shapes = [p.shape for p in parameters]
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.new_zeros(()).expand(shape) for shape in ctx.shapes)


class HeadSweep(pl.LightningModule):
    """Trains the heads of a bank on the hidden states of a frozen backbone.

    Args:
        start: sets the bank's initial values, on the training device; called once, before step 0, never on a resume.
        validation: (process, processes) -> that process's validation batches.
        config, data_hash: stored in checkpoints; a resumed run must have the same text.
        bands: frequency band of every token id [V], from `agreement.bands_of`.
        text_bytes: size of the validation text.
        domains: name and number of validation blocks of each text of a mix.
        flag: carries a signal to the other processes.
        build: makes the optimizer.
        cuda_graphs: record micro-steps where possible, see `heads.micro_steps`.
        resume_step: step of the checkpoint that this process resumes from.
        target: the model of head.teacher=model:PATH, run on the same tokens as the backbone.
        accepted: called once the heads have started or have been restored, before anything is logged.

    Attributes:
        details: comparison of the final heads with the original head, from `agreement.compare`.
        initial, final: validation losses {head name: nats} at step 0 and after the last step.
        reference: validation loss of the original head, nats.
        validation_tokens: number of tokens that these losses are means over.
    """

    def __init__(
        self,
        backbone: Backbone,
        bank: HeadBank,
        optim: OptimConfig,
        steps: int,
        micro_batch: int,
        start: Callable[[HeadBank], None],
        validation: Callable[[int, int], Iterable],
        config: dict[str, Any],
        data_hash: str,
        bands: Tensor,
        text_bytes: int,
        domains: Sequence[tuple[str, int]] = (),
        log_every: int = 10,
        flag: Optional[Flag] = None,
        build: Callable[[HeadBank, OptimConfig], Any] = build_optimizer,
        cuda_graphs: bool = True,
        resume_step: Optional[int] = None,
        target: Optional[Target] = None,
        accepted: Callable[[], None] = lambda: None,
    ):
        super().__init__()
        self.automatic_optimization = False  # a step is several forward passes and one reduction of gradients
        self.strict_loading = False  # checkpoints hold the heads only
        self.backbone, self.bank, self.target = backbone, bank, target
        self.micro_steps = MicroSteps(bank, recorded=cuda_graphs)
        # DDP must not broadcast or bucket tensors that never change
        still = {"backbone": backbone, **({"target": target} if target is not None else {})}
        frozen = [x for name, m in still.items() for x in (*m.named_parameters(name), *m.named_buffers(name))]
        self._ddp_params_and_buffers_to_ignore = [*(name for name, _ in frozen), "bank.whiten_DD"]
        self.optim, self.steps, self.micro_batch = optim, steps, micro_batch
        self.start, self.validation, self.config = start, validation, config
        self.data_hash = data_hash
        self.log_every, self.flag, self.build = log_every, flag or Flag(), build
        self.bands, self.text_bytes, self.domains = bands, text_bytes, domains
        self.initial: dict[str, float] = {}
        self.details: dict[str, Any] = {}
        self.final: dict[str, float] = {}
        self.reference: Optional[float] = None
        self.validation_tokens = 0
        self.step_tokens, self.timer = 0, StepTimer()
        self.resume_step, self.accepted = resume_step, accepted
        self._clock: Optional[tuple[float, int]] = None  # time and step of the last logged row

    def configure_optimizers(self) -> Any:
        optimizer = self.build(self.bank, self.optim)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(self.optim, self.steps))]

    def on_fit_start(self) -> None:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        check(
            world == self.trainer.world_size,
            f"trainer.devices: {world} processes are running, {self.trainer.world_size} are configured",
        )
        if world > 1:
            found: list[Any] = [None] * world
            torch.distributed.all_gather_object(found, (str(self.trainer.default_root_dir), self.resume_step))
            folders, steps = ({f[i] for f in found} for i in range(2))
            check(
                len(folders) == 1,
                f"hydra.run.dir: differs between processes ({', '.join(sorted(folders)[:2])}); give one",
            )
            check(
                len(steps) == 1,
                f"checkpoints: processes resume from different steps ({', '.join(map(str, steps))}); start again",
            )

        if self.bank.memory is None:
            self.bank.memory = memory.decide(self.device, self.bank.loss_memory)
        if self.device.type == "cuda":
            log.info("memory of a head step: up to %d MiB (head.loss_memory)", self.bank.memory >> 20)
        chosen: dict[str, set[int]] = {}
        for key in self.bank.keys:
            chosen.setdefault(self.bank.impl(key, self.backbone.dtype), set()).add(key.rank)
        if self.bank.objective is not None:
            log.info("objective: %s", self.bank.describe_objective())
        else:
            log.info(
                "loss: %s",
                "; ".join(f"{impl} for rank {', '.join(map(str, sorted(ranks)))}" for impl, ranks in chosen.items()),
            )

    def on_train_start(self) -> None:
        if self.global_step == 0:
            self.start(self.bank)
            if torch.distributed.is_initialized():  # starts computed on different devices may differ in rounding
                for p in [*self.bank.parameters(), *self.bank.buffers()]:
                    torch.distributed.broadcast(p.data, 0)
        self.accepted()
        if self.global_step == 0:
            self.initial = self.validate()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add up the gradients of the batch's micro-batches, then update once.

        Args: batch: token ids [N, T+1] of this process.
        """
        optimizer: Any = self.optimizers()  # exactly one, as is the scheduler
        scheduler: Any = self.lr_schedulers()
        tokens = batch.shape[0] * (batch.shape[1] - 1)
        losses = torch.zeros(len(self.bank), dtype=torch.float64, device=batch.device)
        self.timer.begin(
            (self.global_step + 1) % self.log_every == 0 or self.global_step + 1 == self.steps, batch.device
        )
        self.bank.zero_gradients()
        self.micro_steps.begin(self.backbone.dtype)
        self.timer("optimizer")
        for ids in batch.split(self.micro_batch):
            h_ND = self.backbone(ids[:, :-1]).flatten(0, 1)
            t_ND = None if self.target is None else self.target(ids[:, :-1]).flatten(0, 1)
            self.timer("forward")
            losses += self.micro_steps(h_ND, ids[:, 1:].flatten(), 1 / tokens, t_ND)
            self.timer("heads")
        self.bank.finish_gradients()
        losses /= tokens
        if torch.distributed.is_initialized():
            # DDP (or ZeRO-2) reduces the gradients, once per step
            self.manual_backward(HandOver.apply(*self.bank.parameters()))
            # a few numbers per step give every process the same losses to log and the signals of all processes
            numbers = torch.cat([losses, torch.full_like(losses[:1], self.flag.number)])
            torch.distributed.all_reduce(numbers)
            losses = numbers[:-1] / self.trainer.world_size
            self.flag.send(numbers[-1:], math.ceil(len(batch) / self.micro_batch))
        self.timer("reduction")
        norms, optimizer.optimizer.divisors = clip_per_head(
            self.bank, self.optim.clip, losses, optimizer.optimizer.norms()
        )
        optimizer.step()
        self.timer("optimizer")
        rates = scheduler.get_last_lr()
        scheduler.step()
        self.step_tokens = tokens * self.trainer.world_size
        if self.global_step % self.log_every == 0 or self.global_step == self.steps:
            self._log_step(losses, norms, rates)

    def on_train_end(self) -> None:
        # Lightning moves everything to the CPU next; gradients and moments, three times the heads, are not needed there
        for optimizer in self.trainer.optimizers:
            getattr(optimizer, "inner", optimizer).state.clear()  # ZeRO-2 wraps the optimizer
        for p in self.bank.parameters():
            p.grad = None
        self.conclude()

    def on_fit_end(self) -> None:
        if not self.final:  # resumed after its last step: Lightning skips on_train_start and on_train_end
            self.accepted()
            self.to(self.trainer.strategy.root_device)
            self.conclude()

    def conclude(self) -> None:
        """Final validation, and comparison of the heads with the original head. All processes must call it."""
        log.info("validating")
        self.final = self.validate()
        trainer = self.trainer
        self.details = compare(
            self.backbone,
            self.bank,
            self.validation(trainer.global_rank, trainer.world_size),
            self.bands,
            self.target,
            self.domains,
        )
        rows = {
            f"val/{m.name}/{name}": found[m.name]
            for name, found in self.details["heads"].items()
            for m in metrics()
            if found[m.name] is not None
        }
        if self.device.type == "cuda":
            peak = torch.tensor(torch.cuda.max_memory_allocated(self.device) / 2**30, device=self.device)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
            rows["train/peak_memory_gib/all"] = peak.item()
        self._log(rows)

    def validate(self) -> dict[str, float]:
        """Validate and log. Returns {head name: loss}. All processes must call it."""
        trainer = self.trainer
        batches = self.validation(trainer.global_rank, trainer.world_size)
        losses, reference, self.validation_tokens = validate(self.backbone, self.bank, batches)
        self.reference = reference
        named = {key.name: loss for key, loss in zip(self.bank.keys, losses)}
        self._clock = None  # tokens/s must not include the time of validation
        rows = {f"val/loss/{name}": loss for name, loss in named.items()} | {"val/loss/full": reference}
        for name, loss in [*named.items(), ("full", reference)]:
            numbers = derived(loss, self.validation_tokens, self.text_bytes)
            shown = {n: numbers[n] for n in ("perplexity", "bits_per_byte")}
            rows |= {f"val/{n}/{name}": value for n, value in shown.items() if value is not None}
        self._log(rows)
        return named

    def _log_step(self, losses: Tensor, norms: Tensor, rates: list[float]) -> None:
        rows: dict[str, float] = {f"train/seconds/{phase}": s for phase, s in self.timer.seconds().items()}
        # reading the values waits for the device, so the time measured below is that of finished steps
        values = list(zip(self.bank.keys, losses.tolist(), norms.tolist(), rates))
        now, step = time.perf_counter(), self.global_step
        if self._clock is not None:
            began, at = self._clock
            rows["train/tokens_per_second/all"] = (step - at) * self.step_tokens / (now - began)
        self._clock = now, step
        if self.device.type == "cuda":
            # the peak since the process started
            rows["train/peak_memory_gib/all"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        for key, loss, norm, lr in values:
            rows |= {f"train/loss/{key.name}": loss, f"train/grad_norm/{key.name}": norm, f"train/lr/{key.name}": lr}
        self._log(rows)

    def _log(self, rows: dict[str, float]) -> None:
        tokens = self.global_step * self.step_tokens
        for logger in self.trainer.loggers:
            logger.log_metrics({"tokens": tokens, **rows}, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for name in [n for n in state if n.startswith(("backbone.", "target."))]:
            del state[name]
        checkpoint["bottleneck"] = {
            "config": self.config,
            "backbone": self.backbone.hash,
            "data": self.data_hash,
            "heads": [key.name for key in self.bank.keys],
            "initial": self.initial,
            "step_tokens": self.step_tokens,
            "loss_memory": self.bank.memory,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mine = checkpoint.get("bottleneck", {})
        check(
            mine.get("backbone") == self.backbone.hash,
            f"ckpt_path: its heads were trained on other backbone weights ({mine.get('backbone')}, "
            f"here {self.backbone.hash}: {self.backbone.name})",
        )
        check(
            mine.get("data") == self.data_hash,
            "ckpt_path: its heads were trained on other text than data.files has now",
        )
        self.initial, self.step_tokens = mine["initial"], mine["step_tokens"]  # checked by `resume.verify`
        self.bank.memory = mine.get("loss_memory", memory.BEFORE)


class ValidateEvery(pl.Callback):
    """Validates every `every` steps.

    Must come before the callback that saves, so that a checkpoint includes its step's validation.
    """

    def __init__(self, every: int):
        self.every = every

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step < module.steps:
            module.validate()

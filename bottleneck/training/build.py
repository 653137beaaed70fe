"""Build a run's bank of heads and the LightningModule that trains it."""

from __future__ import annotations

import dataclasses
import logging
from typing import Callable, Optional, Union

import torch

from bottleneck.backbone import sharding
from bottleneck.backbone.model import Backbone, FullHead
from bottleneck.backbone.target import Target
from bottleneck.config import checks
from bottleneck.config.head_options import head_options
from bottleneck.config.schema import TrainConfig
from bottleneck.core.extensions import OBJECTIVES, STARTS
from bottleneck.evaluation.agreement import bands_of
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.starting import start_bank
from bottleneck.losses.objective import BoundObjective
from bottleneck.training import zero2
from bottleneck.training.inputs import Inputs
from bottleneck.training.module import HeadSweep
from bottleneck.training.optim import build_optimizer
from bottleneck.training.progress import report_progress
from bottleneck.training.signals import Flag
from bottleneck.training.teacher import EarlierHead, TargetModel

log = logging.getLogger(__name__)


def outline(c: TrainConfig, inputs: Inputs) -> HeadBank:
    """The run's bank on the meta device: names and shapes to compare a checkpoint with before weights are loaded."""
    with torch.device("meta"):
        return build_bank(c, inputs, objective=None)


def build_bank(c: TrainConfig, inputs: Inputs, *, objective: Optional[BoundObjective]) -> HeadBank:
    """The run's heads, all zeros until they are started or loaded from a checkpoint."""
    return HeadBank(
        inputs.keys,
        inputs.vocab_size,
        hidden_size=inputs.hidden_size,
        loss_impl=c.head.loss_impl,
        tokens=c.trainer.micro_batch_size * c.data.block_size,
        coordinates=c.head.whiten or c.optim.lr_ratio != 1,
        loss_memory=c.head.loss_memory,
        objective=objective,
    )


def build_module(
    c: TrainConfig,
    inputs: Inputs,
    *,
    backbone: Backbone,
    flag: Flag,
    resume_step: Optional[int],
    accepted: Callable[[], None],
) -> HeadSweep:
    """The module that trains the run's heads on the backbone's hidden states.

    Args:
        flag: notes signals.
        resume_step: step of the checkpoint that the run resumes from.
        accepted: called once the heads have started or have been restored, before anything is logged.
    """
    teacher, data = inputs.teacher, inputs.data
    head = teacher.head(backbone) if isinstance(teacher, EarlierHead) else backbone.head
    target = teacher.loaded if isinstance(teacher, TargetModel) else None
    sharded = c.trainer.shard in checks.SHARDED
    return HeadSweep(
        backbone,
        build_bank(c, inputs, objective=_objective(c, inputs, head if target is None else target)),
        optim=c.optim,
        steps=checks.total_steps(c),
        micro_batch=c.trainer.micro_batch_size,
        start=lambda bank: _start_heads(c, inputs, backbone=backbone, head=head, bank=bank),
        validation=sharding.even(data.validation_batches) if sharded else data.validation_batches,
        config=dataclasses.asdict(c),
        data_hash=inputs.corpus.fingerprint,
        bands=bands_of(inputs.corpus.train, inputs.vocab_size),
        text_bytes=inputs.corpus.validation_bytes,
        domains=data.domains(),
        log_every=c.trainer.log_every,
        flag=flag,
        build=zero2.Zero2AdamW if c.trainer.shard == "zero2" else build_optimizer,
        cuda_graphs=c.trainer.cuda_graphs,
        resume_step=resume_step,
        target=target,
        accepted=accepted,
    )


def _objective(c: TrainConfig, inputs: Inputs, head: Union[FullHead, Target]) -> Optional[BoundObjective]:
    """The run's objective with its options and teacher; None for plain cross-entropy.

    Args: head: the teacher, unless it is trained in this run.
    """
    if c.head.objective == "ce":
        return None
    declared = OBJECTIVES[c.head.objective]
    whose = "the original head"
    if isinstance(inputs.teacher, EarlierHead):
        whose = f"{c.head.teacher} of {inputs.teacher.run.folder}"
    elif isinstance(head, Target):
        whose = f"the model {head.name}"
    return BoundObjective(
        declared,
        head_options(c.head, declared.options),
        teacher_logits=head.float_logits if c.head.teacher != "trained" else None,
        whose=whose,
    )


def _start_heads(c: TrainConfig, inputs: Inputs, *, backbone: Backbone, head: FullHead, bank: HeadBank) -> None:
    """Set every head to its start, computed on the first sequences of the training order. Starts approximate `head`."""
    ids = inputs.data.calibration(c.head.calibration_tokens).to(backbone.lm_head.weight.device)
    found = ids.shape[0] * (ids.shape[1] - 1)
    few = f" (all; head.calibration_tokens={c.head.calibration_tokens})" if found < c.head.calibration_tokens else ""
    log.info("starting heads: %s, %d calibration tokens%s", c.head.init, found, few)
    batches = report_progress("calibrating", ids.split(c.trainer.micro_batch_size))
    start_bank(
        bank,
        c.head.init,
        head,
        (backbone(part[:, :-1]) for part in batches),
        options=head_options(c.head, STARTS[c.head.init].options),
        whiten=c.head.whiten,
        lr_ratio=c.optim.lr_ratio,
        watch=report_progress,
    )

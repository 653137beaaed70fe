"""Train heads for several budgets in one pass over the text, for `study=forecast`.

Every budget is a run of its own with its own schedule: the loss in the middle of a long run, at a high rate, is not the
loss of a shorter run. All budgets read the same text from its start, so one forward pass serves their banks.

Dims: N sequences, T tokens of a sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.config.schema import OptimConfig
from bottleneck.core.environment import commit
from bottleneck.core.errors import check
from bottleneck.data.module import StepBatches
from bottleneck.evaluation.sums import validate
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.key import HeadKey
from bottleneck.heads.micro_steps import MicroSteps
from bottleneck.heads.starting import Watch, start_bank, unwatched
from bottleneck.losses import memory
from bottleneck.studies.formulas.forecast import SHORT, STEP_TOKENS
from bottleneck.studies.shared.config import StudyConfig, ranks_of
from bottleneck.studies.shared.loading import device_of, loaded, log_memory
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import Checkpoint, check_same_shapes, one_checkpoint
from bottleneck.studies.shared.text import StudyText, study_text
from bottleneck.training.optim import build_optimizer, clip_per_head, power_rate, schedule

log = logging.getLogger(__name__)
START = "refined"  # it is nearer to the head of a long run than two million labels bring `fisher`
CALIBRATION = SHORT[1]  # training tokens: the text that the short runs read
OPTIM = OptimConfig(betas=[0.9, 0.99], eps=1e-5, weight_decay=0.0, warmup=0.05, lr_final=0.0)
# the rule's rates are for TUNED tokens; the best rate of a closed form falls with the budget
TUNED, FALL = 26e6, 0.3
FACTORS = (0.4, 1.0, 2.5, 6.25)  # multiples of that rate that are trained; the best counts


def recipe() -> dict[str, Any]:
    """What a forecast holds for: the settings with which heads are trained."""
    return {
        "start": START,
        "whiten": True,
        "step_tokens": STEP_TOKENS,
        "calibration_tokens": CALIBRATION,
        "betas": list(OPTIM.betas),
        "eps": OPTIM.eps,
        "weight_decay": OPTIM.weight_decay,
        "warmup": OPTIM.warmup,
        "lr_final": OPTIM.lr_final,
        "rates": f"power rule · (tokens / {TUNED:g})^{FALL} · {list(FACTORS)}",
    }


def rates_of(rank: int, tokens: int, *, hidden_size: int, vocab_size: int) -> list[float]:
    """The learning rates that are tried at a rank for a budget of `tokens`."""
    rule = power_rate(OptimConfig(), START, rank, hidden_size, vocab_size) * (tokens / TUNED) ** FALL
    return [float(f"{rule * factor:.3g}") for factor in FACTORS]


@dataclass
class Run:
    """The heads of one budget in training."""

    bank: HeadBank
    tokens: int

    @property
    def steps(self) -> int:
        return self.tokens // STEP_TOKENS

    def __post_init__(self) -> None:
        self.micro_steps = MicroSteps(self.bank)
        self.optimizer: Any = build_optimizer(self.bank, OPTIM)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(OPTIM, self.steps))

    def step(self, hidden: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        """One update of all heads. Args: hidden: hidden states [N·T, D] and targets [N·T] of the micro-batches."""
        tokens = sum(len(y) for _, y in hidden)
        self.bank.zero_gradients()
        self.micro_steps.begin(dtype)
        losses = sum(self.micro_steps(h_ND, y_N, 1 / tokens).clone() for h_ND, y_N in hidden)
        self.bank.finish_gradients()
        assert isinstance(losses, Tensor)
        _, self.optimizer.divisors = clip_per_head(self.bank, OPTIM.clip, losses, self.optimizer.norms())
        self.optimizer.step()
        self.scheduler.step()


def begin(
    backbone: Backbone,
    budgets: Sequence[int],
    ranks: Sequence[int],
    ids: Tensor,
    micro_batch: int,
    watch: Watch = unwatched,
) -> list[Run]:
    """The runs of all budgets, each head at its start. Args: ids: calibration tokens [N, T+1]."""
    tokens_of = micro_batch * (ids.shape[1] - 1)
    device = backbone.lm_head.weight.device
    shape = {"hidden_size": backbone.hidden_size, "vocab_size": backbone.vocab_size}
    runs: list[Run] = []
    for tokens in budgets:
        keys = [HeadKey(r, lr, 0) for r in ranks for lr in rates_of(r, tokens, **shape)]
        bank = HeadBank(
            keys, backbone.vocab_size, hidden_size=backbone.hidden_size, tokens=tokens_of, coordinates=True
        ).to(device)
        bank.memory = memory.decide(device, "auto")
        if not runs:
            hidden = (backbone(part[:, :-1].to(device)) for part in watch("reading", ids.split(micro_batch)))
            start_bank(bank, START, backbone.head, hidden, whiten=True, watch=watch)
        else:  # the start depends on the rank alone
            first = runs[0].bank
            by_rank = {key.rank: first[key].state_dict() for key in first.keys}
            for key in keys:
                bank[key].load_state_dict(by_rank[key.rank])
            assert bank.whiten_DD is not None and first.whiten_DD is not None
            bank.whiten_DD.copy_(first.whiten_DD)
        runs.append(Run(bank, tokens))
    return runs


def _losses(backbone: Backbone, run: Run, text: StudyText, micro_batch: int) -> tuple[list[dict[str, Any]], float]:
    """Validation loss of every head of a run, and of the original head; None where it is not a number."""
    found, original, _ = validate(backbone, run.bank, text.batches(micro_batch))
    rows = [{"rank": key.rank, "lr": key.lr, "loss": loss} for key, loss in zip(run.bank.keys, found)]
    return rows, original


def train(
    backbone: Backbone,
    text: StudyText,
    budgets: Sequence[int],
    ranks: Sequence[int],
    *,
    seed: int,
    micro_batch: int,
    done: Callable[[int, list[dict[str, Any]], float], None],
    watch: Watch = unwatched,
) -> None:
    """Train all heads for all budgets in one pass of the backbone.

    Args:
        budgets: tokens, rising.
        seed: of the order of the text.
        done: (tokens, rows of rank, lr, loss, loss of the original head), called at the start with 0 tokens and then
            for each budget.
        watch: (what, steps) -> steps, reporting progress.
    """
    device, dtype = backbone.lm_head.weight.device, backbone.dtype
    runs = begin(backbone, budgets, ranks, text.calibration(CALIBRATION, seed), micro_batch, watch)
    done(0, *_losses(backbone, runs[0], text, micro_batch))
    last = runs[-1].steps
    batches = StepBatches(text.corpus, text.block, STEP_TOKENS // text.block, last, seed, text.bos)
    for step in watch("training", range(last)):
        hidden = []
        with torch.no_grad():
            for ids in batches[step].to(device).split(micro_batch):
                hidden.append((backbone(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
        for run in runs:
            run.step(hidden, dtype)
            if step + 1 == run.steps:
                done(run.tokens, *_losses(backbone, run, text, micro_batch))
        runs = [run for run in runs if run.steps > step + 1]  # frees what is finished


def check_length(c: StudyConfig, text: StudyText, budgets: Sequence[int]) -> None:
    """Raises UserError, in the words of the study, if the text is shorter than a budget that is trained."""
    name, block = text.corpus.name, text.block
    have = len(text.corpus.order(c.data.seed, block)) * block
    limit = c.data.max_tokens  # of a streamed text: by default the larger of tokens and study.max_tokens
    cut = limit is not None and have + block >= limit
    key = "study.max_tokens" if limit == max(c.tokens, c.study.max_tokens) else "data.max_tokens"
    about = f"{name} has {have} training tokens in blocks of {block}"
    more = f"a larger {key}" if cut else "more text"
    short = max(set(budgets) - set(c.study.check))
    check(have >= short, f"study=forecast: its short runs read {short} training tokens, {about}; give {more}")
    most = have // STEP_TOKENS * STEP_TOKENS
    fewer = f"give at most {most}" if most >= short + STEP_TOKENS else "leave it out"
    given = max(c.study.check, default=0)
    check(have >= given, f"study.check={given}: its budgets are trained, and {about}; {fewer}, or {more}")


def log_costs(cp: Checkpoint, device: torch.device, width: int, heads: float) -> None:
    """Log the memory of a study and warn of a CPU's time. Args: heads: bytes of all heads."""
    on_cpu = device.type == "cpu"
    hidden = 2 * CALIBRATION * width * (4 if on_cpu else 2)  # as read, and joined to be refined
    log_memory([cp], device, heads + hidden)
    if on_cpu:
        many = f"{CALIBRATION:,} tokens are read three times, the last time at {len(FACTORS)} rates of every rank"
        log.warning("study=forecast on a CPU: %s; a GPU takes minutes, a CPU hours", many)


def measure(c: StudyConfig, folder: Path, budgets: Sequence[int]) -> dict[str, Any]:
    """Losses of every rank before training and after each budget.

    Returns: what the runs are about, `reference` (loss of the original head) and `losses`, rows of tokens, rank, lr
    and loss: for each budget and rate. They are stored after each budget; a repeated command computes no budget twice.
    """
    s = c.study
    cp = one_checkpoint(c)
    shapes = check_same_shapes([cp])
    (width, vocabulary), device = shapes[cp.model], device_of(c)
    ranks = ranks_of(s.ranks, width)
    block = c.data.block_size
    check(STEP_TOKENS % block == 0, f"data.block_size={block}: must divide the {STEP_TOKENS:,} tokens of a step")
    text = study_text(c, [cp])
    check_length(c, text, budgets)
    log_costs(cp, device, width, 16.0 * len(FACTORS) * sum(ranks) * (width + vocabulary) * len(budgets))
    settings = {"recipe": recipe(), "ranks": ranks, "seed": c.data.seed, "dtype": c.backbone.dtype}
    parts = PartialResults(folder, s.name, {**text.identity, **settings})
    micro_batch = min(STEP_TOKENS // block, c.trainer.micro_batch_size)
    rows: list[dict[str, Any]] = []
    with loaded(cp, device, shapes) as backbone, StudyProgress(1, c.trainer.progress, "pass") as progress:
        about = {
            **text.read_by(backbone),
            "data_hash": text.corpus.fingerprint,
            "block_size": block,
            "validation_tokens": text.tokens,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "commit": commit(),
        }
        kept = [parts.get(f"{tokens} {backbone.hash}") for tokens in (0, *budgets)]
        missing = [tokens for tokens, part in zip(budgets, kept[1:]) if part is None]
        found = {tokens: part for tokens, part in zip((0, *budgets), kept) if part is not None}

        def done(tokens: int, losses: list[dict[str, Any]], original: float) -> None:
            seconds = time.monotonic() - began
            found[tokens] = parts.put(
                f"{tokens} {backbone.hash}",
                {"about": about, "tokens": tokens, "losses": losses, "original": original, "seconds": seconds},
            )

        began = time.monotonic()
        progress.begin("training")
        if missing:
            options = {"seed": c.data.seed, "micro_batch": micro_batch}
            train(backbone, text, missing, ranks, **options, done=done, watch=progress.over)
        progress.end(f"{max(budgets):,} tokens", not missing)
        for tokens in (0, *budgets):
            part = found[tokens]
            rows += [{"tokens": tokens, **row} for row in part["losses"]]
        return {
            **about,
            "recipe": recipe(),
            "seconds": {str(tokens): found[tokens]["seconds"] for tokens in (0, *budgets)},
            "reference": found[0]["original"],
            "losses": rows,
        }

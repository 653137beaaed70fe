"""`refined`: the closed form `fisher`, then trained on the original head's predictions for the calibration tokens.

`fisher` minimises a second-order surrogate around the original head; at a low rank the head ends far from there, where
the surrogate says little. Here the loss itself is minimised: the mean over calibration tokens of

    KL(p* ‖ p) = Σ_v p*_v log(p*_v / p_v)        p* = softmax(original head),  p = softmax(A z),  z = C x,  x = Σ^-½ h

with Σ = E[h hᵀ]. Soft targets are worth many labels: 65,536 tokens read twice end below what 262,144 labelled tokens
train to (measured, with the alternatives that were tried, in the log). The gradients for a batch of n tokens, with
G = (p − p*) / n, are

    dA = Gᵀ z        dC = (G A)ᵀ x

The steps are Adam's, whose length is the rate whatever the size of the gradient. The rate is set in the unit that all
models share, nats of logit. To second order KL = ½ Var(error of the logits) under p*, so √(2 KL) is the error to
remove, and one step removes about STEP of it: entries of A move by STEP √(2 KL) / √R, of C by STEP √(2 KL) / √D. A head
that nearly equals the original head is therefore hardly changed, and at r = d nothing is.

On a GPU the gradients of 16-bit hidden states come from the kernels that distil heads (`losses.taught`). Parameters,
moments and the sums of gradients stay in float32.

Dims: N tokens, n tokens of a batch, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bottleneck.backbone.model import FullHead
from bottleneck.core.extensions import LOSSES, STARTS, Start
from bottleneck.heads.calibration import Calibration, roots
from bottleneck.heads.key import HeadKey
from bottleneck.heads.starting import Factors, StartInputs
from bottleneck.heads.starts import fisher
from bottleneck.losses import weights
from bottleneck.losses.chunked import chunk_rows
from bottleneck.losses.distill import Distillation, steps

log = logging.getLogger(__name__)
PASSES = 2  # over the calibration tokens: new tokens help more than a third pass
# tokens of a step: 512 is better by less than 0.01 nats and needs twice the steps, 2,048 is worse by up to 0.04
BATCH = 1024
STEP = 0.045  # of the logits' error √(2 KL)
ENOUGH = 1e-3  # nats of KL: training a head this close to the original head would only add rounding errors
BETAS, EPS = (0.9, 0.95), 1e-12
MEASURED = 1 << 16  # tokens on which the KL before and after is measured, at least, in float32
WARMUP = 0.05  # share of the steps; then a cosine to zero, which averages out the noise of the last batches


@dataclass
class _Pupil:
    """One head in training: A [V, R] and C = B Σ^½ [R, D], float32, with their gradients and Adam's moments."""

    A: Tensor
    C: Tensor
    rate: float = 0.0
    grads: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.A.grad, self.C.grad = self.grads = torch.zeros_like(self.A), torch.zeros_like(self.C)
        # R entries of A add up to one logit, D entries of C to one z
        self.peaks = [self.rate / math.sqrt(p.shape[1]) for p in (self.A, self.C)]
        groups = [{"params": [p], "lr": peak} for p, peak in zip((self.A, self.C), self.peaks)]
        self.optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPS, fused=self.A.is_cuda)

    def learn(self, x_nD: Tensor, target_nV: Tensor, share: float) -> None:
        """Add a chunk's gradient; `share` is 1 / tokens of the whole batch."""
        z = x_nD @ self.C.T
        logits = z @ self.A.T
        G = torch.softmax(logits, dim=-1, out=logits).sub_(target_nV)
        self.grads[0].addmm_(G.T, z, alpha=share)
        self.grads[1].addmm_((G @ self.A).T, x_nD, alpha=share)

    def step(self, factor: float) -> None:
        """A step of Adam at `factor` times the peak rates."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


def _chunks(h_ND: Tensor, V: int) -> tuple[Tensor, ...]:
    return h_ND.split(chunk_rows(V, h_ND.device.type))


def _by_kernels(h_ND: Tensor) -> bool:
    """Whether gradients come from the kernels of `losses.taught`, in the dtype of h: on a GPU, with 16 bits."""
    return h_ND.is_cuda and h_ND.element_size() == 2 and LOSSES["fused"].refuses("cuda", h_ND.dtype) is None


def _learn(pupils: Sequence[_Pupil], h_nD: Tensor, whiten_DD: Tensor, head: FullHead, kernels: bool) -> None:
    """Add the gradients of the mean KL of a batch to every pupil's."""
    share = 1 / len(h_nD)
    if kernels:
        x = (h_nD.float() @ whiten_DD).to(h_nD.dtype)
        cast = [weights(p.A, p.C, h_nD.dtype, "fused") for p in pupils]
        every = torch.zeros(len(h_nD), dtype=torch.int32, device=h_nD.device)  # no token is ignored
        steps(x, cast, every, [p.grads for p in pupils], share, Distillation(head.float_logits), h_nD)
        return
    for part in _chunks(h_nD, len(head.W_VD)):
        target = torch.softmax(head.float_logits(part), dim=-1)
        x = part.float() @ whiten_DD
        for pupil in pupils:
            pupil.learn(x, target, share)


@torch.no_grad()
def divergence(heads: Sequence[tuple[Tensor, Tensor]], hidden_ND: Tensor, head: FullHead) -> list[float]:
    """Mean KL(original head ‖ A B) of each head over hidden states [N, D], nats; one chunk of logits at a time.

    Args: heads: (A [V, R], B [R, D]) each.
    """
    totals = torch.zeros(len(heads), dtype=torch.float64, device=hidden_ND.device)
    weights = [(A.to(hidden_ND.device, torch.float32), B.to(hidden_ND.device, torch.float32)) for A, B in heads]
    for h in _chunks(hidden_ND, len(head.W_VD)):
        log_target = torch.log_softmax(head.float_logits(h), dim=-1)
        target = log_target.exp()
        for i, (A, B) in enumerate(weights):
            log_p = torch.log_softmax((h.float() @ B.T) @ A.T, dim=-1)
            totals[i] += (target * (log_target - log_p)).sum(dtype=torch.float64)
    return (totals / len(hidden_ND)).tolist()


def _factor(step: int, steps: int) -> float:
    """Share of the peak rate at a step, from 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _unit(A: Tensor, C: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The same head with E[(B h)(B h)ᵀ] = C Cᵀ = I; C is replaced by its polar factor, the nearest such matrix."""
    values, vectors = torch.linalg.eigh((C @ C.T).double())
    root = values.clamp(min=1e-12 * values.max()).sqrt()
    return A.double() @ (vectors * root) @ vectors.T, (vectors / root) @ vectors.T @ C.double() @ inverse


def _order(tokens: int, batch: int, device: torch.device) -> Callable[[int], Tensor]:
    """Token indices of step k. Each pass has its own order and omits a different remainder of the tokens."""
    generator = torch.Generator().manual_seed(0)
    per_pass, order = tokens // batch, torch.empty(0)

    def picked(k: int) -> Tensor:
        nonlocal order
        if k % per_pass == 0:
            order = torch.randperm(tokens, generator=generator).to(device)
        return order[k % per_pass * batch :][:batch]

    return picked


@torch.no_grad()
def refine(
    starts: Sequence[tuple[Tensor, Tensor]],
    hidden: Sequence[Tensor],
    head: FullHead,
    c: Calibration,
    passes: int = PASSES,
    batch: int = BATCH,
    watch: Callable[[range], Iterable[int]] = iter,
) -> list[tuple[Tensor, Tensor]]:
    """Train every start on the original head's predictions for the calibration tokens.

    The heads share the original head's softmax and the order of tokens, nothing else, so each result is bit for bit the
    same whether the head is refined alone or with others.

    Args:
        starts: (A [V, R], B [R, D]) of each head, of any ranks. Equal starts give equal results, so pass each once.
        hidden: batches of hidden states [..., D] on the device of the head; concatenated, so N·D numbers are held.
        c: moments of these hidden states, from `calibrate`.
        passes: over the tokens; 0 returns the starts.
        watch: iterates over the steps and may report progress.
    Returns: (A [V, R], B [R, D]) float64 with E[(B h)(B h)ᵀ] = I; the start itself where its KL did not fall.
    """
    if not passes:
        return list(starts)
    h_ND = torch.cat([h.reshape(-1, h.shape[-1]) for h in hidden])
    root, inverse = roots(c.cov_DD)
    whiten = inverse.float()
    some_ND = h_ND[:: max(1, len(h_ND) // MEASURED)]
    before = divergence(starts, some_ND, head)
    pupils = {
        i: _Pupil(A.to(whiten).clone(), (B.to(root) @ root).float(), STEP * math.sqrt(2 * before[i]))
        for i, (A, B) in enumerate(starts)
        if before[i] > ENOUGH
    }
    if not pupils:
        return list(starts)
    batch = min(batch, len(h_ND))
    count = passes * (len(h_ND) // batch)
    picked = _order(len(h_ND), batch, h_ND.device)
    kernels = _by_kernels(h_ND)
    for k in watch(range(count)):
        _learn([*pupils.values()], h_ND[picked(k)], whiten, head, kernels)
        for pupil in pupils.values():
            pupil.step(_factor(k, count))
    done = {i: _unit(p.A, p.C, inverse) for i, p in pupils.items()}
    after = dict(zip(done, divergence(list(done.values()), some_ND, head)))
    return [done[i] if i in done and after[i] < before[i] else start for i, start in enumerate(starts)]


def make(inputs: StartInputs) -> Callable[[HeadKey], Factors]:
    """Run `refine` on the fisher start of every key. Heads that differ only in their rate are refined once."""
    start = fisher.make(inputs)
    distinct = {(key.rank, key.seed): key for key in inputs.keys}
    passes = inputs.options["passes"]
    log.info("refining %d starts: %d passes", len(distinct), passes)
    began = time.monotonic()
    found = refine(
        [start(key) for key in distinct.values()],
        inputs.hidden,
        inputs.head,
        inputs.moments,
        passes,
        watch=lambda steps: inputs.watch("refining", steps),
    )
    log.info("refined in %.1f s", time.monotonic() - began)
    by_rank = dict(zip(distinct, found))
    return lambda key: by_rank[key.rank, key.seed]


START = STARTS.register(
    Start(
        "refined",
        "fisher, then trained on the original head's predictions for the calibration tokens (65,536 or more)",
        make,
        closed_form=True,
        reads_hidden=True,
        lr_ref=4e-4,
        gamma=0.8,
        options={"passes": PASSES},
    )
)

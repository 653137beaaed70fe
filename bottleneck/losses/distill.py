"""The fast path of distillation: KL from a teacher's softmax at a temperature, alone or mixed with cross-entropy.

For a token with the teacher's logits s* and a head's logits s = A z, z = B h (Hinton et al. 2015):

    loss = (1 − m) · CE(y, softmax(s)) + m · T² · KL(softmax(s*/T) ‖ softmax(s/T))
    d loss / d s = (1 − m) · (softmax(s) − onehot(y)) + m · T · (softmax(s/T) − softmax(s*/T))

The factor T² keeps the gradient of the KL about as large at every temperature. Tokens are processed in chunks. The
teacher's softmax is computed once for all heads of a bank, which share nothing else, so each head has the same bits
alone and in a bank. Heads on `fused` run the Triton kernels of `losses.taught`; the rest is plain PyTorch on any
device.

Dims: n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Callable, Iterator, NamedTuple, Optional

import torch
from torch import Tensor

from bottleneck.losses.chunked import chunk_rows
from bottleneck.losses.linear import Weights, logit_step
from bottleneck.losses.products import add_product, matmul_f32


class Distillation(NamedTuple):
    """The loss above.

    Attributes:
        teacher_logits: hidden states that the teacher reads [n, D'] -> its logits [n, V], float32.
        temperature: T.
        mix: m, the share of the KL; 0: cross-entropy alone, 1: KL alone.
        overlap: in place of the KL, the loss of `objectives.lk`: η, and whether it is the form −log α; then T = m = 1.
            Only for heads on `fused`.
    """

    teacher_logits: Callable[[Tensor], Tensor]
    temperature: float = 1.0
    mix: float = 1.0
    overlap: Optional[tuple[float, bool]] = None


class Goal(NamedTuple):
    """One term of the loss: weight · (entropy − Σ_v target_v log softmax(s / temperature)_v).

    `entropy_n` is Σ_v target_v log target_v of the teacher, the least value of the sum, so that the term is a KL.
    """

    target_nV: Tensor
    entropy_n: Tensor
    temperature: float
    weight: float


def head_logits(h_nD: Tensor, w: Weights) -> Tensor:
    """Logits [n, V] of a head as the products read it, float32."""
    return matmul_f32(h_nD @ w.B.T, w.A.T)


def _goals(o: Distillation, t_nD: Tensor, y_n1: Tensor) -> Iterator[Goal]:
    """The terms of the loss of some tokens, the same for every head.

    At T = 1 they are one, with one softmax for both.
    """
    T, m = o.temperature, o.mix
    log_p = torch.log_softmax(o.teacher_logits(t_nD) if T == 1 else o.teacher_logits(t_nD) / T, -1)
    p = log_p.exp()
    entropy = log_p.mul_(p).sum(-1)
    if T == 1:
        target = p.mul_(m).scatter_add_(1, y_n1, p.new_full(y_n1.shape, 1 - m)) if m < 1 else p
        yield Goal(target, m * entropy, 1.0, 1.0)
        return
    yield Goal(p, entropy, T, m * T * T)
    if m < 1:
        yield Goal(torch.zeros_like(p).scatter_(1, y_n1, 1.0), torch.zeros_like(entropy), 1.0, 1 - m)


def steps(
    h_ND: Tensor,
    heads: list[Weights],
    y_N: Tensor,
    gradients: list[tuple[Tensor, Tensor]],
    scale: float,
    o: Distillation,
    teacher_ND: Optional[Tensor] = None,
) -> Tensor:
    """Losses [H, N] of heads on the same tokens; adds scale · the gradient of each sum to its (dA [V, R], dB [R, D]).

    Args:
        y_N: from `linear.targets`; tokens with -1 contribute neither cross-entropy nor KL.
        teacher_ND: the hidden states that the teacher reads; default: h.
    """
    teacher_ND = h_ND if teacher_ND is None else teacher_ND
    N, V = len(h_ND), len(heads[0].A)
    losses = torch.zeros(len(heads), N, dtype=torch.float32, device=h_ND.device)
    kernels = importlib.import_module("bottleneck.losses.taught") if all(w.impl == "fused" for w in heads) else None
    if kernels is not None:
        rows = kernels.rows(N, V, h_ND.element_size(), min((w.memory for w in heads), default=0))
    else:  # with a teacher more V-wide buffers are held, so chunks are smaller
        rows = max(1, chunk_rows(V, h_ND.device.type) // 2)
    work: Callable[..., None] = functools.partial(_fast, kernels) if kernels is not None else _plain
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        work(h_ND[part], heads, y_N[part], gradients, scale, o, losses[:, part], teacher_ND[part])
    return losses


def _fast(
    kernels: Any,
    h_nD: Tensor,
    heads: list[Weights],
    y_n: Tensor,
    gradients: list[tuple[Tensor, Tensor]],
    scale: float,
    o: Distillation,
    losses_Hn: Tensor,
    teacher_nD: Tensor,
) -> None:
    """One chunk of tokens in few kernel launches. With T ≠ 1 the cross-entropy is a step of its own."""
    T, m = o.temperature, o.mix
    apart = T != 1 and m < 1
    taught = kernels.prepare(o.teacher_logits(teacher_nD), y_n, T, 1.0 if apart else m, h_nD.dtype)
    overlap = None if o.overlap is None else kernels.Overlap(*o.overlap)
    for w, (dA, dB), loss_n in zip(heads, gradients, losses_Hn):
        z = h_nD @ w.B.T
        share = scale * m if apart else scale
        loss, dz = kernels.step(z, w.A, y_n, taught, dA, share, T, overlap)
        add_product(dB, dz[:, : w.rank].T, h_nD, share)
        if apart:
            loss_n.copy_(loss).mul_(m)
            loss, dz = logit_step(z, w.A, y_n, w.impl, dA, scale * (1 - m), w.memory)
            assert dz is not None
            add_product(dB, dz[:, : w.rank].T, h_nD, scale * (1 - m))
            loss_n.add_(loss, alpha=1 - m)
        else:
            loss_n.copy_(loss)


def _plain(
    h_nD: Tensor,
    heads: list[Weights],
    y_n: Tensor,
    gradients: list[tuple[Tensor, Tensor]],
    scale: float,
    o: Distillation,
    losses_Hn: Tensor,
    teacher_nD: Tensor,
) -> None:
    """One chunk of tokens on any device."""
    keep = (y_n >= 0)[:, None]
    goals = list(_goals(o, teacher_nD, y_n.clamp(min=0).long()[:, None]))
    for w, (dA, dB), loss in zip(heads, gradients, losses_Hn):
        z = h_nD @ w.B.T
        found, G = _loss_and_gradient(matmul_f32(z, w.A.T), goals)
        loss.copy_(found.masked_fill(~keep[:, 0], 0.0))
        G = G.to(z.dtype)
        add_product(dA, G.T, (z * keep)[:, : w.rank], scale)
        add_product(dB, ((G @ w.A) * keep)[:, : w.rank].T, h_nD, scale)


def _loss_and_gradient(logits_nV: Tensor, goals: list[Goal]) -> tuple[Tensor, Tensor]:
    """Loss [n], and its gradient at the logits [n, V]."""
    total: Any = 0.0
    G: Optional[Tensor] = None
    for goal in goals:
        log_q = torch.log_softmax(logits_nV if goal.temperature == 1 else logits_nV / goal.temperature, -1)
        total = total + goal.weight * (goal.entropy_n - (goal.target_nV * log_q).sum(-1))
        g = log_q.exp_().sub_(goal.target_nV)
        slope = goal.weight / goal.temperature
        g = g if slope == 1 else g.mul_(slope)
        G = g if G is None else G.add_(g)
    assert G is not None  # a loss has at least one term
    return total, G

"""Starts from the true second-order term and from the KL by structured solves, beside `fisher` and `refined`.

    python -m bottleneck.benchmark starts --ranks 8 32 64 128 256
    python -m bottleneck.benchmark starts backbone=smollm2_135m_gguf --tokens 16384 --held 4096

A structured solve (here `gauss-newton`) approximates KL(p* ‖ softmax(A C x)) around the current head by a quadratic
whose Hessian is JᵀFJ, with F = diag(p) − p pᵀ of every context and J the derivative of the logits by (A, C). It is
minimised by conjugate gradients, which need products with F only, so nothing V × V is formed. The blocks of the
surrogate that `fisher` minimises precondition it: rows of A by 1 / E[p_v (1 − p_v)], C by (Aᵀ Q A)⁻¹. With
`second-order`, p is the original head's and the target its logits, which is the second-order term of the KL; with `kl`,
p is the current head's.

Printed for every rank: KL from the original head and loss on held-out tokens before any training, and seconds (CPU time
on a CPU, so that other processes do not count), calibration included. `refined` is also run on fewer tokens, so that
there is one that takes about as long as a structured solve. Findings: docs/log.md.

Dims: n tokens of a batch, N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from bottleneck.backbone.model import Backbone, FullHead, load_tokenizer
from bottleneck.benchmark.table import Row, row
from bottleneck.config.checks import check_config
from bottleneck.core.paths import CONF
from bottleneck.data.module import leading_bos
from bottleneck.data.prepare import prepare
from bottleneck.evaluation.sums import full_head_loss
from bottleneck.heads.calibration import Calibration, calibrate, roots
from bottleneck.heads.key import HeadKey
from bottleneck.heads.starting import Factors, make_start
from bottleneck.heads.starts.refined import divergence, refine
from bottleneck.losses import linear_cross_entropy

log = logging.getLogger(__name__)
NAME = "starts"
Pair = tuple[Tensor, Tensor]  # parameters or a direction: of A [V, R] and of C = B Σ^½ [R, D]


def forward(x_ND: Tensor, at: Pair, step: Pair) -> Tensor:
    """Derivative of the logits [N, V] at (A, C) along a direction."""
    return (x_ND @ at[1].T) @ step[0].T + (x_ND @ step[1].T) @ at[0].T


def backward(x_ND: Tensor, at: Pair, G_NV: Tensor) -> Pair:
    """Its transpose: gradients of A and C from gradients [N, V] of the logits."""
    return G_NV.T @ (x_ND @ at[1].T), (G_NV @ at[0]).T @ x_ND


def fisher_product(p_NV: Tensor, u_NV: Tensor) -> Tensor:
    """(diag(p) − p pᵀ) u of every context [N, V]."""
    weighted = p_NV * u_NV
    return weighted - p_NV * weighted.sum(-1, keepdim=True)


def dot(a: Pair, b: Pair) -> Tensor:
    return (a[0] * b[0]).sum() + (a[1] * b[1]).sum()


def conjugate_gradients(
    product: Callable[[Pair], Pair], b: Pair, precondition: Callable[[Pair], Pair], steps: int
) -> Pair:
    """An approximate solution of H s = b."""
    s: Pair = (torch.zeros_like(b[0]), torch.zeros_like(b[1]))
    r, z = b, precondition(b)
    d, rz = z, dot(b, z)
    for _ in range(steps):
        Hd = product(d)
        alpha = rz / dot(d, Hd)
        s = (s[0] + alpha * d[0], s[1] + alpha * d[1])
        r = (r[0] - alpha * Hd[0], r[1] - alpha * Hd[1])
        z = precondition(r)
        old, rz = rz, dot(r, z)
        d = (z[0] + rz / old * d[0], z[1] + rz / old * d[1])
    return s


@dataclass
class Solve:
    """Settings of one structured solve: tokens of a batch, batches, conjugate-gradient steps on each, damping."""

    tokens: int
    batches: int
    steps: int
    damping: float
    second_order: bool = False

    @torch.no_grad()
    def run(self, start: Factors, h_ND: Tensor, head: FullHead, c: Calibration) -> Factors:
        """(A [V, R], B [R, D]) after all batches, each of other tokens if there are enough."""
        root, inverse = roots(c.cov_DD)
        at: Pair = (start[0].float().to(h_ND.device).clone(), (start[1].to(root) @ root).float())
        q = (c.fisher_V / c.fisher_V.mean()).float().clamp(min=1e-3)[:, None]
        scale = c.fisher_V.mean().float()
        for k in range(self.batches):
            first = k * self.tokens % max(1, len(h_ND) - self.tokens + 1)
            h = h_ND[first : first + self.tokens]
            x = h.float() @ inverse.float()
            logits = head.float_logits(h)
            target = torch.softmax(logits, -1)
            own = (x @ at[1].T) @ at[0].T
            p = target if self.second_order else torch.softmax(own, -1)
            G = fisher_product(p, logits - own) if self.second_order else target - p
            gram = (at[0].T @ (q * scale * at[0])).double()
            gram += self.damping * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
            solve = torch.linalg.inv(gram).float()

            def product(d: Pair, x: Tensor = x, p: Tensor = p, at: Pair = at, gram: Tensor = gram) -> Pair:
                A, C = backward(x, at, fisher_product(p, forward(x, at, d)) / len(x))
                return A + self.damping * scale * q * d[0], C + self.damping * gram.float() @ d[1]

            def precondition(r: Pair, solve: Tensor = solve) -> Pair:
                return r[0] / (q * scale * (1 + self.damping)), solve @ r[1]

            step = conjugate_gradients(product, backward(x, at, G / len(x)), precondition, self.steps)
            at = self._searched(at, step, x, target)
        return at[0].double(), at[1].double() @ inverse

    def _searched(self, at: Pair, step: Pair, x_ND: Tensor, target_NV: Tensor) -> Pair:
        """The best of a few multiples of a step by KL on the batch; the point itself where none is better."""
        tried = [(at[0] + t * step[0], at[1] + t * step[1]) for t in (0.0, 0.02, 0.06, 0.2, 0.5, 1.0)]
        losses = [-(target_NV * torch.log_softmax((x_ND @ C.T) @ A.T, -1)).sum().item() for A, C in tried]
        return tried[min(range(len(tried)), key=lambda i: losses[i] if losses[i] == losses[i] else float("inf"))]


def blocks(tokens: np.ndarray, count: int, length: int, bos: Optional[int]) -> Tensor:
    """The first blocks [count, length + 1] of a text, begun with `bos` if there is one, which is no target."""
    found = torch.from_numpy(tokens[: count * length + 1].astype("int64")).unfold(0, length + 1, length).clone()
    if bos is not None:
        found[:, 0] = bos
    return found


def states(backbone: Backbone, ids: Tensor, device: torch.device) -> Tensor:
    """Hidden states [N, D] of blocks of tokens."""
    return torch.cat([backbone(part[:, :-1].to(device)).flatten(0, 1) for part in ids.split(8)])


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result and seconds of a piece of work."""
    if device.type == "cuda":
        work()  # once for libraries to load
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found, clock() - began


class Methods:
    """Everything compared. The `fisher` start of all ranks is computed once for a number of tokens; its seconds count
    for every method that begins with it.
    """

    def __init__(self, h_ND: Tensor, head: FullHead, batch: int):
        """Args: batch: tokens of a structured solve's batch."""
        self.h_ND, self.head, self.batch = h_ND, head, batch
        self.bases: dict[int, tuple[tuple[Calibration, Callable[[HeadKey], Factors]], float]] = {}

    def started(self, rank: int, tokens: int) -> tuple[Factors, Calibration, float]:
        """The `fisher` start, its moments, and the seconds that both took."""

        def work() -> tuple[Calibration, Callable[[HeadKey], Factors]]:
            c = calibrate([self.h_ND[:tokens]], self.head)
            return c, make_start("fisher", self.head, c)

        if tokens not in self.bases:
            self.bases[tokens] = timed(work, self.h_ND.device)
        (c, start), seconds = self.bases[tokens]
        A, B = start(HeadKey(rank, 1.0, 0))
        return (A.contiguous(), B.contiguous()), c, seconds

    def of_rank(self, rank: int) -> Iterator[tuple[str, Factors, float]]:
        """Name, factors and seconds of every method."""
        N, h, device = len(self.h_ND), self.h_ND, self.h_ND.device
        found, _, seconds = self.started(rank, N)
        yield f"fisher, {N:,} tokens", found, seconds
        for tokens, passes, step in ((N, 2, 1024), (N // 4, 1, 1024), (N // 8, 2, 512)):
            start, c, before = self.started(rank, tokens)
            step = min(step, max(64, tokens // 4))
            work = functools.partial(refine, [start], [h[:tokens]], self.head, c, passes, step)
            (found,), seconds = timed(work, device)
            yield f"refined, {tokens:,} tokens, {passes} passes", found, before + seconds
        for second_order in (True, False):
            solve = Solve(self.batch, 4, 3, 0.1, second_order)
            start, c, before = self.started(rank, N)
            found, seconds = timed(functools.partial(solve.run, start, h, self.head, c), device)
            kind = "second order" if second_order else "KL"
            yield f"gauss-newton, {kind}, 4 x {self.batch:,} tokens, 3 CG steps", found, before + seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("overrides", nargs="*", default=[], help="as for train.py: backbone=…, data=… (default: tiny)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64, 128])
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--held", type=int, default=16_384, help="held-out tokens")
    parser.add_argument("--batch", type=int, default=2_048, help="tokens of a structured solve's batch")
    parser.add_argument("--block", type=int, default=512, help="tokens of a block")


def losses(found: Factors, h_ND: Tensor, y_N: Tensor, head: FullHead) -> tuple[float, float]:
    """KL from the original head and loss of a head over held-out tokens, nats a token."""
    A, B = (x.to(h_ND.device, torch.float32) for x in found)
    loss = linear_cross_entropy(h_ND.float(), A, B, y_N, impl="chunked")
    return divergence([found], h_ND, head)[0], loss.item()


def run(args: argparse.Namespace) -> list[Row]:
    """One row per rank and method, whose note has its KL and loss."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        c = check_config(compose("train", overrides=args.overrides))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = Backbone.load(c.backbone, device)
    tokenizer = load_tokenizer(c.backbone)
    corpus = prepare(c.data, tokenizer)
    train, held = (
        blocks(tokens, count // args.block, args.block, leading_bos(tokenizer))
        for tokens, count in ((corpus.train, args.tokens), (corpus.validation, args.held))
    )
    h_ND, held_ND = states(backbone, train, device), states(backbone, held, device)
    y_N = held[:, 1:].flatten().to(device)
    own = full_head_loss(held_ND, backbone.head, y_N).item() / len(y_N)
    log.warning("%s: the original head's loss on %d held-out tokens is %.4f", backbone.name, len(y_N), own)
    methods, rows = Methods(h_ND, backbone.head, args.batch), []
    for rank in args.ranks:
        for name, found, seconds in methods.of_rank(rank):
            kl, loss = losses(found, held_ND, y_N, backbone.head)
            note = f"KL {kl:.4f}, loss {loss:.4f} on {len(y_N):,} held-out tokens (original head {own:.4f})"
            log.warning("r = %d: KL %.4f, loss %.4f, %.2f s, %s", rank, kl, loss, seconds, name)
            rows.append(row(NAME, f"{backbone.name} r={rank}", name, [seconds], device=device.type, note=note))
    return rows

"""Starts from the true second-order term and from the KL by structured solves, beside `fisher` and `refined`.

    python -m bottleneck.benchmark starts --backbone tiny --ranks 8 32 64 128

A structured solve (here `gauss-newton`) approximates KL(p* ‖ softmax(A C x)) around the current head by a quadratic
whose Hessian is JᵀFJ, with F = diag(p) − p pᵀ of every context and J the derivative of the logits by (A, C). It is
minimised by conjugate gradients, which need products with F only, so nothing V × V is formed. The blocks of the
surrogate that `fisher` minimises precondition it: rows of A by 1 / E[p_v (1 − p_v)], C by (Aᵀ Q A)⁻¹. With
`second-order`, p is the original head's and the target its logits, which is the second-order term of the KL; with `kl`,
p is the current head's.

Printed for every rank: KL from the original head on held-out tokens, and seconds (CPU time on a CPU, so that other
processes do not count). Findings: docs/log.md.

Dims: n tokens of a batch, N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from bottleneck.backbone.model import Backbone, FullHead, load_tokenizer
from bottleneck.benchmark.table import Row, row
from bottleneck.config.checks import check_config
from bottleneck.core.paths import CONF
from bottleneck.data.prepare import prepare
from bottleneck.heads.calibration import Calibration, calibrate, roots
from bottleneck.heads.key import HeadKey
from bottleneck.heads.starting import Factors, make_start
from bottleneck.heads.starts.refined import divergence, refine

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


def states(backbone: Backbone, ids: Tensor, device: torch.device) -> Tensor:
    """Hidden states [N, D] of blocks of tokens."""
    return torch.cat([backbone(part[:, :-1].to(device)).flatten(0, 1) for part in ids.split(8)])


def timed(work: Callable[[], list[Factors]], device: torch.device) -> tuple[list[Factors], float]:
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


def methods(h_ND: Tensor, head: FullHead, rank: int) -> Iterator[tuple[str, Callable[[], list[Factors]]]]:
    """Name and work of everything compared; each includes its own calibration."""

    def started(tokens: int) -> tuple[Factors, Calibration]:
        c = calibrate([h_ND[:tokens]], head)
        A, B = make_start("fisher", head, c)(HeadKey(rank, 1.0, 0))
        return (A.contiguous(), B.contiguous()), c

    def refined(tokens: int, passes: int, batch: int) -> list[Factors]:
        start, c = started(tokens)
        return refine([start], [h_ND[:tokens]], head, c, passes, batch)

    def solved(solve: Solve) -> list[Factors]:
        start, c = started(16_384)
        return [solve.run(start, h_ND, head, c)]

    yield "fisher 16k", lambda: [started(16_384)[0]]
    yield "refined 65k x 2", lambda: refined(65_536, 2, 1024)
    yield "refined 16k x 1", lambda: refined(16_384, 1, 1024)
    yield "refined 8k x 2", lambda: refined(8_192, 2, 512)
    for solve in (
        Solve(4_096, 2, 6, 0.03),
        Solve(4_096, 4, 4, 0.03),
        Solve(2_048, 8, 4, 0.1),
        Solve(8_192, 3, 12, 0.03),
        Solve(8_192, 3, 12, 0.03, second_order=True),
    ):
        kind = "second-order" if solve.second_order else "kl"
        name = f"gauss-newton {kind} {solve.tokens} x {solve.batches}, {solve.steps} steps, damping {solve.damping}"
        yield name, functools.partial(solved, solve)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--backbone", default="tiny", help="a choice of conf/backbone")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64, 128])
    parser.add_argument("--block", type=int, default=512, help="tokens of a block")


def run(args: argparse.Namespace) -> list[Row]:
    """One row per rank and method, whose note is its KL."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        c = check_config(compose("train", overrides=[f"backbone={args.backbone}"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = Backbone.load(c.backbone, device)
    corpus = prepare(c.data, load_tokenizer(c.backbone))
    train, held = (
        torch.from_numpy(tokens[: count * args.block + 1].astype("int64")).unfold(0, args.block + 1, args.block)
        for tokens, count in ((corpus.train, 65_536 // args.block), (corpus.validation, 16_384 // args.block))
    )
    h_ND, held_ND = states(backbone, train, device), states(backbone, held, device)
    rows = []
    for rank in args.ranks:
        for name, work in methods(h_ND, backbone.head, rank):
            found, seconds = timed(work, device)
            (kl,) = divergence(found, held_ND, backbone.head)
            log.warning("r = %d: KL %.4f nats, %.2f s, %s", rank, kl, seconds, name)
            note = f"KL {kl:.4f} nats on {len(held_ND)} held-out tokens"
            rows.append(row(NAME, f"{backbone.name} r={rank}", name, [seconds], device=device.type, note=note))
    return rows

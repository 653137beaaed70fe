"""A step of one head under each objective, beside its step of cross-entropy on the same tensors.

The teacher's logits are one product of hidden size d for all heads of a bank. The time of a head is therefore the
difference between a bank of several equal heads and one of a single head, divided by the number of heads between; the
rest of the single head's time is the row `teacher`. Steps run as CUDA graphs on a GPU, so that kernels are compared.
Errors are those of dA and dB against the objective's definition in float32, and --plain adds those of the definition
in bfloat16, a few hundred tokens of it.

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bottleneck.benchmark.clock import seconds
from bottleneck.benchmark.heads import as_graph, random_case, whole_numbers
from bottleneck.benchmark.peers import Case, Work
from bottleneck.benchmark.table import Row, row
from bottleneck.core.extensions import OBJECTIVES
from bottleneck.losses import choose, step, targets, weights
from bottleneck.losses.objective import BoundObjective, steps
from bottleneck.losses.products import matmul_f32

NAME = "objectives"
MORE = 4  # heads of the larger bank beyond the first
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "distill": ("distill", {"temperature": 1.0}),
    "distill, T = 2": ("distill", {"temperature": 2.0}),
    "mixed": ("mixed", {"temperature": 1.0, "mix": 0.5}),
    "lk, hybrid": ("lk", {"form": "hybrid", "eta": 3.0}),
    "lk, log": ("lk", {"form": "log", "eta": 3.0}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--ranks", default="8,64,128,256,512,1024" if cuda else "8,64")
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 512, help="N (default: 8192 on a GPU)")
    parser.add_argument("--vocab", type=int, default=50_304 if cuda else 1024, help="V (default: 50304 on a GPU)")
    parser.add_argument("--hidden", type=int, default=768, help="D of the teacher (default: 768)")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)


def run(args: argparse.Namespace) -> list[Row]:
    """A row per rank and objective; the note of a row is its time in units of cross-entropy's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said, rows = Console(stderr=True), []
    for R in whole_numbers("--ranks", args.ranks):
        c = random_case(args.tokens, args.hidden, R, args.vocab, device)
        g = torch.Generator(device=device).manual_seed(0)
        W = (torch.randn(args.vocab, args.hidden, generator=g, device=device) / args.hidden**0.5).to(c.h.dtype)
        case = f"N={args.tokens} V={args.vocab} d={args.hidden} r={R}"
        base = _head_seconds(functools.partial(_bank, c, None), device, args.repeats)[1]
        rows.append(row(NAME, case, "ce", [base], device=device))
        for label, (name, options) in SETTINGS.items():
            o = BoundObjective(OBJECTIVES[name], options, functools.partial(_logits, W.T))
            try:
                shared, own = _head_seconds(functools.partial(_bank, c, o), device, args.repeats)
                dA, dB, plain_A, plain_B = _errors(c, o)
                note = f"{own / base:.2f} x ce; all heads share {1e3 * shared:.3g} ms"
                note += f"; plain: dA {plain_A:.1e}, dB {plain_B:.1e}"
                rows.append(row(NAME, case, label, [own], device=device, dA_error=dA, dB_error=dB, note=note))
                said.print(f"r={R} {label}: {1e3 * own:.3f} ms, {note}; same bits: {_same_bits(c, o)}", highlight=False)
            except torch.OutOfMemoryError as error:
                said.print(f"r={R} {label}: {error}", highlight=False)
    return rows


def _logits(W_DV: Tensor, h_ND: Tensor) -> Tensor:
    return matmul_f32(h_ND, W_DV)


def _bank(c: Case, o: BoundObjective | None, heads: int, tokens: int | None = None) -> Work:
    """A step of equal heads; returns the first head's mean loss and gradients."""
    h, y = c.h[:tokens], targets(c.y[:tokens])
    impl = choose(c.h.device, c.h.dtype, len(c.h), *c.A.shape)
    w = [weights(c.A, c.B, c.h.dtype, impl) for _ in range(heads)]
    gradients = [(torch.zeros(c.A.shape, device=h.device), torch.zeros(c.B.shape, device=h.device)) for _ in w]

    def work() -> tuple[Tensor, Tensor, Tensor]:
        if o is None:
            losses = torch.stack([step(h, one, y, *grads, 1 / len(h)) for one, grads in zip(w, gradients)])
        else:
            losses = steps(h, w, y, gradients, 1 / len(h), o)
        dA, dB = gradients[0]
        return losses[0].mean(), dA, dB

    return work


def _head_seconds(bank: Callable[[int], Work], device: str, repeats: int) -> tuple[float, float]:
    """Seconds of what the heads share, and of one head."""
    found = []
    for heads in (1, 1 + MORE):
        work = bank(heads)
        times = seconds(as_graph(work) if device == "cuda" else work, device, repeats)
        found.append(sorted(times)[len(times) // 2])
    own = (found[1] - found[0]) / MORE
    return found[0] - own, own


def _errors(c: Case, o: BoundObjective, tokens: int = 256) -> list[float]:
    """Relative errors of dA and dB, ours and those of plain PyTorch in 16 bits, against float64 on some tokens."""
    y = c.y[:tokens]

    def defined(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B, h = c.A.detach().to(dtype).requires_grad_(), c.B.detach().to(dtype).requires_grad_(), c.h[:tokens]
        wide = torch.promote_types(dtype, torch.float32)
        log_p = o.log_teacher(h)
        assert log_p is not None
        logits = (h.to(dtype) @ B.T @ A.T).to(wide)
        dA, dB = torch.autograd.grad(o.loss(logits, y, log_p.to(wide)).mean(), (A, B))
        return dA, dB

    exact = defined(torch.float64)
    mine = _bank(c, o, 1, tokens)()[1:]
    plain = defined(c.h.dtype)
    return [((x - want).norm() / want.norm()).item() for got in (mine, plain) for x, want in zip(got, exact)]


def _same_bits(c: Case, o: BoundObjective) -> bool:
    """Whether a head has the same bits alone, in company and in a rerun."""
    found = [_bank(c, o, heads)() for heads in (1, 3, 1)]
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))

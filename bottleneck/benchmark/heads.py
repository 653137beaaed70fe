"""One head step (loss, and the gradients of A and B) by every implementation that is installed, on the same tensors.

Ours is the call a bank makes: heads in the dtype of the hidden states, gradients added to float32 buffers. Peers get what is
fastest for them: parameters and gradients in 16 bits, autograd. Memory is counted beyond inputs and gradients; errors are relative
to the same step in float32 on the same (16-bit) inputs, ‖x − truth‖ / ‖truth‖.

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bottleneck.benchmark.clock import peak_mib, seconds
from bottleneck.benchmark.table import Row, row
from bottleneck.config.checks import as_count
from bottleneck.core.errors import check
from bottleneck.core.files import write_atomic
from bottleneck.losses import choose, linear_cross_entropy, step, targets, weights
from bottleneck.losses.choice import TABLE

NAME = "heads"
RANKS = "8,16,32,64,128,256,512,768,1024,2048"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--ranks", default=RANKS if cuda else "8,64,256", help=f"default on a GPU: {RANKS}")
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 2048, help="N (default: 8192 on a GPU)")
    parser.add_argument("--vocab", type=int, default=50_304 if cuda else 8192, help="V (default: 50304 on a GPU)")
    parser.add_argument("--hidden", type=int, help="D (default: 768, from rank 769 2048)")
    parser.add_argument("--repeats", type=int, default=50 if cuda else 5)
    parser.add_argument("--ours", action="store_true", help="only the implementations of this repository")
    parser.add_argument("--write-table", action="store_true", help=f"write {TABLE.name}, by which impl=auto chooses")


class Case(NamedTuple):
    """Tensors of one step; A and B in the dtype of h."""

    h: Tensor
    A: Tensor
    B: Tensor
    y: Tensor

    @property
    def truth(self) -> tuple[float, Tensor, Tensor]:
        """Mean loss and gradients in float32, a chunk of tokens at a time."""
        h, A, B = self.h.float(), self.A.detach().float(), self.B.detach().float()
        dA, dB, loss = torch.zeros_like(A), torch.zeros_like(B), 0.0
        w = weights(A, B, torch.float32, "reference")
        for part in range(0, len(h), 1024):
            y = targets(self.y[part : part + 1024])
            loss += step(h[part : part + 1024], w, y, dA, dB, 1 / len(h)).sum(dtype=torch.float64).item() / len(h)
        return loss, dA, dB


def make_case(N: int, D: int, R: int, V: int, device: str) -> Case:
    g = torch.Generator(device=device).manual_seed(R)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    A = torch.randn(V, R, generator=g, device=device) / R**0.5
    B = torch.randn(R, D, generator=g, device=device) / D**0.5
    h = torch.randn(N, D, generator=g, device=device)
    y = torch.randint(V, (N,), generator=g, device=device)
    return Case(h.to(dtype), A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_(), y)


Work = Callable[[], tuple[Tensor, Tensor, Tensor]]  # one step: mean loss, dA, dB


def ours(c: Case, impl: str) -> Work:
    w = weights(c.A, c.B, c.h.dtype, impl)
    dA, dB = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (c.A, c.B))
    N = len(c.h)

    def work():
        return step(c.h, w, targets(c.y), dA, dB, 1 / N).sum(dtype=torch.float64) / N, dA, dB

    return work


def autograd(c: Case, loss: Callable[[], Tensor]) -> Work:
    def work():
        c.A.grad = c.B.grad = None
        value = loss()
        value.backward()
        return value.detach(), c.A.grad, c.B.grad

    return work


def products(c: Case) -> Work:
    """The three products alone, without softmax, logits in 16 bits: not a loss."""
    z = (c.h @ c.B.T).detach()

    def work():
        with torch.no_grad():
            G = z @ c.A.T
            return G[0, 0], G.T @ z, (G @ c.A).T @ c.h

    return work


def eager(h: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((h @ B.T @ A.T).float(), y)


def peers(c: Case) -> Iterator[tuple[str, Work]]:
    """Everything installed that computes the same, imported only here."""
    yield "eager", autograd(c, lambda: eager(c.h, c.A, c.B, c.y))
    if c.h.is_cuda:
        torch._dynamo.reset()
        compiled = torch.compile(eager)
        yield "torch.compile", autograd(c, lambda: compiled(c.h, c.A, c.B, c.y))
    if hasattr(F, "linear_cross_entropy"):
        options: Any = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=1024)
        yield (
            "torch native, chunks of 1024",
            autograd(c, lambda: F.linear_cross_entropy(c.h @ c.B.T, c.A, c.y, options=options)),
        )
    if c.h.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        yield "liger", autograd(c, lambda: liger(c.A, c.h @ c.B.T, c.y))
    if c.h.is_cuda and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        yield "cut-cross-entropy", autograd(c, lambda: cut(c.h @ c.B.T, c.A, c.y))


def _error(x: Tensor, truth: Tensor) -> float:
    return ((x.float() - truth).norm() / truth.norm()).item()


def run(args: argparse.Namespace) -> list[Row]:
    """Rows of every implementation at every rank."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("tokens", "vocab", "repeats"):
        as_count(f"--{name}", getattr(args, name))
    try:
        ranks = [as_count("--ranks", int(r)) for r in args.ranks.split(",")]
    except ValueError:
        ranks = []
    check(bool(ranks), f"--ranks {args.ranks}: must be whole numbers with commas between")
    rows: list[Row] = []
    said = Console(stderr=True)
    for R in ranks:
        D = args.hidden or (768 if R <= 768 else 2048)
        c = make_case(args.tokens, D, R, args.vocab, device)
        loss, dA, dB = c.truth
        picked = choose(c.h.device, c.h.dtype, len(c.h), *c.A.shape)
        impls = [
            ("ours: " + i + (" = auto" if i == picked else ""), i)
            for i in (("chunked", "fused") if device == "cuda" else ("chunked", "reference"))
        ]
        found: list[tuple[str, Work]] = [(label, ours(c, impl)) for label, impl in impls]
        found += [("linear_cross_entropy", autograd(c, lambda c=c: linear_cross_entropy(c.h, c.A, c.B, c.y)))]
        if not args.ours:
            found += [*peers(c), ("bare products", products(c))]
        for label, work in found:
            said.print(f"rank {R}: {label}", highlight=False)
            try:
                rows.append(_measure(label, work, c, args.repeats, device, (loss, dA, dB)))
            except Exception as error:  # a peer that cannot do this shape is a finding, not an end
                said.print(f"rank {R}: {label}: {type(error).__name__}: {str(error)[:200]}", highlight=False)
    if args.write_table:
        _write_table(rows, args, device)
    return rows


def _measure(label: str, work: Work, c: Case, repeats: int, device: str, truth: tuple[float, Tensor, Tensor]) -> Row:
    ours_ = label.startswith("ours")
    first = work()  # ours adds to zeros here; compiles where something is compiled
    errors = {}
    if label != "bare products":
        errors = {
            "loss_error": abs(first[0].item() - truth[0]) / truth[0],
            "dA_error": _error(first[1], truth[1]),
            "dB_error": _error(first[2], truth[2]),
        }
    del first
    gradients = 0 if ours_ else sum(t.numel() * t.element_size() for t in (c.A, c.B)) / 2**20
    c.A.grad = c.B.grad = None
    peak = peak_mib(work, device)
    times = seconds(work, device, repeats)
    # a step that takes long is not repeated to no end
    peak = None if peak is None else peak - gradients
    N, D = c.h.shape
    case = f"N={N} V={len(c.A)} d={D} r={c.A.shape[1]}"
    return row(NAME, case, label, times, N, "tokens", peak_mib=peak, device=device, **errors)


def _write_table(rows: list[Row], args: argparse.Namespace, device: str) -> None:
    """Replace the rows of this device and shape in the table; keep the others."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    keep = []
    if TABLE.is_file():
        with open(TABLE, newline="") as f:
            keep = [
                r
                for r in csv.DictReader(f)
                if (r["device"], r["tokens"], r["vocab"]) != (device, str(args.tokens), str(args.vocab))
            ]
    for r in rows:
        if r.implementation.startswith("ours"):
            rank = r.case.rsplit("r=", 1)[1]
            impl = r.implementation.removeprefix("ours: ").removesuffix(" = auto")
            keep.append(
                {
                    "device": device,
                    "dtype": dtype,
                    "tokens": args.tokens,
                    "vocab": args.vocab,
                    "rank": rank,
                    "impl": impl,
                    "ms": f"{1e3 * r.p50:.4g}",
                }
            )
    lines = ["device,dtype,tokens,vocab,rank,impl,ms", *(",".join(str(v) for v in r.values()) for r in keep)]
    write_atomic(TABLE, lambda part: Path(part).write_text("\n".join(lines) + "\n"))

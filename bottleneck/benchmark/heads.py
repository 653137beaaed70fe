"""One head step (loss, and the gradients of A and B) by every implementation that is installed, on the same tensors.

Ours is the call that a bank makes: heads in the dtype of the hidden states, gradients added to float32 buffers. Peers
are in `benchmark.peers`. Memory is counted beyond inputs and gradients. Errors are relative to the same step in float32
on the same (16-bit) inputs, ‖x − truth‖ / ‖truth‖. A row's note compares its time with the best peer's and with that of
the three matrix products alone. Tensors are random, or with --backbone the hidden states of a text and low-rank heads
for them, whose logits are peaked.

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from rich.console import Console
from torch import Tensor

from bottleneck.benchmark import hidden, peers, shapes, slowed
from bottleneck.benchmark.clock import peak_mib, seconds
from bottleneck.benchmark.peers import Case, Work
from bottleneck.benchmark.table import Row, row
from bottleneck.config.numbers import as_count
from bottleneck.core.errors import check
from bottleneck.core.extensions import LOSSES
from bottleneck.core.files import write_atomic
from bottleneck.heads.micro_steps import record
from bottleneck.losses import choose, linear_cross_entropy, step, targets, weights
from bottleneck.losses.choice import TABLE, usable

NAME = "heads"
RANKS = "8,16,32,64,128,256,512,768,1024,2048"
BARE = "bare products"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--ranks", default=RANKS if cuda else "8,64,256", help=f"default on a GPU: {RANKS}")
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 2048, help="N (default: 8192 on a GPU)")
    parser.add_argument("--vocab", type=int, default=50_304 if cuda else 8192, help="V (default: 50304 on a GPU)")
    parser.add_argument("--hidden", type=int, help="D (default: 768, from rank 769 2048)")
    parser.add_argument("--shape", help=f"V and D of a model: {', '.join(shapes.SHAPES)}")
    parser.add_argument("--backbone", type=Path, help="folder of a backbone: real hidden states, targets and heads")
    parser.add_argument("--text", type=Path, help="with --backbone: a text file (default: the embedded sample)")
    parser.add_argument(
        "--memory", help="bytes that ours may hold, with commas between (default: head.loss_memory=auto)"
    )
    parser.add_argument("--repeats", type=int, default=50 if cuda else 5)
    parser.add_argument("--ours", action="store_true", help="only the implementations of this repository")
    parser.add_argument(
        "--skip", default="", help="implementations to leave out, by the start of their labels: eager,liger"
    )
    parser.add_argument("--write-table", action="store_true", help=f"write {TABLE.name}, by which impl=auto chooses")


class Truth(NamedTuple):
    """Mean loss and gradients in float32."""

    loss: float
    dA: Tensor
    dB: Tensor


def truth(c: Case) -> Truth:
    """Compute a step in float32, a chunk of tokens at a time."""
    h, A, B = c.h.float(), c.A.detach().float(), c.B.detach().float()
    dA, dB, loss = torch.zeros_like(A), torch.zeros_like(B), 0.0
    w = weights(A, B, torch.float32, "reference")
    for part in range(0, len(h), 1024):
        y = targets(c.y[part : part + 1024])
        found = step(h[part : part + 1024], w, y, dA, dB, scale=1 / len(h))
        loss += found.sum(dtype=torch.float64).item() / len(h)
    return Truth(loss, dA, dB)


def random_case(N: int, D: int, R: int, V: int, device: str) -> Case:
    """Random tensors of a shape, logits of variance 1; bfloat16 on a GPU, else float32."""
    g = torch.Generator(device=device).manual_seed(R)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    A = torch.randn(V, R, generator=g, device=device) / R**0.5
    B = torch.randn(R, D, generator=g, device=device) / D**0.5
    h = torch.randn(N, D, generator=g, device=device)
    y = torch.randint(V, (N,), generator=g, device=device)
    return Case(h.to(dtype), A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_(), y)


def ours(c: Case, impl: str, memory: Optional[int] = None) -> Work:
    """A step as a bank makes it."""
    w = weights(c.A, c.B, c.h.dtype, impl, memory)
    dA, dB = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (c.A, c.B))
    N = len(c.h)

    def work() -> tuple[Tensor, Tensor, Tensor]:
        losses = step(c.h, w, targets(c.y), dA, dB, scale=1 / N)
        return losses.sum(dtype=torch.float64) / N, dA, dB

    return work


def as_graph(work: Work) -> Work:
    """A step of ours recorded as a CUDA graph, as a bank of low-rank heads records it; the first call records."""
    recorded: list[tuple[Callable[[], None], tuple[Tensor, Tensor, Tensor]]] = []

    def replayed() -> tuple[Tensor, Tensor, Tensor]:
        if not recorded:
            for gradient in work()[1:]:  # compiles the kernels
                gradient.zero_()
            recorded.append(record(work))
        replay, result = recorded[0]
        replay()
        return result

    return replayed


def whole_numbers(name: str, text: str) -> list[int]:
    """Return the numbers of an argument. Raises UserError."""
    whole = all(w.strip().isdigit() for w in text.split(","))
    check(whole, f"{name} {text}: must be whole numbers with commas between")
    return [as_count(name, int(w)) for w in text.split(",")]


def _cases(args: argparse.Namespace, ranks: list[int], device: str) -> Callable[[int], Case]:
    """Return a function that makes the tensors of a rank. Raises UserError."""
    check(args.text is None or args.backbone is not None, "--text: is used only with --backbone")
    if args.backbone is not None:
        real = hidden.read(args.backbone, args.text, args.tokens, device)
        top = real.W_VD.shape[1]
        check(max(ranks) <= top, f"--ranks {args.ranks}: allowed are 1 to {top}, the hidden size of {args.backbone}")
        return real.case
    if args.shape is not None:
        known = shapes.shape(args.shape)
        return lambda R: random_case(args.tokens, known.hidden, R, known.vocab, device)
    return lambda R: random_case(args.tokens, args.hidden or (768 if R <= 768 else 2048), R, args.vocab, device)


def run(args: argparse.Namespace) -> list[Row]:
    """Return a row per rank and implementation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("tokens", "vocab", "repeats"):
        as_count(f"--{name}", getattr(args, name))
    ranks = whole_numbers("--ranks", args.ranks)
    memories: list[Optional[int]] = [*whole_numbers("--memory", args.memory)] if args.memory else [None]
    make = _cases(args, ranks, device)
    rows: list[Row] = []
    for R in ranks:
        c = make(R)
        rows += _compared(_works(c, args, memories), c, args.repeats, device)
    if args.write_table:
        if device == "cuda":
            slowed.check_times(TABLE.name)
        _write_table(rows, args, device)
    return rows


def _works(c: Case, args: argparse.Namespace, memories: list[Optional[int]]) -> list[tuple[str, Work]]:
    device = c.h.device.type
    picked = choose(c.h.device, c.h.dtype, len(c.h), *c.A.shape)
    found: list[tuple[str, Work]] = []
    for impl in usable(device, c.h.dtype):
        label = f"ours: {impl}{' = auto' if impl == picked else ''}"
        for memory in memories if impl == "fused" else [None]:
            given = f", {memory >> 20} MiB" if memory is not None else ""
            found.append((label + given, ours(c, impl, memory)))
            if device == "cuda" and impl == "fused":
                found.append((f"{label}{given}, as a graph", as_graph(ours(c, impl, memory))))
    skipped = tuple(name.strip() for name in args.skip.split(",") if name.strip())
    if not args.ours:
        found.append(("linear_cross_entropy", peers.autograd(c, lambda: linear_cross_entropy(c.h, c.A, c.B, c.y))))
        found += [*peers.installed(c), (BARE, peers.products(c))]
    return [(label, work) for label, work in found if not (skipped and label.startswith(skipped))]


def _compared(works: list[tuple[str, Work]], c: Case, repeats: int, device: str) -> list[Row]:
    """Rows of one shape; each note says how the time compares with the best peer's and the bare products'."""
    console, want, rows = Console(stderr=True), truth(c), []
    for label, work in works:
        console.print(f"rank {c.A.shape[1]}: {label}", highlight=False)
        try:
            rows.append(_measure(label, work, c, repeats, device, want))
        except Exception as error:  # a peer that does not support this shape is a finding; the benchmark continues
            console.print(f"  {type(error).__name__}: {str(error)[:200]}", highlight=False)
    own = ("ours", "linear_cross_entropy", BARE)
    theirs = [r for r in rows if not r.implementation.startswith(own)]
    best = min(theirs, key=lambda r: r.p50) if theirs else None
    bare = next((r for r in rows if r.implementation == BARE), None)
    for r in rows:
        notes = [f"{r.p50 / best.p50:.2f} x {best.implementation}"] if best is not None and r is not best else []
        notes += [f"{r.p50 / bare.p50:.2f} x bare"] if bare is not None and r is not bare else []
        r.note = ", ".join(notes)
    return rows


def _error(x: Tensor, want: Tensor) -> float:
    return ((x.float() - want).norm() / want.norm()).item()


def _measure(label: str, work: Work, c: Case, repeats: int, device: str, want: Truth) -> Row:
    first = work()  # ours adds to zeros here; also triggers compilation
    errors = {}
    if label != BARE:
        errors = {
            "loss_error": abs(first[0].item() - want.loss) / want.loss,
            "dA_error": _error(first[1], want.dA),
            "dB_error": _error(first[2], want.dB),
        }
    del first
    c.A.grad = c.B.grad = None
    peak = peak_mib(work, device)
    times = seconds(work, device, repeats)
    if peak is not None and not label.startswith("ours"):  # peers create gradients, ours adds to existing ones
        peak -= sum(t.numel() * t.element_size() for t in (c.A, c.B)) / 2**20
    N, D = c.h.shape
    case = f"N={N} V={len(c.A)} d={D} r={c.A.shape[1]}"
    return row(NAME, case, label, times, N, "tokens", peak_mib=peak, device=device, **errors)


def _write_table(rows: list[Row], args: argparse.Namespace, device: str) -> None:
    """Replace the rows of this device and shape in the table; keep the others."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    mine = (device, str(args.tokens), str(args.vocab))
    keep: list[dict[str, object]] = []
    if TABLE.is_file():
        with open(TABLE, newline="") as f:
            keep = [{**r} for r in csv.DictReader(f) if (r["device"], r["tokens"], r["vocab"]) != mine]
    for r in rows:
        impl = r.implementation.removeprefix("ours: ").removesuffix(" = auto")
        if r.implementation.startswith("ours") and impl in LOSSES and impl != "reference":
            about = {"device": device, "dtype": dtype, "tokens": args.tokens, "vocab": args.vocab}
            keep.append({**about, "rank": r.case.rsplit("r=", 1)[1], "impl": impl, "ms": f"{1e3 * r.p50:.4g}"})
    lines = ["device,dtype,tokens,vocab,rank,impl,ms", *(",".join(str(v) for v in r.values()) for r in keep)]
    write_atomic(TABLE, lambda part: Path(part).write_text("\n".join(lines) + "\n"))

"""Forward and backward of one head step by each implementation, beside PyTorch's own chunked loss where it has one.

    python launch/losses.py [--tokens 2048] [--vocab 8192] [--hidden 256] [--ranks 8,64,256]

Prints milliseconds (median of the repeats) on this machine's CPU in float32, in one run, so ratios can be compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bottleneck.losses import IMPLS, linear_cross_entropy


def native(h, A, B, y, rows: int):
    """torch.nn.functional.linear_cross_entropy (2.13 and later) on z = h Bᵀ, in chunks of `rows` tokens."""
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
    return F.linear_cross_entropy(h @ B.T, A, y, options=options)


def milliseconds(loss, A, B, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        A.grad = B.grad = None
        start = time.perf_counter()
        loss().backward()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("vocab", 8192), ("hidden", 256), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ranks", default="8,64,256")
    args = parser.parse_args()
    torch.manual_seed(0)
    h, y = torch.randn(args.tokens, args.hidden), torch.randint(args.vocab, (args.tokens,))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, N = {args.tokens}, V = {args.vocab}, d = {args.hidden}")
    for rank in map(int, args.ranks.split(",")):
        A = (torch.randn(args.vocab, rank) / rank**0.5).requires_grad_()
        B = (torch.randn(rank, args.hidden) / args.hidden**0.5).requires_grad_()
        rows = {impl: lambda impl=impl: linear_cross_entropy(h, A, B, y, impl=impl) for impl in IMPLS}
        if hasattr(F, "linear_cross_entropy"):
            rows |= {f"native/{n}": lambda n=n: native(h, A, B, y, n) for n in (64, 256, 1024)}
        print(f"r = {rank:4d}  " + "  ".join(f"{k} {milliseconds(f, A, B, args.repeats):.0f} ms" for k, f in rows.items()))


if __name__ == "__main__":
    main()

"""The structured solves of `benchmark starts`: their algebra against dense matrices, and a tiny run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bottleneck.benchmark import __main__ as benchmark
from bottleneck.benchmark.starts import Pair, backward, blocks, conjugate_gradients, dot, fisher_product, forward


def pair(g: torch.Generator) -> Pair:
    return torch.randn(7, 2, generator=g, dtype=torch.float64), torch.randn(2, 5, generator=g, dtype=torch.float64)


def test_products_are_those_of_dense_matrices():
    """`forward` is the derivative of the logits, `backward` its transpose, and the solve that of H = JᵀFJ + I."""
    g = torch.Generator().manual_seed(0)
    x, at, step = torch.randn(30, 5, generator=g, dtype=torch.float64), pair(g), pair(g)

    def logits(A: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        return x @ C.T @ A.T

    derivative = torch.autograd.functional.jvp(logits, at, step)[1]
    assert torch.allclose(forward(x, at, step), derivative)
    G = torch.randn(30, 7, generator=g, dtype=torch.float64)
    assert dot(step, backward(x, at, G)).item() == pytest.approx((derivative * G).sum().item())
    p = torch.softmax(logits(*at), -1)
    F = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(fisher_product(p, G), (F @ G[:, :, None])[..., 0])

    def product(d: Pair) -> Pair:
        A, C = backward(x, at, fisher_product(p, forward(x, at, d)))
        return A + d[0], C + d[1]

    found = conjugate_gradients(product, step, lambda r: r, 60)
    again = product(found)
    assert torch.allclose(again[0], step[0], atol=1e-6) and torch.allclose(again[1], step[1], atol=1e-6)


def test_blocks_begin_with_the_token_before_every_text():
    """Regression: Gemma's blocks began without it, which raises its loss by half. Targets stay those of the text."""
    tokens = np.arange(10, 30, dtype=np.uint32)
    plain, led = blocks(tokens, 3, 4, None), blocks(tokens, 3, 4, 2)
    assert plain.tolist() == [[10, 11, 12, 13, 14], [14, 15, 16, 17, 18], [18, 19, 20, 21, 22]]
    assert led[:, 0].tolist() == [2, 2, 2] and torch.equal(led[:, 1:], plain[:, 1:]) and tokens[0] == 10


@pytest.mark.slow
def test_a_tiny_run_of_starts(tmp_path):
    """Every method has a row with its KL and loss; at full rank the closed form is the original head."""
    command = "starts --tokens 512 --held 256 --batch 32 --block 128 --ranks 8 256 --csv"
    rows = benchmark.command([*command.split(), str(tmp_path / "rows.csv")])
    assert len(rows) == 12 and {r.case for r in rows} == {"tiny r=8", "tiny r=256"}
    kl = {(r.case, r.implementation.partition(",")[0]): float(r.note.split()[1].rstrip(",")) for r in rows[::-1]}
    assert abs(kl["tiny r=256", "fisher"]) < 1e-3 < 1 < kl["tiny r=8", "fisher"]

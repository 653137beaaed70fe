"""Kernels of heads that learn from a teacher: against autograd of the definition, on both ways to hold the logits."""

from __future__ import annotations

import pytest
import torch

import bottleneck.losses.taught as taught
from bottleneck.core.extensions import OBJECTIVES
from bottleneck.losses.linear import targets, weights
from bottleneck.losses.objective import BoundObjective, steps
from bottleneck.losses.products import matmul_f32
from bottleneck.losses.taught import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    ("distill", {"temperature": 1.0}),
    ("mixed", {"temperature": 1.0, "mix": 0.5}),
    ("lk", {"form": "hybrid", "eta": 3.0}),
    ("lk", {"form": "log", "eta": 3.0}),
]


def problem(N, D, V, ranks, peaked=1.0):
    """Heads [(A, B)], hidden states, the teacher's W, and targets of which some are ignored."""
    g = torch.Generator().manual_seed(3)
    h, W = torch.randn(N, D, generator=g), peaked * torch.randn(V, D, generator=g) / 2
    y = torch.randint(0, V, (N,), generator=g)
    y[::9] = -100
    heads = [(torch.randn(V, r, generator=g), torch.randn(r, D, generator=g) / 3) for r in ranks]
    return [(A.to(DEVICE), B.to(DEVICE)) for A, B in heads], h.to(DEVICE), W.to(DEVICE), y.to(DEVICE)


def by_kernels(name, options, heads, h, W, y, dtype):
    """Losses [H, N] and gradients [(dA, dB)] of the summed losses."""
    o = BoundObjective(OBJECTIVES[name], options, lambda x: matmul_f32(x, W.to(dtype).T))
    grads = [(torch.zeros_like(A), torch.zeros_like(B)) for A, B in heads]
    cast = [weights(A, B, dtype, "fused") for A, B in heads]
    return steps(h.to(dtype), cast, targets(y), grads, 1.0, o), grads


def by_definition(name, options, head, h, W, y, dtype):
    """(loss [N], dA, dB) by autograd; logits in `dtype`, the rest in float32 or float64."""
    A, B = (t.to(dtype).requires_grad_() for t in head)
    keep, wide = y >= 0, torch.promote_types(dtype, torch.float32)
    T = options.get("temperature", 1.0)
    log_p = torch.log_softmax((h.to(dtype) @ W.to(dtype).T).to(wide) / T, -1)
    logits = ((h.to(dtype) @ B.T) @ A.T).to(wide)
    loss = OBJECTIVES[name].loss(logits, y.clamp(min=0), log_p, options) * keep
    return loss.detach(), *torch.autograd.grad(loss.sum(), (A, B))


@pytest.fixture(params=["flash", "exponentials", "logits"])
def way(request, monkeypatch):
    """In several chunks, and blocks of a row."""
    monkeypatch.setattr(taught, "rows", lambda *a: 8)
    monkeypatch.setattr(taught, "ROW", Tile(1, 128, 4, 1))
    if request.param != "flash":
        monkeypatch.setattr(taught, "FLASH_RANK", 0)
    if request.param == "logits":
        monkeypatch.setattr(taught, "EXPONENTS", None)
    return request.param


@pytest.mark.parametrize("name, options", CASES)
def test_gradients_are_those_of_the_definition(name, options, way):
    heads, h, W, y = problem(10, 12, 150, (3, 16))
    losses, grads = by_kernels(name, options, heads, h, W, y, torch.float32)
    for head, loss, (dA, dB) in zip(heads, losses, grads):
        for found, want in zip((loss, dA, dB), by_definition(name, options, head, h, W, y, torch.float64)):
            assert (found - want).norm() <= 2e-5 * want.norm()
    loss, ((dA, dB),) = by_kernels(name, options, heads[1:], h, W, y, torch.float32)  # alone: the same bits
    assert torch.equal(loss[0], losses[1]) and torch.equal(dA, grads[1][0]) and torch.equal(dB, grads[1][1])


def equal_shares(head, h, W):
    """Where q is t up to the rounding of 16 bits and not negligible [N, V], and the largest t of each row, alike."""
    q, t = (torch.softmax(h.double() @ w.double().T, -1) for w in (head[0] @ head[1], W))
    return ((q / t - 1).abs() < 2**-7) & (q > 1e-3), t == t.amax(-1, keepdim=True)


@pytest.mark.parametrize("way", ["flash", "exponentials"], indirect=True)
@pytest.mark.parametrize("peaked", [1.0, 8.0])
@pytest.mark.parametrize("name, options", [CASES[1], CASES[3]])
def test_sixteen_bits_are_as_close_as_plain_pytorch(name, options, peaked, way):
    """Three ways; also for a teacher that is nearly certain, where rounding its largest probability would dominate."""
    heads, h, W, y = problem(8, 24, 200, (16,), peaked)
    if peaked > 1:  # a head that agrees with it, but not quite
        noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        heads = [(W + 0.05 * noise, torch.eye(24, device=DEVICE))]
    heads = [tuple(t.bfloat16().float() for t in head) for head in heads]
    h, W = h.bfloat16().float(), W.bfloat16().float()
    losses, grads = by_kernels(name, options, heads, h, W, y, torch.bfloat16)
    near, top = equal_shares(heads[0], h, W)
    assert peaked == 1 or not (near & ~top).any()  # at q = t the gradient of `lk` jumps, and rounding decides
    exact, plain = (by_definition(name, options, heads[0], h, W, y, d) for d in (torch.float64, torch.bfloat16))
    for found, want, other in zip((losses[0], *grads[0]), exact, plain):
        assert (found - want).norm() <= 1.05 * (other - want).norm()


def test_a_lost_exponential_keeps_its_share_of_the_loss(monkeypatch):
    """A logit 60 nats below the largest is 0 among the exponentials, but the teacher gives it half of its weight."""
    monkeypatch.setattr(taught, "FLASH_RANK", 0)
    V, R = 200, 16
    h, A, B = torch.ones(3, R, device=DEVICE), torch.zeros(V, R, device=DEVICE), torch.eye(R, device=DEVICE)
    A[7], A[150] = -60.0 / R, 0.5
    W = torch.full((V, R), -5.0, device=DEVICE)
    W[7] = W[150] = 0.0
    o = BoundObjective(OBJECTIVES["distill"], {"temperature": 1.0}, lambda x: x @ W.T)
    w = weights(A, B, torch.float32, "fused")
    grads = [(torch.zeros_like(A), torch.zeros_like(B))]
    (loss,) = steps(h, [w], targets(torch.zeros(3, device=DEVICE).long()), grads, 1.0, o)
    want = o.loss(h @ A.T, torch.zeros(3).long(), torch.log_softmax(h @ W.T, -1))
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=0.0)

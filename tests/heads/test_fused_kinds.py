"""Kinds of heads on kernels (in Triton's interpreter without a GPU): losses and gradients against float64 autograd."""

from __future__ import annotations

import pytest
import torch

from bottleneck.core.extensions import HEAD_KINDS
from bottleneck.heads import head as head_module
from bottleneck.heads import parts
from bottleneck.heads.head import FUSED, build_head
from bottleneck.heads.key import HeadKey
from bottleneck.losses import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, D, N = 300, 12, 70
SMALL = {
    "block": (("bands", (20, 145)), ("shrink", 2)),
    "low_rank_sparse": (("rows", 9),),
    "mos": (("components", 3),),
    "plif": (("limit", 1.5), ("pieces", 7)),  # logits lie beyond both ends
}
FUSIBLE = [kind.name for kind in HEAD_KINDS if FUSED in (kind.impls or ())]


def randomised(kind: str, rank: int = 5, options: tuple | None = None):
    """A float32 head with random parameters, and gradients of zero."""
    head = build_head(HeadKey(rank, 1e-2, 0, kind, SMALL.get(kind, ()) if options is None else options), V, D)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 2)
        if kind == "low_rank_sparse":
            head.tokens_F.copy_(torch.randperm(V, generator=g)[:9])
        if kind == "block":
            head.place_V.copy_(torch.randperm(V, generator=g))
    head = head.to(DEVICE)
    for p in head.parameters():
        p.grad = torch.zeros_like(p)
    return head


def problem():
    g = torch.Generator().manual_seed(0)
    h, y = torch.randn(N, D, generator=g), torch.randint(0, V, (N,), generator=g).int()
    y[::5] = -1
    return h.to(DEVICE), y.to(DEVICE)


def exact(head, h, y):
    """Losses [N] and gradients of their sum, from `logits` in float64."""
    original = {name: p.detach().double().requires_grad_() for name, p in head.named_parameters()}
    logits = torch.func.functional_call(_Logits(head), {f"head.{n}": p for n, p in original.items()}, (h.double(),))
    loss = torch.nn.functional.cross_entropy(logits, y.long().clamp(min=0), reduction="none") * (y >= 0)
    return loss.detach(), torch.autograd.grad(loss.sum(), list(original.values()))


class _Logits(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, h):
        return self.head.logits(h)


@pytest.mark.parametrize("held_rank", [256, 4])
@pytest.mark.parametrize("kind", FUSIBLE)
def test_losses_and_gradients_are_those_of_the_logits(kind, held_rank, monkeypatch):
    """Also where a part's logits are held because its rank is above that of the kernels, and in chunks of 32 tokens."""
    monkeypatch.setattr(parts, "HELD_RANK", held_rank)
    monkeypatch.setattr(head_module, "MOST_TOKENS", 32)
    head, (h, y) = randomised(kind), problem()
    losses = head.step(h, y, FUSED, 0.5)
    want, gradients = exact(head, h, y)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=3e-5)
    for p, g in zip(head.parameters(), gradients):
        torch.testing.assert_close(p.grad.double() / 0.5, g, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.token_losses(h, y, FUSED), losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FUSIBLE)
def test_a_rerun_has_the_same_bits(kind):
    """No sum depends on the order in which programs end."""
    found = []
    for _ in range(2):
        head, (h, y) = randomised(kind), problem()
        found.append([head.step(h, y, FUSED, 1.0), *(p.grad for p in head.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("pieces", [1, 2, 70])
def test_slopes_of_any_number_of_pieces(pieces):
    """One piece, which has no ends, and more than a program adds; slopes differ, and every one has a gradient."""
    head, (h, y) = randomised("plif", options=(("limit", 1.5), ("pieces", pieces))), problem()
    losses = head.step(h, y, FUSED, 1.0)
    want, gradients = exact(head, h, y)
    s = h @ head.B.T @ head.A.T
    assert (s < -1.5).any() and (s > 1.5).any() and head.slopes.grad.abs().min() > 0
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=3e-5)
    for p, g in zip(head.parameters(), gradients):
        torch.testing.assert_close(p.grad.double(), g, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sigsoftmax", "plif"])
def test_certain_rows_have_gradients_of_their_errors_size(kind):
    """p_y = 1 − ε with ε near 1e-6: gradients are right to parts of ε, where p_y − 1 in float32 is off by a tenth."""
    head, (h, _) = randomised(kind), problem()
    with torch.no_grad():
        for _ in range(2):  # the target is the largest logit, 14 nats above the next in the median row
            top = head.logits(h).topk(2).values
            head.B.mul_(14 / (top[:, 0] - top[:, 1]).median())
    y = head.logits(h).argmax(1).int()
    top = head.logits(h).topk(2).values
    certain = (top[:, 0] - top[:, 1]).argsort()[N // 2 - 5 : N // 2 + 5]
    h, y = h[certain], y[certain]
    head.step(h, y, FUSED, 1.0)
    _, gradients = exact(head, h, y)
    assert 0 < gradients[1].abs().max() < 1e-2
    for p, g in zip(head.parameters(), gradients):
        torch.testing.assert_close(p.grad.double(), g, rtol=2e-3, atol=2e-3 * float(g.abs().max()))


@pytest.mark.parametrize("kind", ["sigsoftmax", "plif"])
def test_functions_of_logits_of_any_size(kind):
    """Logits s of −60 to 60 nats, three times as far as default pieces reach and with σ(s) down to exp(−60)."""
    head, (h, y) = randomised(kind), problem()
    with torch.no_grad():
        head.B.mul_(12)
    losses = head.step(h, y, FUSED, 1.0)
    want, gradients = exact(head, h, y)
    s = h @ head.B.T @ head.A.T
    assert s.min() < -60 and s.max() > 60
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-4)
    for p, g in zip(head.parameters(), gradients):
        torch.testing.assert_close(p.grad.double(), g, rtol=1e-3, atol=1e-3)


def test_a_bias_is_not_rounded_to_16_bits():
    """Biases of tens of nats, whose bfloat16 would be off by a tenth."""
    head, (h, y) = randomised("low_rank_bias"), problem()
    with torch.no_grad():
        head.bias.mul_(40)
    low = head.step(h.bfloat16(), y, FUSED, 1.0)
    generic = head.step(h.bfloat16(), y, None, 1.0)
    torch.testing.assert_close(low, generic, rtol=1e-3, atol=2e-2)


def test_auto_takes_kernels_for_16_bit_states_alone():
    """As the log names it; kinds without kernels are trained by autograd everywhere."""
    head = randomised("gated")
    assert head.impl(torch.bfloat16, N, "auto") == head.impl(torch.float32, N, "fused") == FUSED
    assert head.impl(torch.float32, N, "auto") == head.impl(torch.bfloat16, N, "chunked") != FUSED
    assert build_head(HeadKey(3, 1e-2, 0, "low_rank_truncated"), V, D).impl(torch.bfloat16, N, "auto") != FUSED


def test_parts_use_the_kernels_up_to_the_rank_that_these_support():
    """`heads.parts` has the number twice, since Triton cannot be imported everywhere."""
    assert parts.HELD_RANK == fused.FLASH_RANK and fused.most_tokens(fused.FLASH_RANK) == head_module.MOST_TOKENS

"""The acceptance objective: its gradient by formula and by finite differences, its limits, and its memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bottleneck.heads.head as head_module
import bottleneck.losses.distill as distill_module
import bottleneck.losses.objective as objective_module
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import OBJECTIVES
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.key import HeadKey
from bottleneck.losses.linear import targets, weights
from bottleneck.losses.objective import BoundObjective, steps

LK = OBJECTIVES["lk"]


def two_distributions(n=40, V=30, apart=2.0):
    """Logits [n, V] of a draft and log-probabilities [n, V] of a target, float64."""
    g = torch.Generator().manual_seed(0)
    s = torch.randn(n, V, generator=g, dtype=torch.float64)
    return s, torch.log_softmax(s + apart * torch.randn(n, V, generator=g, dtype=torch.float64), -1)


def lk(logits, log_p, **options):
    return LK.loss(logits, torch.zeros(len(logits), dtype=torch.long), log_p, {**LK.options, **options})


def by_formula(s, log_p, form, eta):
    """Gradient at the logits from equation (4), every sum written out."""
    p, q = log_p.exp(), torch.softmax(s, -1)
    alpha = torch.minimum(p, q).sum(-1, keepdim=True)
    below = (q < p).double()
    slope = q * (below - (q * below).sum(-1, keepdim=True))
    if form == "log":
        return -slope / alpha
    share = torch.exp(-eta * alpha)
    return share * (q - p) - (1 - share) * slope


@pytest.mark.parametrize("form, eta", [("hybrid", 3.0), ("hybrid", 0.5), ("log", 3.0)])
def test_the_gradient_is_that_of_the_formula(form, eta):
    s, log_p = two_distributions()
    (found,) = torch.autograd.grad(lk(s.requires_grad_(), log_p, form=form, eta=eta).sum(), s)
    torch.testing.assert_close(found, by_formula(s.detach(), log_p, form, eta), rtol=1e-10, atol=1e-14)


def test_the_log_form_passes_finite_differences_and_is_the_log_of_what_would_be_accepted():
    s, log_p = two_distributions(5, 7)
    assert torch.autograd.gradcheck(lambda x: lk(x, log_p, form="log"), (s.requires_grad_(),))
    p, q = log_p.exp().tolist(), torch.softmax(s.detach(), -1).tolist()
    for loss, a, b in zip(lk(s.detach(), log_p, form="log").tolist(), p, q):
        # a token is drafted with probability q and kept with probability min(1, p / q)
        assert loss == pytest.approx(-torch.tensor(sum(y * min(1, x / y) for x, y in zip(a, b))).log().item(), abs=1e-6)


def test_the_hybrid_lies_between_distillation_and_total_variation():
    s, log_p = two_distributions()
    y = torch.zeros(len(s), dtype=torch.long)
    kl = OBJECTIVES["distill"].loss(s, y, log_p, {"temperature": 1.0})
    torch.testing.assert_close(lk(s, log_p, eta=0.0), kl)
    tv = 0.5 * (log_p.exp() - torch.softmax(s, -1)).abs().sum(-1)
    torch.testing.assert_close(lk(s, log_p, eta=1e4), tv)
    torch.testing.assert_close(lk(log_p, log_p), torch.zeros_like(kl), atol=1e-12, rtol=0)


def test_descent_on_lk_accepts_more_than_descent_on_kl_at_rank_one():
    """On a problem that a head of rank 1 cannot solve; full-batch descent, so that only the objective differs."""
    g = torch.Generator().manual_seed(3)
    h, W = torch.randn(400, 6, generator=g), 2 * torch.randn(20, 6, generator=g)
    log_p = torch.log_softmax(h @ W.T, -1)
    accepted = {}
    for name, loss in (("kl", {"eta": 0.0}), ("hybrid", {}), ("log", {"form": "log"})):
        A, B = (torch.nn.Parameter(t) for t in (W[:, :1].clone(), torch.eye(6)[:1].clone()))
        optimizer = torch.optim.Adam([A, B], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            lk(h @ B.T @ A.T, log_p, **loss).mean().backward()
            optimizer.step()
        accepted[name] = torch.minimum(log_p.exp(), torch.softmax(h @ B.T @ A.T, -1)).sum(-1).mean().item()
    assert accepted["log"] > 1.05 * accepted["kl"] and accepted["hybrid"] > accepted["kl"], accepted


@pytest.mark.parametrize("name", ["distill", "mixed", "lk"])
@pytest.mark.parametrize("kind", ["low_rank", "low_rank_bias"])
def test_each_chunk_is_taught_by_its_own_rows_of_a_teacher_of_another_width(name, kind, monkeypatch):
    """Chunks of a few tokens against autograd over all of them at once."""
    for module in (objective_module, distill_module, head_module):
        monkeypatch.setattr(module, "chunk_rows", lambda *a: 14)
    g = torch.Generator().manual_seed(2)
    N, D, wide, V = 50, 6, 9, 20
    h, t, U = (torch.randn(*shape, generator=g) for shape in ((N, D), (N, wide), (V, wide)))
    y = torch.randint(0, V, (N,), generator=g).masked_fill(torch.rand(N, generator=g) < 0.2, -100)
    key = HeadKey(3, 1e-2, 0, kind)
    bank = HeadBank([key], V, D, "chunked")
    for p in bank.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g))
    declared = OBJECTIVES[name]
    options = {**declared.options, **({"temperature": 1.3} if "temperature" in declared.options else {})}
    bank.objective = BoundObjective(declared, options, lambda x: x @ U.T)
    bank.zero_gradients()
    losses = bank.accumulate(h, y, bank.cast(h.dtype), 1.0, t)
    keep, T = y >= 0, options.get("temperature", 1.0)
    logits = h[keep] @ bank[key].B.T @ bank[key].A.T + getattr(bank[key], "bias", 0.0)
    want = declared.loss(logits, y[keep], torch.log_softmax(t[keep] @ U.T / T, -1), options).sum()
    assert losses.item() == pytest.approx(want.item(), rel=1e-5)
    for p, gradient in zip(bank.parameters(), torch.autograd.grad(want, list(bank.parameters()))):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """Notes the most entries of any tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.entries = max(self.entries, t.numel())
        return out


def test_no_more_than_a_chunk_of_logits_is_held(monkeypatch):
    N, D, V, rank, rows = 200, 6, 50, 3, 16
    monkeypatch.setattr(objective_module, "chunk_rows", lambda *a: 2 * rows)
    g = torch.Generator().manual_seed(1)
    h, W, A, B = (torch.randn(*shape, generator=g) for shape in ((N, D), (V, D), (V, rank), (rank, D)))
    y = targets(torch.randint(0, V, (N,), generator=g))
    gradients = [(torch.zeros_like(A), torch.zeros_like(B))]
    with Largest() as largest:
        steps(
            h, [weights(A, B, h.dtype, "chunked")], y, gradients, 1.0, BoundObjective(LK, LK.options, lambda x: x @ W.T)
        )
    assert largest.entries == rows * V
    assert gradients[0][0].abs().sum() > 0


def test_impossible_options_are_refused(run):
    for options, words in (
        ("{form:cubic}", "form=cubic: must be one of hybrid, log"),
        ("{eta:-1.0}", "eta=-1.0: must be at least 0"),
        ("{eta:x}", "eta=x: must be a finite number"),
    ):
        with pytest.raises(UserError, match=words):
            run("objective=lk", f"head.options={options}")

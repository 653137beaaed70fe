"""Heads, their starts, learning rates, clipping: theorems and brute force."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bottleneck.backbone.model import FullHead
from bottleneck.config.head_groups import HeadGroup
from bottleneck.config.schema import OptimConfig
from bottleneck.core.errors import UserError
from bottleneck.heads.bank import HeadBank, HeadKey
from bottleneck.heads.calibration import Calibration, calibrate
from bottleneck.heads.starting import make_start
from bottleneck.training.optim import bank_keys, build_optimizer, clip_per_head, power_rate, rates, schedule

V, D, N = 60, 12, 4000
FINE = torch.ones(2)  # losses of two healthy heads


@pytest.fixture(scope="module")
def setting():
    """Correlated hidden states and a head with some structure, in float64 where it matters."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=g) @ torch.randn(D, D, generator=g) + torch.randn(D, generator=g)
    W = torch.randn(V, D, generator=g) * 0.4 + 2.0
    head = FullHead(W)
    return h, head, calibrate(h.split(500), head)


def logits(h, A, B):
    return h.double() @ (A.double() @ B.double()).T


def test_calibration_is_the_plain_average(setting):
    h, head, c = setting
    p = torch.softmax(head.logits(h).double(), -1)
    assert torch.allclose(c.cov_DD, h.double().T @ h.double() / N, rtol=1e-5)
    assert torch.allclose(c.mean_V, p.mean(0), atol=1e-6)
    assert torch.allclose(c.fisher_V, (p * (1 - p)).mean(0), atol=1e-6)


def test_full_rank_closed_forms_are_the_original_head(setting):
    """At r = d nothing is cut: same distribution as the original head (fisher shifts all logits alike)."""
    h, head, c = setting
    want = torch.log_softmax(head.logits(h).double(), -1)
    for init in ("fisher", "svd"):
        A, B = make_start(init, head, c)(HeadKey(D, 0.1, 0))
        assert torch.allclose(torch.log_softmax(logits(h, A, B), -1), want, atol=1e-4), init


def test_fisher_is_the_optimum_of_its_objective(setting):
    """Eckart–Young–Mirsky: no head of the rank has a smaller ‖Q^½ (A B − W_c) Σ^½‖; its value is the SVD's tail."""
    _, head, c = setting
    W = head.W_VD.double()
    centred = W - c.mean_V @ W
    values, vectors = torch.linalg.eigh(c.cov_DD)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    q = c.fisher_V.sqrt()[:, None]

    def objective(M):
        return torch.linalg.matrix_norm(q * (M - centred) @ root).item()

    spectrum = torch.linalg.svdvals(q * centred @ root)
    start = make_start("fisher", head, c)
    g = torch.Generator().manual_seed(1)
    for r in (1, 3, 7):
        A, B = start(HeadKey(r, 0.1, 0))
        assert torch.linalg.matrix_rank(A @ B) == r
        best = objective(A @ B)
        assert math.isclose(best, spectrum[r:].square().sum().sqrt().item(), rel_tol=1e-4)
        for _ in range(20):
            noise = [
                1e-2 * t.norm() * torch.randn(t.shape, generator=g, dtype=torch.float64) / t.numel() ** 0.5
                for t in (A, B)
            ]
            assert objective((A + noise[0]) @ (B + noise[1])) > best


def test_fisher_loses_less_than_svd(setting):
    h, head, c = setting
    p = torch.softmax(head.logits(h).double(), -1)
    for r in (2, 4, 8):
        kl = {}
        for init in ("fisher", "svd"):
            log_q = torch.log_softmax(logits(h, *make_start(init, head, c)(HeadKey(r, 0.1, 0))), -1)
            kl[init] = (p * (p.log() - log_q)).sum(-1).mean().item()
        assert kl["fisher"] < kl["svd"]


def test_starts_have_the_variances_they_promise(setting):
    h, head, c = setting
    for init in ("fisher", "svd", "scaled"):
        A, B = make_start(init, head, c)(HeadKey(8, 0.1, 0))
        z = h.double() @ B.double().T
        assert 0.3 < z.square().mean() < 3, init
        if init != "scaled":  # second moments are exact for the closed forms
            assert torch.allclose(z.square().mean(0), torch.ones(8, dtype=torch.float64), rtol=1e-3)
    white = Calibration(torch.eye(256, dtype=torch.float64) * 4, torch.ones(1), torch.ones(1))
    wide = FullHead(torch.zeros(4000, 256))
    A, B = make_start("scaled", wide, white)(HeadKey(64, 0.1, 0))
    x = torch.randn(500, 256) * 2
    assert 0.9 < (x @ B.T @ A.T).std() < 1.1
    A, B = make_start("normal", wide, white)(HeadKey(64, 0.1, 0))
    assert abs(A.std() - 1) < 0.02 and abs(B.std() - 1) < 0.02
    assert math.isclose((x @ B.T @ A.T).std(), 2 * math.sqrt(64 * 256), rel_tol=0.1)  # √(r·d) for h of unit entries


def test_random_start_depends_on_rank_and_seed_alone(setting):
    _, head, c = setting
    start = make_start("scaled", head, c)
    assert torch.equal(start(HeadKey(4, 0.1, 3))[0], start(HeadKey(4, 0.7, 3))[0])
    assert not torch.equal(start(HeadKey(4, 0.1, 3))[0], start(HeadKey(4, 0.1, 4))[0])


def test_names_are_exact_and_duplicates_refused():
    assert HeadKey(64, 0.01, 0).name == "r64_lr1e-2_s0"
    assert HeadKey(8, 0.0123, 5).name == "r8_lr123e-4_s5"
    assert HeadKey(8, 10.0, 5).name == "r8_lr1e1_s5"
    with pytest.raises(UserError, match="duplicate head"):
        HeadBank([HeadKey(2, 0.1, 0), HeadKey(2, 0.1 + 1e-12, 0)], 5, 3)


def test_power_rule():
    """lr = lr_ref (n_ref / n)^γ: at n = n_ref it is lr_ref; its slope in log-log is −γ."""
    o = OptimConfig(lr_ref=1e-3, gamma=0.5)
    assert power_rate(o, "fisher", 256, 256, 8192) == 1e-3
    assert power_rate(o, "fisher", 64, 256, 8192) == 2e-3
    low = OptimConfig(lr_ref=1e-3, gamma=0.5, full_rank=0.05)  # at rank d only, and for closed forms only
    assert power_rate(low, "fisher", 256, 256, 8192) == 5e-5 and power_rate(low, "normal", 256, 256, 8192) == 1e-3
    assert power_rate(low, "fisher", 64, 256, 8192) == 2e-3
    assert (
        power_rate(OptimConfig(lr_ref=1e-3, gamma=0.5, n_ref=4 * 256 * (8192 + 256)), "fisher", 256, 256, 8192) == 2e-3
    )
    assert rates(OptimConfig(lr_rule="table", table={4: [0.3, 0.1]}), "fisher", 4, 8, 9) == [0.3, 0.1]
    assert rates(OptimConfig(lr=[0.1, 0.2]), "fisher", 4, 8, 9) == [0.1, 0.2]
    grid = rates(OptimConfig(lr_rule="grid", lr_ref=1e-3, gamma=0.5), "fisher", 64, 256, 8192)
    assert grid == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    keys = bank_keys(OptimConfig(lr=[0.1, 0.2]), "fisher", [HeadGroup("low_rank", [2, 4], {})], [0, 1, 2], 8, 9)
    assert len(set(keys)) == 2 * 2 * 3


def test_schedule():
    factor = schedule(OptimConfig(warmup=0.1, lr_final=0.1), 100)
    assert factor(0) == 0.1 and factor(9) == 1.0 and factor(10) == 1.0
    assert math.isclose(factor(55), 0.1 + 0.9 * 0.5) and math.isclose(factor(100), 0.1)
    assert schedule(OptimConfig(), 1)(0) == 1.0


PAIR = (HeadKey(2, 0.1, 0), HeadKey(3, 0.1, 0))


def bank_with_gradients(scale: float, keys=PAIR):
    bank = HeadBank(list(keys), 7, 5)
    g = torch.Generator().manual_seed(0)
    for key in bank.keys:
        for p in bank[key].parameters():
            p.data = torch.randn(p.shape, generator=g)
            p.grad = scale * torch.randn(p.shape, generator=g)
    return bank


def test_clipping_is_per_head():
    """Each head is clipped as PyTorch would clip it alone, whatever the others' norms are."""
    bank, alone = bank_with_gradients(10.0), bank_with_gradients(10.0)
    bank[bank.keys[1]].A.grad.mul_(1e6)
    norms, divisors = clip_per_head(bank, 1.0, FINE)
    first = alone[alone.keys[0]]
    before = [p.grad.clone() for p in first.parameters()]
    want = torch.nn.utils.clip_grad_norm_(first.parameters(), 1.0)
    assert torch.isclose(norms[0], want) and norms[1] > 1e5
    for p, g in zip(first.parameters(), before):
        assert torch.allclose(g / divisors[0], p.grad)
    assert clip_per_head(bank_with_gradients(1e-3), 1.0, FINE)[1].tolist() == [1.0, 1.0]
    assert clip_per_head(bank, None, FINE)[1].tolist() == [1.0, 1.0]


def test_optimizer_is_adamw_and_skips_diverged_heads():
    """Equal to PyTorch's AdamW; a head with a non-finite gradient keeps its bits, momentum included, for good."""
    bank, twin = bank_with_gradients(1.0), bank_with_gradients(1.0)
    o = OptimConfig(clip=0.5)
    ours = build_optimizer(bank, o)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.1, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    for _ in range(3):
        _, ours.divisors = clip_per_head(bank, o.clip, FINE)
        for key in twin.keys:
            torch.nn.utils.clip_grad_norm_(twin[key].parameters(), o.clip)
        ours.step(), theirs.step()
    for p, q in zip(bank.parameters(), twin.parameters()):
        assert torch.allclose(p, q, atol=1e-6)
    sick, well = bank[bank.keys[1]], bank[bank.keys[0]]
    frozen, moving = sick.B.clone(), well.B.clone()
    good = sick.A.grad.clone()
    sick.A.grad[0, 0] = float("nan")
    _, ours.divisors = clip_per_head(bank, 1.0, FINE)
    ours.step()
    sick.A.grad.copy_(good), sick.B.grad.zero_()
    _, ours.divisors = clip_per_head(bank, 1.0, FINE)
    ours.step()
    assert bank.diverged.tolist() == [0.0, 1.0]
    assert torch.equal(sick.B, frozen) and torch.isfinite(sick.A).all() and not torch.equal(well.B, moving)
    clip_per_head(twin, None, torch.tensor([1.0, float("inf")]))  # a loss alone is enough
    assert twin.diverged.tolist() == [0.0, 1.0]
    copy = build_optimizer(bank, o)
    copy.load_state_dict(ours.state_dict())
    copy.step()
    assert torch.equal(sick.B, frozen)


@pytest.mark.parametrize(
    "change", [{"gamma": 1e300}, {"gamma": -1e300}, {"full_rank": 1e-323}, {"lr_ref": 1e308, "gamma": 9.0}]
)
def test_a_rule_beyond_all_numbers_is_refused(change):
    """A large exponent was an OverflowError in a traceback; a rate of 0 or infinity trained on."""
    rank = 256 if "full_rank" in change else 8
    with pytest.raises(UserError, match="the power rule gives the rate (0|inf) at rank"):
        power_rate(dataclasses.replace(OptimConfig(), **change), "fisher", rank, 256, 8192)
    factors = dataclasses.replace(OptimConfig(), lr_rule="grid", grid_factors=[1.0, 1e308, 1e-323])
    with pytest.raises(UserError, match="optim.grid_factors="):
        rates(factors, "fisher", 8, 256, 8192)

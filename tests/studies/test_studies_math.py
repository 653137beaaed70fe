"""The mathematics of the studies: theorems and planted truths, no models."""

from __future__ import annotations

import math

import pytest
import torch

from bottleneck.backbone.model import FullHead
from bottleneck.core.errors import UserError
from bottleneck.heads.calibration import calibrate
from bottleneck.heads.starts.refined import divergence
from bottleneck.losses import linear_cross_entropy
from bottleneck.studies.anisotropy import reading
from bottleneck.studies.formulas.agreement import Agreement
from bottleneck.studies.formulas.cosines import Cosines, brute_force, without
from bottleneck.studies.formulas.expansion import expansion, slope, theory_tails, truncated
from bottleneck.studies.formulas.scaling import BETA, B, E, fit_law
from bottleneck.studies.formulas.singular import padding, singular_values, summary, tails, triangle
from bottleneck.studies.formulas.statistics import best_of_many, block_mean, scatter
from bottleneck.studies.measure.anisotropy import _layer
from bottleneck.studies.shared.text import spread
from bottleneck.studies.theory import holds


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(sigma: list[float], rows: int, seed: int = 0) -> torch.Tensor:
    """A matrix [rows, len(sigma)] with these singular values."""
    d = len(sigma)
    U = torch.linalg.qr(torch.randn(rows, d, generator=g(seed), dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d, d, generator=g(seed + 1), dtype=torch.float64)).Q
    return U @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ V


# ---------------------------------------------------------------- spectra
@pytest.mark.parametrize("rows", [7, 64, 10_000])
def test_planted_spectrum_is_recovered_from_pieces_of_any_size(rows):
    """Down to 1e-9 of the largest: from W'W the values below 1e-8 would be noise."""
    sigma = [100.0, 5.0, 5.0, 1.0, 1e-3, 1e-7]
    W = with_spectrum(sigma, 500)
    got = singular_values(triangle(W, rows))
    assert torch.allclose(got, torch.tensor(sigma, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    M = torch.randn(6, 6, generator=g(5), dtype=torch.float64)
    assert torch.allclose(singular_values(triangle(W, rows) @ M), torch.linalg.svdvals(W @ M), rtol=1e-9, atol=1e-9)


def test_summaries_of_known_spectra():
    flat, spike = summary(torch.full((8,), 3.0)), summary(torch.tensor([2.0] + [0.0] * 7))
    assert flat["entropy"] == pytest.approx(0, abs=1e-12) and spike["entropy"] == pytest.approx(math.log(8))
    for name in ("effective_rank", "stable_rank", "participation_ratio"):
        assert flat[name] == pytest.approx(8) and spike[name] == pytest.approx(1), name
    assert flat["condition"] == pytest.approx(1) and spike["condition"] is None and spike["top_share"] == 1
    three = summary(torch.tensor([3.0, 2.0, 1.0]))  # by hand: p = 1/2, 1/3, 1/6
    H = math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6
    assert three["entropy"] == pytest.approx(math.log(3) - H) and three["effective_rank"] == pytest.approx(math.exp(H))
    assert (
        three["stable_rank"] == pytest.approx(14 / 9)
        and three["participation_ratio"] == pytest.approx(14**2 / 98)
        and three["condition"] == pytest.approx(3)
    )
    assert summary(torch.zeros(4))["entropy"] is None


def test_tails_are_the_error_of_the_best_approximation():
    """Eckart-Young-Mirsky, and that no other matrix of that rank does better (here: a random one's best fit)."""
    W = torch.randn(60, 9, generator=g(1), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    t = tails(S)
    assert t[0] == pytest.approx(W.square().sum().item()) and t[9] == 0 and (t.diff() < 0).all()
    for r in (1, 4, 8):
        best = (U[:, :r] * S[:r]) @ Vh[:r]
        assert (W - best).square().sum().item() == pytest.approx(t[r].item())
        Q = torch.linalg.qr(torch.randn(9, r, generator=g(r), dtype=torch.float64)).Q
        assert (W - W @ Q @ Q.T).square().sum() > t[r]


def test_padding_rows_are_counted():
    W = torch.ones(10, 4)
    W[7:] = 0
    assert padding(W, 7) == {"rows": 3, "mean_norm": 0.0, "mean_norm_tokens": 2.0}
    assert padding(W, 10)["rows"] == 0 and padding(W, None)["rows"] is None


# ---------------------------------------------------------------- cosines
def cosines(h: torch.Tensor, pieces: int = 3, centre=None) -> Cosines:
    sums = Cosines.empty(h.shape[1], centre_D=centre)
    for part in h.chunk(pieces):
        sums.add(part)
    return sums


@pytest.mark.parametrize("shift", [0.0, 0.3, 5.0])
def test_mean_cosine_is_the_mean_over_all_pairs(shift):
    h = torch.randn(301, 17, generator=g(2)) * torch.rand(301, 1, generator=g(3)) + shift
    sums = cosines(h)
    assert sums.mean_cosine == pytest.approx(brute_force(h), abs=1e-6)
    assert cosines(h, centre=sums.mean_D).mean_cosine == pytest.approx(
        brute_force(h.double() - h.double().mean(0)), abs=1e-6
    )
    assert sums.mean_norm == pytest.approx(h.norm(dim=1).mean().item(), rel=1e-6)


def test_gaussians_are_isotropic_and_copies_are_not():
    n, d = 4000, 64
    h = torch.randn(n, d, generator=g(4))
    assert abs(cosines(h).mean_cosine) < 5 * math.sqrt(2 / d) / n and cosines(
        h[:1].repeat(9, 1)
    ).mean_cosine == pytest.approx(1)
    pair = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert cosines(pair, 1).mean_cosine == pytest.approx(-1)
    assert math.isnan(cosines(h[:1], 1).mean_cosine)


def planted_states(outliers: int, cone: float, rows: int = 2000, width: int = 100) -> torch.Tensor:
    """Gaussian vectors with a common mean in all dimensions (a cone) and a large mean in the first ones (outliers)."""
    h = torch.randn(rows, width, generator=g(5)) + cone
    h[:, :outliers] += 10.0 / max(1, outliers) ** 0.5
    return h


def layer_of(h: torch.Tensor) -> dict:
    """The numbers of a layer as the study computes them from its hidden states."""
    raw = cosines(h)
    centred, fewer = Cosines.empty(h.shape[1], centre_D=raw.mean_D), {k: without(raw, k) for k in (1, 5, 20)}
    for sums in (centred, *fewer.values()):
        sums.add(h)
    return _layer(0, raw, centred, fewer)


def test_outlier_dimensions_are_told_from_a_cone():
    """Both can have the same mean cosine, and a pure cone also has a centred cosine near 0."""
    outlier, cone, both = planted_states(1, 0.0), planted_states(0, 1.0), planted_states(1, 1.0)
    for h in (outlier, cone):
        layer = layer_of(h)
        assert 0.45 < layer["mean_cosine"] < 0.55 and abs(layer["mean_cosine_centred"]) < 0.01
        assert layer["cone"] == pytest.approx(0.5**0.5, abs=0.01), "norm of the mean 10, RMS norm √200"
    for h in (outlier, cone, both, planted_states(3, 0.0)):
        for x in layer_of(h)["without_strongest"]:
            strongest = h.square().sum(0).topk(x["k"]).indices
            rest = h.clone()
            rest[:, strongest] = 0
            assert x["mean_cosine"] == pytest.approx(brute_force(rest), abs=1e-6)
            assert x["cone"] == pytest.approx((rest.mean(0).norm() / rest.norm(dim=1).square().mean().sqrt()).item())
    assert reading(layer_of(outlier)).endswith("outlier dimensions, no cone")
    assert reading(layer_of(planted_states(3, 0.0))).endswith("outlier dimensions, no cone")
    many = planted_states(12, 0.0, width=400)  # more outlier dimensions than the five that are looked at first
    many[:, :12] += 12
    assert layer_of(many)["mean_cosine"] > 0.5
    assert reading(layer_of(many)).endswith("outlier dimensions, no cone")
    assert reading(layer_of(cone)).endswith("a cone, no outlier dimensions")
    said = reading(layer_of(both))
    assert said.endswith("outlier dimensions and a cone") and "0.50 without dimension 0" in said
    assert reading(layer_of(planted_states(0, 0.0))) == "almost isotropic"


def test_vectors_of_length_zero_count_in_no_pair():
    h = torch.randn(50, 8, generator=g(6))
    assert cosines(torch.cat([h, torch.zeros(5, 8)])).mean_cosine == pytest.approx(brute_force(h), abs=1e-9)


# ---------------------------------------------------------------- statistics
def test_error_of_a_block_mean_is_that_of_resampled_blocks():
    """Tokens of a block share its level, so the error is far above that of independent tokens; here it is known."""
    x = torch.randn(400, 1, generator=g(7)) + 3 + 0.5 * torch.randn(400, 50, generator=g(8))
    mean, error = block_mean(x.sum(1).tolist(), [50] * 400)
    assert mean == pytest.approx(x.mean().item(), rel=1e-6) and error == pytest.approx(
        (1 + 0.25 / 50) ** 0.5 / 20, rel=0.15
    )
    assert error > 1.5 * x.std().item() / math.sqrt(x.numel())
    assert block_mean([2.0, 4.0], [1, 1]) == (3.0, pytest.approx(1.0))  # two blocks: deviation √2, over √2
    one, unknown = block_mean([6.0], [3])
    assert one == 2 and math.isnan(unknown)


def test_scatter_sees_noise_and_no_trend():
    t = torch.arange(400.0)
    noise = 0.01 * torch.randn(400, generator=g(9))
    assert scatter((3 + 5 / (t + 10)).tolist()) < 1e-4
    assert scatter((3 - 0.001 * t + noise).tolist()) == pytest.approx(0.01, rel=0.25) and scatter([3.0, 2.0, 1.0]) == 0


def test_the_best_of_many_must_lead_by_more():
    assert best_of_many(0, 1) == pytest.approx(0.5) and best_of_many(1.645, 1) == pytest.approx(0.05, abs=1e-3)
    assert best_of_many(1.645, 30) > 0.7 and best_of_many(6, 30) < 1e-6 and best_of_many(math.inf, 30) == 0
    # simulated: the largest of 20 standard normals is above 2.5 so often
    draws = torch.randn(20_000, 20, generator=g(10)).amax(1)
    assert best_of_many(2.5, 20) == pytest.approx((draws > 2.5).float().mean().item(), abs=0.01)


def test_blocks_are_spread_evenly():
    assert spread(10, 20) == list(range(10)) and spread(100, 1) == [50]
    picked = spread(1000, 7)
    assert len(picked) == 7 and max(b - a for a, b in zip(picked, picked[1:])) <= 144 and picked[0] >= 70


# ---------------------------------------------------------------- scaling law
def planted(A: float, alpha: float, noise: float = 0.0):
    rng = g(11)
    points = [(n, t) for n in (4.05e8, 1.01e9, 2.8e9, 6.9e9) for t in torch.linspace(1e10, 3e11, 40).tolist()]
    losses = [
        (A / n**alpha + B / t**BETA + E) * math.exp(noise * torch.randn((), generator=rng).item()) for n, t in points
    ]
    return [n for n, _ in points], [t for _, t in points], losses


@pytest.mark.parametrize("A, alpha", [(119.09, 0.246), (406.4, 0.336), (20.0, 0.15)])
def test_the_law_recovers_what_was_planted(A, alpha):
    law = fit_law(*planted(A, alpha))
    assert pytest.approx(A, rel=1e-4) == law.A and law.alpha == pytest.approx(alpha, rel=1e-5)
    assert law(1e9, 1e11) == pytest.approx(A / 1e9**alpha + B / 1e11**BETA + E)


def test_the_law_withstands_noise_and_outliers():
    """Huber's loss: outliers of 20 % in a tenth of the points hardly move the fit."""
    n, t, losses = planted(119.09, 0.246, noise=3e-4)
    losses = [x * (1.2 if i % 10 == 0 else 1.0) for i, x in enumerate(losses)]
    assert fit_law(n, t, losses).alpha == pytest.approx(0.246, rel=0.02)


def test_the_law_needs_two_sizes():
    with pytest.raises(UserError, match="two sizes"):
        fit_law([1e9, 1e9], [1e10, 2e10], [3.0, 2.9])


# ---------------------------------------------------------------- agreement and theory
def synthetic(V: int = 300, d: int = 16, n: int = 2000, scale: float = 0.5):
    """A head with a falling spectrum and Gaussian hidden states of a known, uneven covariance."""
    W = with_spectrum([scale * V**0.5 / (i + 1) for i in range(d)], V).float() + 0.7  # a mean row that changes nothing
    h = torch.randn(n, d, generator=g(12)) @ torch.diag(torch.linspace(2, 0.5, d))
    return h, FullHead(W)


def test_agreement_is_what_the_definitions_say():
    h, head = synthetic(n=700)
    y = torch.randint(0, 300, (700,), generator=g(13))
    A, B_ = torch.randn(300, 5, generator=g(14)), torch.randn(5, 16, generator=g(15)) / 4
    result = Agreement([(A, B_), (head.W_VD, torch.eye(16))])
    result.add(h[:300], y[:300], head)
    result.add(h[300:], y[300:], head)
    p, q = torch.softmax(head.logits(h).double(), -1), torch.softmax((h @ B_.T @ A.T).double(), -1)
    low, full = result.means
    assert low["loss"] == pytest.approx(linear_cross_entropy(h, A, B_, y, impl="reference").mean().item(), rel=1e-5)
    assert low["kl"] == pytest.approx((p * (p.log() - q.log())).sum(-1).mean().item(), rel=1e-4)
    assert low["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert low["acceptance"] == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), rel=1e-5)
    assert (
        full["kl"] == pytest.approx(0, abs=1e-7)
        and full["top1_agreement"] == 1
        and full["acceptance"] == pytest.approx(1, abs=1e-5)
    )
    assert result.full_loss == pytest.approx(full["loss"], rel=1e-5) and result.tokens == 700


@pytest.mark.parametrize("scale", [0.02, 0.5, 3.0])
def test_the_bound_holds_and_the_tails_are_the_logit_errors(scale):
    """Every part of the chain on a synthetic head: tail = mean |δ|², KL ≤ tail / 4 ≤ λ tail(W) / 4, at every rank."""
    h, head = synthetic(scale=scale)
    c = calibrate([h], head)
    t = theory_tails(head.W_VD, c)
    ranks = list(range(1, 17))
    heads = truncated(head.W_VD, c, ranks)
    W = head.W_VD.double() - head.W_VD.double().mean(0)
    for r, (A, B_) in zip(ranks, heads):
        assert A.shape == (300, r) and B_.shape == (r, 16)
        error = ((A.double() @ B_.double() - W) @ h.double().T).square().sum(0).mean().item()
        assert error == pytest.approx(t.weighted[r].item(), rel=1e-3, abs=1e-4 * t.weighted[0].item())
    for r, kl in zip(ranks, divergence(heads, h, head)):
        assert kl <= t.bound[r].item() + 1e-5 <= t.bound_head[r].item() + 2e-5, r
    assert t.bound[0] > 0.1 * divergence([(torch.zeros(300, 1), torch.zeros(1, 16))], h, head)[0]


def test_the_bound_is_reached_by_two_even_tokens():
    """V = 2 and p near (½, ½): the Hessian's eigenvalue is ½, and KL = ¼ |δ|² up to higher orders. So ¼ cannot be
    smaller.
    """
    h = torch.randn(2000, 4, generator=g(16))
    head = FullHead(0.02 * torch.randn(2, 4, generator=g(17)))
    t = theory_tails(head.W_VD, calibrate([h], head))
    (kl,) = divergence([(torch.zeros(2, 1), torch.zeros(1, 4))], h, head)
    assert kl == pytest.approx(t.bound[0].item(), rel=0.02) and t.bound[1] < 1e-6 * t.bound[0]


def test_a_broken_bound_is_reported():
    row = {"kl_truncated": 1.0, "bound": 2.0, "bound_head": 3.0}
    assert holds([row]) and not holds([row, {**row, "kl_truncated": 2.1}]) and not holds([{**row, "bound_head": 1.9}])


def test_the_surrogate_is_exact_for_small_logits():
    """Nearly uniform softmax: the Fisher matrix is nearly its diagonal, and the surrogate nearly the KL."""
    h, head = synthetic(scale=0.02)
    c = calibrate([h], head)
    t = theory_tails(head.W_VD, c)
    for r, kl in zip((1, 3, 8), divergence(truncated(head.W_VD, c, [1, 3, 8]), h, head)):
        assert kl == pytest.approx(t.surrogate[r].item(), rel=0.03)


def test_the_second_order_term_is_the_quadratic_form_of_each_context():
    """½ δᵀ (diag p − p pᵀ) δ with V × V matrices in float64; the KL itself for small δ, whatever p; the entropy."""
    h, head = synthetic(n=60, scale=3.0)
    A, B_ = torch.randn(300, 4, generator=g(20)) / 4, torch.randn(4, 16, generator=g(21)) / 4
    near = (head.W_VD + 1e-3 * torch.randn(300, 16, generator=g(22)), torch.eye(16))
    found = expansion([(A, B_), near], h, head)
    p = torch.softmax(head.logits(h).double(), -1)
    F = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    for (a, b), second in zip(((A, B_), near), found.second_order):
        delta = h.double() @ (a.double() @ b.double() - head.W_VD.double()).T
        assert second == pytest.approx((0.5 * torch.einsum("nv,nvw,nw->n", delta, F, delta)).mean().item(), rel=1e-3)
    assert found.kl == pytest.approx(divergence([(A, B_), near], h, head), rel=1e-6, abs=1e-7)
    assert found.second_order[1] == pytest.approx(found.kl[1], rel=0.05), "small errors: the expansion is the KL"
    assert found.entropy == pytest.approx(-torch.special.xlogy(p, p).sum(-1).mean().item(), rel=1e-5)


def test_the_trivial_bound_is_that_of_the_uniform_distribution():
    h, head = synthetic(scale=3.0)
    found = expansion([(torch.zeros(300, 1), torch.zeros(1, 16))], h, head)
    assert found.kl[0] == pytest.approx(math.log(300) - found.entropy, rel=1e-5)


def test_slopes_of_powers():
    x = [1.0, 2.0, 4.0, 8.0]
    assert slope(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5) and slope(x, [0.0, 0.0, 1.0, 2.0]) is None

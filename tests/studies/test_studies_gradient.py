"""The share of the logit gradient that reaches the hidden state: explicit projections, chance, real weights."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from bottleneck.studies.formulas.reach import Reach, column_space, shares
from support.study_runs import QUICK, run_study


def test_share_equals_the_explicit_projection():
    """P_W = W (WᵀW)⁺ Wᵀ as a V x V matrix; also for a W that lacks rank."""
    g = torch.Generator().manual_seed(0)
    full = torch.randn(60, 8, generator=g)
    for W in (full, full[:, :1] @ torch.randn(1, 8, generator=g) + full[:, 1:3] @ torch.randn(2, 8, generator=g)):
        P = W.double() @ torch.linalg.pinv(W.double().T @ W.double(), rtol=1e-9) @ W.double().T
        assert torch.allclose(P @ P, P, atol=1e-8)
        G = torch.softmax(3 * torch.randn(40, 60, generator=g), -1)
        G[torch.arange(40), torch.arange(40)] -= 1
        G[7] = 0
        Q, C = column_space(W)
        assert Q.shape[1] == torch.linalg.matrix_rank(W) and torch.allclose(Q.double() @ C, W.double(), atol=1e-5)
        share, inside = shares(G, Q)
        want = (G.double() @ P).norm(dim=-1) / G.double().norm(dim=-1)
        assert torch.allclose(share, want.nan_to_num(0), atol=1e-6) and share[7] == 0
        assert torch.allclose(inside @ C, G.double() @ W.double(), atol=1e-5)


@pytest.mark.parametrize("decades", [5.5, 6.5])
def test_weak_directions_of_the_head_count_like_strong_ones(decades):
    """A projection ignores singular values; rounding does not change the rank of a float32 product A B."""
    g = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(n, 12, generator=g, dtype=torch.float64)).Q for n in (300, 12))
    W = (U * torch.logspace(0, -decades, 12, dtype=torch.float64)) @ V.T
    G = torch.softmax(torch.randn(40, 300, generator=g), -1) - torch.nn.functional.one_hot(torch.arange(40), 300)
    share, _ = shares(G, column_space(W)[0])
    assert torch.allclose(share, (G.double() @ U).norm(dim=-1) / G.double().norm(dim=-1), atol=1e-6)
    for r in (2, 16, 48):
        assert column_space(torch.randn(3000, r, generator=g) @ torch.randn(r, 96, generator=g))[0].shape[1] == r


def test_gradients_do_not_depend_on_the_factorisation():
    """W, A B with B far from orthonormal, and W as A with B = 1: the same gradients at the hidden state, so the same
    ranks.
    """
    g = torch.Generator().manual_seed(4)
    W, p = torch.randn(90, 12, generator=g), torch.softmax(torch.randn(64, 90, generator=g), -1)
    turn = torch.randn(12, 12, generator=g) * torch.logspace(0, 2, 12)
    y, band = torch.randint(0, 90, (64,), generator=g), torch.arange(64) % 3
    explicit = torch.linalg.svdvals(((p - torch.nn.functional.one_hot(y, 90)) @ W).double())
    share = explicit / explicit.sum()
    for reach in (Reach(W, 3), Reach(W @ torch.linalg.inv(turn), 3, turn), Reach(W, 3, torch.eye(12))):
        reach.add(p.clone(), y, band)
        found = reach.result
        assert math.isclose(found["update_effective_rank"], math.exp(-(share * share.log()).sum().item()), rel_tol=1e-4)
        assert math.isclose(
            found["update_stable_rank"], (explicit.square().sum() / explicit[0] ** 2).item(), rel_tol=1e-4
        )


def test_a_head_of_zeros_passes_on_nothing():
    reach = Reach(torch.zeros(20, 4), 1)
    reach.add(torch.full((3, 20), 0.05), torch.arange(3), torch.zeros(3, dtype=torch.long))
    assert reach.result["share"] == 0 and reach.result["rank"] == 0 and reach.result["update_effective_rank"] is None


def test_a_random_head_passes_on_the_share_of_chance():
    """The mean squared share is d / V; a gradient in the column space passes whole."""
    g = torch.Generator().manual_seed(1)
    V, d = 2000, 50
    W = torch.randn(V, d, generator=g)
    Q, _ = column_space(W)
    share, _ = shares(torch.randn(500, V, generator=g), Q)
    assert math.isclose(share.square().mean().sqrt().item(), math.sqrt(d / V), rel_tol=0.02)
    inside, _ = shares(torch.randn(5, d, generator=g) @ W.T, Q)
    assert torch.allclose(inside, torch.ones(5, dtype=torch.float64), atol=1e-6)


def test_sums_do_not_depend_on_chunks():
    g = torch.Generator().manual_seed(2)
    W, p = torch.randn(90, 6, generator=g), torch.softmax(torch.randn(64, 90, generator=g), -1)
    y, band = torch.randint(0, 90, (64,), generator=g), torch.arange(64) % 3
    one, many = Reach(W, 3), Reach(W, 3)
    one.add(p.clone(), y, band)
    for part in torch.arange(64).split(10):
        many.add(p[part], y[part], band[part])
    a, b = one.result, many.result
    assert (
        math.isclose(a["share"], b["share"])
        and a["histogram"] == b["histogram"]
        and sum(a["histogram"]) == 64
        and a["rank"] == 6
    )
    assert math.isclose(a["share"] + a["lost"], 1) and [x["tokens"] for x in a["bands"]] == [22, 21, 21]
    assert math.isclose(sum(x["share"] * x["tokens"] for x in a["bands"]) / 64, a["share"])
    assert 1 <= a["update_effective_rank"] <= 6


def test_gradient_study_on_the_toy(toy_backbone, toy_text, tmp_path):
    """The share grows with rank to the full head's, which is that of r = d; the files are there; a second run keeps
    the part.
    """
    words = [
        *QUICK,
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "backbone=local",
        f"backbone.path={toy_backbone}",
        "study=gradient",
        "study.ranks=[2,8,32]",
        "study.init=svd",
        "study.calibration_tokens=512",
    ]
    content = run_study(tmp_path, *words)
    found = [h["share"] for h in content["heads"]]
    assert found == sorted(found) and abs(found[-1] - content["full"]["share"]) < 1e-4
    assert sum(content["full"]["histogram"]) == content["tokens"] == 1500
    with open(tmp_path / "gradient.csv", newline="") as f:
        rows = {r["head"]: float(r["share"]) for r in csv.DictReader(f)}
    assert rows["full"] == content["full"]["share"] and set(rows) == {"full", "2", "8", "32"}
    with open(tmp_path / content["by_token"], newline="") as f:
        tokens = list(csv.DictReader(f))
    assert len(tokens) == content["tokens"] and tokens[0].keys() == {
        "target",
        "share_full",
        "share_2",
        "share_8",
        "share_32",
    }
    assert sum(float(t["share_8"]) for t in tokens) / len(tokens) == pytest.approx(
        content["heads"][1]["share"], abs=1e-6
    )
    assert run_study(tmp_path, *words) == content


@pytest.mark.slow
def test_smollm2_loses_most_of_the_gradient(tmp_path):
    """Real weights: the order of magnitude that the paper reports for pretrained models."""
    content = run_study(
        tmp_path,
        "study=gradient",
        "backbone=smollm2_135m_gguf",
        "data=sample",
        "trainer=cpu",
        "tokens=512",
        "data.block_size=256",
        "study.ranks=[16,256]",
        "study.calibration_tokens=2048",
        "trainer.micro_batch_size=2",
        f"data.cache_dir={tmp_path / 'cache'}",
    )
    low, high = content["heads"]
    assert low["share"] < high["share"] < content["full"]["share"] < 0.5
    assert content["full"]["lost"] > 0.5

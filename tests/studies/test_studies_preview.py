"""Positions of the original head's arg-max in low-rank previews: brute force, exact ranks, and the study itself."""

from __future__ import annotations

import csv

import pytest
import torch

from bottleneck.backbone.model import FullHead
from bottleneck.core.errors import UserError
from bottleneck.heads.calibration import calibrate
from bottleneck.heads.key import HeadKey
from bottleneck.heads.starting import make_start
from bottleneck.studies.formulas.previews import positions, summary, whitened
from bottleneck.studies.shared.config import check_study
from support.study_runs import QUICK, composed, run_study


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_positions_equal_a_sort():
    h = torch.randn(200, 16, generator=g(0))
    head = FullHead(torch.randn(90, 16, generator=g(1)), torch.randn(90, generator=g(2)))
    pairs = [(torch.randn(90, r, generator=g(r)), torch.randn(r, 16, generator=g(r + 9))) for r in (2, 5)]
    found = positions(pairs, h, head)
    best = (h @ head.W_VD.T + head.bias_V).argmax(-1)
    for (A, B), places in zip(pairs, found):
        order = (h @ B.T @ A.T + head.bias_V).argsort(-1, descending=True)
        assert torch.equal(places, (order == best[:, None]).int().argmax(-1) + 1)


def test_ties_count_against_the_preview():
    """In a preview of zeros every token ties with the arg-max, so the arg-max has the last position."""
    head = FullHead(torch.randn(30, 4, generator=g(3)))
    assert (positions([(torch.zeros(30, 1), torch.zeros(1, 4))], torch.randn(9, 4, generator=g(4)), head) == 30).all()


def test_a_preview_of_the_heads_own_rank_is_exact():
    """A head of rank 6 plus a mean row: every weighting has its arg-max first from rank 6 on, and not below."""
    h = torch.randn(500, 16, generator=g(5))
    W = torch.randn(90, 6, generator=g(6)) @ torch.randn(6, 16, generator=g(7)) + torch.randn(16, generator=g(8))
    W = W - W.mean(0)  # svd does not remove the mean row, which would be a further rank
    head = FullHead(W)
    moments = calibrate([h], head)
    keys = [HeadKey(r, 1.0, 0) for r in (3, 6, 16)]
    for name in ("whitened", "fisher", "svd"):
        if name == "whitened":
            heads = whitened(W, moments, [k.rank for k in keys])
        else:
            heads = [make_start(name, head, moments)(k) for k in keys]
        low, exact, full = positions(heads, h, head)
        assert (exact == 1).float().mean() > 0.99 and (full == 1).float().mean() > 0.99, name
        assert (low == 1).float().mean() < 0.9, name


def test_summary_of_known_positions():
    found = summary(torch.tensor([1, 1, 2, 5]), [1, 2, 4, 5], [0.5, 1.0])
    assert found == {"shares": [0.5, 0.75, 0.75, 1.0], "quantiles": [2.0, 5.0]}


def test_preview_study_on_the_toy(toy_backbone, toy_text, tmp_path):
    words = [
        *QUICK,
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "backbone=local",
        f"backbone.path={toy_backbone}",
        "study=preview",
        "study.ranks=[4,16,32]",
        "study.top=[1,8,64]",
        "study.calibration_tokens=512",
    ]
    content = run_study(tmp_path, *words)
    assert [(p["weighting"], p["rank"]) for p in content["previews"]][:4] == [
        ("whitened", 4),
        ("whitened", 16),
        ("whitened", 32),
        ("fisher", 4),
    ]
    for p in content["previews"]:
        assert p["shares"] == sorted(p["shares"]) and p["quantiles"] == sorted(p["quantiles"])
        assert p["rank"] < 32 or p["shares"][0] > 0.99
    rows = list(csv.DictReader(open(tmp_path / "preview.csv")))
    assert len(rows) == 9 and float(rows[0]["share_top_64"]) == content["previews"][0]["shares"][2]
    with pytest.raises(UserError, match="study.top=.*at most the vocabulary size, 320"):
        run_study(tmp_path / "large", *words, "study.top=[1000]")


def test_bad_keys_are_refused():
    for words, said in (
        ("study.top=[]", "study.top=[]: give at least one"),
        ("study.weightings=[scaled]", "study.weightings=scaled: must be one of whitened, fisher, svd"),
    ):
        with pytest.raises(UserError) as caught:
            check_study(composed("study=preview", words))
        assert said in str(caught.value)


@pytest.mark.slow
def test_whitening_alone_keeps_the_tail_of_smollm2(tmp_path):
    """Without Fisher row weights fewer arg-maxes are first at r = 256, and more are among the first 64."""
    words = ["backbone=smollm2_135m_gguf", "data=sample", "trainer=cpu", "trainer.micro_batch_size=2"]
    words += ["data.block_size=256", "tokens=2048", "study.ranks=[256]", "study.weightings=[whitened,fisher]"]
    a, b = run_study(tmp_path, "study=preview", *words, "study.calibration_tokens=4096")["previews"]
    assert a["shares"][0] < b["shares"][0] - 0.1 and a["shares"][2] > b["shares"][2] > 0.97

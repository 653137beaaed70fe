"""Output ranks: low-rank and mixed heads, planted power laws, removed bands; the study on a finished run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from bottleneck.backbone.model import FullHead
from bottleneck.core.errors import UserError
from bottleneck.studies.formulas.output_rank import (
    centred_rank,
    centred_spectrum,
    exponent,
    losses_without_bands,
    output_rank,
)
from bottleneck.studies.measure.escape import chosen_columns, extended, limited, one_head
from support.study_runs import run_study


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_linear_head_has_its_rank_and_a_mixture_of_two_exceeds_it():
    """log Σ_k π_k softmax(W_k h) is not linear in h (Yang et al. 2018)."""
    h = torch.randn(400, 32, generator=g(0))
    logits = [h @ (torch.randn(300, 5, generator=g(k)) @ torch.randn(5, 32, generator=g(k + 9)) / 6).T for k in (1, 2)]
    single = output_rank(centred_spectrum(torch.log_softmax(logits[0], -1)), 32)
    mixture = torch.logsumexp(torch.stack([torch.log_softmax(z, -1) for z in logits]), 0) - math.log(2)
    mixed = output_rank(centred_spectrum(mixture), 32)
    assert single["rank"] == 5 and single["tail_energy"] < 1e-9
    assert mixed["rank"] > 32 and mixed["tail_energy"] > 1e-4 and mixed["effective_rank"] > single["effective_rank"]


def test_a_rank_that_few_tokens_hide_is_said_to_be_a_least_one():
    """W has rank 2 but for twenty exact rows, of which the chosen tokens hold four; over all tokens it is 22."""
    W = torch.randn(300, 2, generator=g(0)) @ torch.randn(2, 32, generator=g(1))
    W[:20] = torch.randn(20, 32, generator=g(2))
    h, y, fixed = torch.randn(200, 32, generator=g(3)), torch.arange(200), torch.arange(16, 60)
    assert centred_rank(W) == 22 == output_rank(centred_spectrum(torch.log_softmax(h @ W.T, -1)), 32)["rank"]
    found = one_head(lambda x: x @ W.T, h, y, vocab=300, fixed=fixed)
    assert found["rank"] == 6 and found["limit"] == 43
    assert limited(found, W)["limit"] == 6 and limited(found, None) == found
    plain = one_head(lambda x: x @ W[20:].T, h, y, vocab=280, fixed=fixed)
    assert plain["rank"] == 2 and limited(plain, W[20:]) == plain


@pytest.mark.parametrize("alpha", [0.5, 1.3])
def test_planted_power_laws_are_recovered(alpha):
    sigma = torch.arange(1, 201, dtype=torch.float64) ** -alpha
    assert exponent(sigma) == pytest.approx(alpha, rel=1e-6) and exponent(sigma[:5]) is None
    assert output_rank(torch.zeros(9, dtype=torch.float64), 4)["exponent"] is None


def test_removing_bands_equals_removing_them_from_the_matrix():
    """W (1 − V Vᵀ) is W without these singular values; a band without energy changes nothing."""
    U, V = (torch.linalg.qr(torch.randn(n, 8, generator=g(n), dtype=torch.float64)).Q for n in (50, 9))
    V = torch.linalg.qr(torch.randn(8, 8, generator=g(3), dtype=torch.float64)).Q
    sigma = torch.tensor([8.0, 6, 4, 3, 2, 1, 0, 0], dtype=torch.float64)
    head = FullHead(((U * sigma) @ V.T).float())
    h, y = torch.randn(90, 8, generator=g(4)), torch.randint(0, 50, (90,), generator=g(5))
    found = losses_without_bands(h, y, head, 4)
    assert [(b["first"], b["last"]) for b in found] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    for b in found:
        less = sigma.clone()
        less[b["first"] - 1 : b["last"]] = 0
        logits = h.double() @ ((U * less) @ V.T).T
        assert b["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-4)


@pytest.mark.parametrize("bos", [None, 299])
def test_histories_begin_with_the_token_before_every_text(bos):
    """Gemma's hidden states without it are of no use. Futures are pieces of the text as they stand."""
    seen, head = [], FullHead(torch.randn(300, 8, generator=g(0)))

    class Fake:
        lm_head, vocab_size, hidden_size = torch.nn.Linear(8, 300, bias=False), 300, 8

        def __call__(self, ids):
            seen.append(ids)
            return torch.randn(*ids.shape, 8, generator=g(1))

    Fake.head = head
    inputs = torch.arange(256).reshape(4, 64)
    text = SimpleNamespace(batches=lambda size: [(inputs, inputs)], bos=bos)
    found = extended(Fake(), text, histories=3, futures=2, columns=4)
    assert found["histories"] == 3 and [i[0, 0].item() for i in seen] == ([0, 32, 64] if bos is None else [bos] * 3)
    assert all(i[:, 32:].tolist() == [[192, 193, 194, 195], [224, 225, 226, 227]] for i in seen)
    assert inputs[0, 0] == 0


def test_escape_study_on_a_finished_run(tmp_path, run, toy):
    curve = run("ranks=[2,8]", run_dir=tmp_path / "run").curve
    text = [o for o in toy if o.startswith(("backbone", "data"))]
    words = [*text, "study=escape", "tokens=500", "study.histories=12", "study.futures=4", "study.bands=4"]
    words += ["trainer=cpu", "trainer.micro_batch_size=4", "trainer.progress=false"]
    c = run_study(tmp_path / "e", *words, f"study.run={tmp_path / 'run'}")
    assert [(h["kind"], h["rank_of_head"], h["rank"]) for h in c["heads"]] == [("low_rank", 2, 2), ("low_rank", 8, 8)]
    assert c["reference"]["rank"] <= 32 and len(c["reference"]["without_bands"]) == 4
    assert c["reference"]["extended"]["histories"] == 10 and len(curve["heads"]) == 2
    with pytest.raises(UserError, match="the rank needs more contexts than the hidden size"):
        run_study(tmp_path / "few", *words, "tokens=20", f"study.run={tmp_path / 'run'}")
    with pytest.raises(UserError, match="none"):
        run_study(tmp_path / "none", *words, f"study.run={tmp_path / 'none'}")


def test_the_rank_of_kinds_with_full_rows_is_seen():
    """Regression: evenly spaced columns of a large vocabulary met few of the frequent tokens, and so half of the rank.

    A head of rank 3 with full rows for 40 likely tokens has rank 43 in d = 60.
    """
    V, d, rows, r = 5_000, 60, 40, 3
    h = torch.randn(300, d, generator=g(0))
    W = torch.randn(V, r, generator=g(1)) @ torch.randn(r, d, generator=g(2)) / d**0.5
    frequent = torch.randperm(V, generator=g(3))[:rows]
    W[frequent] = torch.randn(rows, d, generator=g(4)) / d**0.5
    bias = torch.zeros(V).index_fill(0, frequent, 6.0)
    y = torch.randint(0, V, (300,), generator=g(5))

    def logits(x):
        return x @ W.T + bias

    fixed = chosen_columns(logits, h, vocab=V, columns=200)
    assert len(fixed) == 200 == len(set(fixed.tolist())) and set(frequent.tolist()) <= set(fixed.tolist())
    found = one_head(logits, h, y, vocab=V, fixed=fixed)
    assert found["rank"] == rows + r and found["limit"] == 199
    every = chosen_columns(logits, h, vocab=V, columns=10**6)
    assert every.tolist() == list(range(V))


def test_sizes_that_cannot_show_the_rank_are_refused(tmp_path, run, toy):
    run("ranks=[2]", run_dir=tmp_path / "run")
    text = [o for o in toy if o.startswith(("backbone", "data"))]
    words = [*text, "study=escape", "tokens=500", "trainer=cpu", f"study.run={tmp_path / 'run'}"]
    for word, said in (
        ("study.columns=8", "study.columns=8: the rank needs"),
        ("study.bands=400", "study.bands=400: mu"),
    ):
        with pytest.raises(UserError, match=said):
            run_study(tmp_path / "e", *words, word)

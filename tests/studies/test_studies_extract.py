"""Ranks recovered from log-probabilities: planted heads, top-k blocks, noise, and exported heads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from bottleneck.studies.extract import verdict
from bottleneck.studies.formulas.extraction import common_block, recovered_rank
from support.study_runs import QUICK, edit_head, run_study, toy_series


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(rank: int, width: int, tokens: int, contexts: int, bias: float = 0.0) -> torch.Tensor:
    """float32 log-probabilities [contexts, tokens] of a random head of a rank with a decaying spectrum, and a bias."""
    A = torch.randn(tokens, rank, generator=g(rank)) * torch.logspace(0, -2, rank)
    W = A @ torch.randn(rank, width, generator=g(rank + 1)) / width**0.5
    h = torch.randn(contexts, width, generator=g(rank + 2)) + 0.5
    return torch.log_softmax(h @ W.T + bias * torch.randn(tokens, generator=g(3)), -1)


@pytest.mark.parametrize("rank", [1, 8, 64, 512])
@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_planted_ranks_are_recovered_exactly(rank, bias):
    found = recovered_rank(planted(rank, width=600, tokens=700, contexts=720, bias=bias))
    assert found.rank == rank and found.gap > 30 and found.limit == 698


def test_a_block_that_is_too_small_shows_no_rank():
    """20 contexts cannot show rank 64; nor can noise of the size of the weakest directions."""
    assert recovered_rank(planted(64, width=100, tokens=200, contexts=20)).rank is None
    noisy = planted(64, width=100, tokens=200, contexts=200)
    assert recovered_rank(noisy + 0.1 * torch.randn(noisy.shape, generator=g(9))).rank is None


def test_the_common_block_is_in_every_top_k():
    log_p = planted(8, width=32, tokens=120, contexts=300)
    values, ids = log_p.topk(90)
    contexts, tokens = common_block(ids, 120)
    assert min(len(contexts), len(tokens)) >= 10
    for row in ids[contexts]:
        assert set(tokens.tolist()) <= set(row.tolist())
    block = torch.full((len(contexts), 120), torch.nan).scatter_(1, ids[contexts], values[contexts])[:, tokens]
    assert torch.equal(block, log_p[contexts][:, tokens]) and recovered_rank(block).rank == 8


def test_exported_ranks_are_recovered(toy_backbone, toy_text, tmp_path):
    """Ranks are recovered without reading the weights, and compared with the rank that an export states."""
    series = toy_series(toy_backbone, tmp_path / "toy", {f"step{r}": 0.0 for r in (3, 8, 20)})
    for r in (3, 8, 20):

        def low_rank(W: torch.Tensor, r: int = r) -> torch.Tensor:
            U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
            return ((U[:, :r] * S[:r]) @ Vh[:r]).float()

        edit_head(series / f"step{r}", low_rank)
        (series / f"step{r}" / "bottleneck.json").write_text(json.dumps({"rank": r if r != 20 else 21}))
    words = [
        *QUICK,
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "backbone=local",
        f"backbone.path={series}",
        "study=extract",
    ]
    entries = run_study(tmp_path / "all", *words)["checkpoints"]
    assert [(e["rank"], e["known_rank"]) for e in entries] == [(3, 3), (8, 8), (20, 21)]
    assert entries[0]["verdict"].endswith("as exported") and entries[2]["verdict"].endswith("but exported as 21")
    entries = run_study(tmp_path / "top", *words, "study.top=310", "study.steps=[3,8]")["checkpoints"]
    assert [e["rank"] for e in entries] == [3, 8] and entries[0]["tokens_of_block"] < 310


def test_ranks_of_frequent_tokens_are_seen(toy_backbone, toy_text, tmp_path):
    """Regression: rows of 6 likely tokens that evenly spaced ones miss, as block and low_rank_sparse have them."""
    series = toy_series(toy_backbone, tmp_path / "toy", {"step1": 0.0})
    width = GPTNeoXConfig.from_pretrained(toy_backbone).hidden_size

    def mixed(W: torch.Tensor) -> torch.Tensor:
        spaced = torch.linspace(0, len(W) - 1, 2 * width + 64).long().tolist()
        missed = [i for i in range(len(W)) if i not in spaced][:6]
        new = torch.randn(len(W), 2, generator=g(1)) @ torch.randn(2, width, generator=g(2)) / (3 * width**0.5)
        new[missed] = 12 * torch.randn(6, width, generator=g(3)) / width**0.5
        return new

    edit_head(series / "step1", mixed)
    source = ["data=local", f"data.files={toy_text}", f"data.cache_dir={tmp_path / 'cache'}"]
    words = [*QUICK, *source, "backbone=local", f"backbone.path={series}", "study=extract"]
    assert run_study(tmp_path / "all", *words)["checkpoints"][0]["rank"] == 2 + 6


def test_the_verdict_says_what_it_cannot_know():
    """Equal rows or 16-bit weights give the spectrum a second end, above the rank that was exported."""
    entry = {"rank": 30, "gap": 300.0, "limit": 60, "hidden_size": 32, "hidden_rank": 32, "known_rank": 8}
    entry["singular_values"] = [9.0] * 8 + [0.05] * 22 + [1e-4] * 32
    assert "but exported as 8, after which the values fall 180 times" in verdict(entry)
    assert verdict(entry | {"known_rank": 9}).endswith("but exported as 9")
    assert "above the hidden size, 32" in verdict(entry | {"known_rank": None, "rank": 40})


@pytest.mark.slow
def test_every_rank_from_8_to_512_is_recovered_from_an_export(toy_backbone, toy_text, tmp_path):
    """A backbone with d = 576 and random factors of each rank as its head: the study finds exactly that rank."""
    ranks, folder = (8, 64, 256, 512), tmp_path / "wide"
    shutil.copytree(toy_backbone, folder)
    torch.manual_seed(0)
    shape = GPTNeoXConfig.from_pretrained(toy_backbone)
    shape.update({"vocab_size": 720, "hidden_size": 576, "num_hidden_layers": 2, "intermediate_size": 1152})
    GPTNeoXForCausalLM(shape).save_pretrained(folder)
    series = toy_series(folder, tmp_path / "series", {f"step{r}": 0.0 for r in ranks})
    for r in ranks:
        factors = torch.randn(720, r, generator=g(r)), torch.randn(r, 576, generator=g(r + 1)) / (576 * r) ** 0.5
        edit_head(series / f"step{r}", lambda W, factors=factors: factors[0] @ factors[1])
        (series / f"step{r}" / "bottleneck.json").write_text(json.dumps({"rank": r}))
    source = ["data=local", f"data.files={toy_text}", f"data.cache_dir={tmp_path / 'cache'}"]
    words = [*QUICK, *source, "backbone=local", f"backbone.path={series}", "study=extract"]
    entries = run_study(tmp_path / "all", *words)["checkpoints"]
    assert [(e["rank"], e["known_rank"]) for e in entries] == [(r, r) for r in ranks]
    assert all(e["gap"] > 100 for e in entries)

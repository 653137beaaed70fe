"""5-grams against counting by hand and a dense SVD; buckets, ends of text, every d; the study on the embedded text."""

from __future__ import annotations

from collections import Counter, defaultdict
from string import ascii_letters
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bottleneck.core.errors import UserError
from bottleneck.studies.formulas import counts
from bottleneck.studies.formulas.counts import gram, w_error
from bottleneck.studies.measure import ngrams
from bottleneck.studies.measure.ngrams import eigenvalues, smallest
from bottleneck.studies.ngrams import other_results
from conftest import ROOT
from support.study_runs import QUICK, run_study

EOS = 0


def stream(n: int, vocab: int, seed: int = 0) -> np.ndarray:
    """A second-order chain with ends of text in it: contexts come back, with several next tokens."""
    rng = np.random.default_rng(seed)
    out = [1, 2, 3]
    while len(out) < n:
        out.append(EOS if rng.random() < 0.01 else 1 + (out[-1] * 3 + out[-2] + rng.integers(3)) % (vocab - 1))
    return np.array(out, np.uint16)


def by_hand(tokens: np.ndarray) -> dict[tuple, Counter]:
    found: dict[tuple, Counter] = defaultdict(Counter)
    for i in range(len(tokens) - 4):
        window = tuple(int(t) for t in tokens[i : i + 5])
        if EOS not in window:
            found[window[:4]][window[4]] += 1
    return found


@pytest.mark.parametrize("size, piece", [(10**9, 1 << 24), (700, 1 << 24), (700, 501)])
def test_counts_and_spectrum_equal_those_of_the_explicit_matrix(monkeypatch, size, piece):
    """M built row by row, its singular values by a dense SVD: the same for one bucket and for many, read whole or in
    pieces.
    """
    monkeypatch.setattr(counts, "PIECE", piece)
    V, tokens = 30, stream(4000, 30)
    rows = by_hand(tokens)
    M, weight = np.zeros((len(rows), V)), np.zeros(len(rows))
    for r, row in enumerate(rows.values()):
        weight[r] = sum(row.values())
        for token, n in row.items():
            M[r, token] = n / weight[r]
    for weighted, by in ((False, np.ones(len(rows))), (True, np.sqrt(weight))):
        g = gram(tokens, V, EOS, weighted, size=size)
        assert g.contexts == len(rows) and g.ngrams == weight.sum() and g.distinct == sum(map(len, rows.values()))
        scaled = M * by[:, None]
        assert np.allclose(g.matrix, scaled.T @ scaled) and np.isclose(g.energy, (scaled**2).sum())
        sigma = np.linalg.svd(scaled, compute_uv=False)
        errors = w_error(np.linalg.eigvalsh(g.matrix))
        half = gram(tokens, V, EOS, weighted, np.float32, size=size).matrix
        assert (
            half.dtype == np.float32
            and np.allclose(half, g.matrix, rtol=1e-6)
            and np.abs(w_error(np.linalg.eigvalsh(half)) - errors).max() < 2e-3
        )
        assert len(errors) == V + 1 and errors[0] == 1 and errors[-1] == 0
        for d in range(len(sigma)):
            best = np.sqrt((sigma[d:] ** 2).sum() / (sigma**2).sum())
            assert abs(errors[d] - best) < 1e-6


def test_w_error_of_known_spectra():
    assert np.allclose(w_error(np.ones(4)), [1, np.sqrt(0.75), np.sqrt(0.5), 0.5, 0])
    assert w_error(np.array([0.0, 9.0, -1e-12])).tolist() == [1, 0, 0, 0]
    assert (
        smallest([1.0, 0.6, 0.5, 0.2, 0.0], 0.5) == 2
        and smallest([1.0, 0.0], 0.9) == 1
        and smallest([1.0, 0.3], 1.0) == 0
    )


def test_deterministic_text_has_a_diagonal_gram_matrix():
    """Each context has one next token, so the Gram matrix is diagonal and five directions hold everything."""
    tokens = np.tile([1, 2, 3, 4, 5], 50).astype(np.uint16)
    g = gram(tokens, 6, EOS)
    assert g.contexts == 5 and np.allclose(g.matrix, np.diag([0, 1, 1, 1, 1, 1]))
    assert w_error(np.linalg.eigvalsh(g.matrix))[5] == pytest.approx(0, abs=1e-7)


def test_ngrams_study_on_the_toy(toy_backbone, toy_text, tmp_path):
    words = [
        *QUICK,
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "backbone=local",
        f"backbone.path={toy_backbone}",
        "study=ngrams",
    ]
    one = run_study(tmp_path / "one", *words)
    assert len(one["w_error"]) == one["vocab"] + 1 == 321 and one["w_error"][0] == 1 and one["w_error"][-1] < 1e-6
    assert all(a >= b for a, b in zip(one["w_error"], one["w_error"][1:])) and one["smallest_d"]["0.5"]["w_error"] > 0
    two = run_study(tmp_path / "two", *words, "study.max_tokens=5000", f"study.beside={tmp_path / 'one'}")
    assert two["tokens"] == 5000 and two["contexts"] < one["contexts"]
    # a second run takes the finished matrices; with one of them gone it computes that one again
    (kept, other) = sorted((tmp_path / "one" / "ngrams.parts").iterdir())
    before = kept.stat().st_mtime_ns
    other.unlink()
    again = run_study(tmp_path / "one", *words)
    assert (
        kept.stat().st_mtime_ns == before
        and other.is_file()
        and again["w_error_weighted"] == one["w_error_weighted"]
        and one["trace_error"] < 1e-12
    )
    low = run_study(tmp_path / "low", *words, "study.precision=float32")
    assert np.abs(np.subtract(low["w_error"], one["w_error"])[:-1]).max() < 1e-3 and low["precision"] == "float32"
    with pytest.raises(UserError, match="not a result of study=ngrams"):
        other_results([str(ROOT / "pyproject.toml")])


def test_a_text_without_5_grams_is_one_line(toy_backbone, tmp_path):
    (tmp_path / "short.jsonl").write_text(
        "".join(f'{{"text": "{a}{b}"}}\n' for a in ascii_letters for b in ascii_letters)
    )  # two tokens each at most
    words = [
        *QUICK,
        "data=local",
        f"data.files={tmp_path / 'short.jsonl'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "backbone=local",
        f"backbone.path={toy_backbone}",
    ]
    with pytest.raises(UserError, match=r"^data: short.jsonl has no 5-gram in 1000 training tokens"):
        run_study(tmp_path / "out", "study=ngrams", "study.max_tokens=1000", *words)
    assert not (tmp_path / "out" / "ngrams.json").exists()


def test_missing_memory_is_reported_before_the_text_is_read(toy_backbone, tmp_path, monkeypatch):
    """Free memory as psutil reports it."""
    monkeypatch.setattr(ngrams.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    words = [
        *QUICK,
        "data=local",
        f"data.files={tmp_path / 'none.jsonl'}",
        "backbone=local",
        f"backbone.path={toy_backbone}",
        "study=ngrams",
    ]
    with pytest.raises(
        UserError, match=r"^backbone: 5-gram matrices of 320 x 320 tokens take .* study.precision=float32 takes half$"
    ):
        run_study(tmp_path / "out", *words)
    with pytest.raises(UserError, match=r"0.0 GiB are free$"):
        run_study(tmp_path / "out", *words, "study.precision=float32")
    with pytest.raises(UserError, match=r"^study.precision=half: must be float64 or float32$"):
        run_study(tmp_path / "out", *words, "study.precision=half")


def test_counts_beyond_the_integers_of_float32_are_exact():
    """2^24 + 3 times the same token after contexts with no other: a float32 sum would have stopped at 2^24."""
    c = counts.Counts(np.arange(2), np.array([1, 1]), np.array([2**24, 3]))
    diagonal, out = np.zeros(2), counts.Gram(np.zeros((2, 2), np.float32))
    for _ in range(2):
        counts._add(out, diagonal, c, True)
    assert diagonal.tolist() == [0, 2 * (2**24 + 3)] and not out.matrix.any()


def test_a_matrix_too_large_for_the_gpu_goes_to_the_cpu(caplog):
    """The meta device stands in for a GPU that fails."""
    matrix = np.diag([3.0, 1.0, 2.0])
    assert (
        eigenvalues(matrix, torch.device("meta")).tolist() == [1.0, 2.0, 3.0]
        and "cannot take a matrix of 3 x 3" in caplog.text
    )
    caplog.clear()
    assert eigenvalues(matrix, torch.device("cpu")).tolist() == [1.0, 2.0, 3.0] and not caplog.text

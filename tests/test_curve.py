"""Merging runs: one line for what is comparable, separate lines for the rest; bad folders are one line."""

from __future__ import annotations

import copy
import csv
import json
import math

import pytest

from bottleneck import curve
from bottleneck.errors import UserError
from bottleneck.picture import labels


def made(losses: dict[int, float], **changes) -> dict:
    heads = [
        {"rank": r, "lr": 0.1, "seed": 0, "init": "fisher", "parameters": r * 100, "loss": x, "perplexity": math.exp(x),
         "bits_per_byte": x / 3, "initial_loss": x + 1, "status": "ok", "best": False}
        for r, x in losses.items()
    ]  # fmt: skip
    base = {
        "schema": 1, "backbone": "toy", "backbone_hash": "b", "hidden_size": 64, "vocab_size": 100, "tokens": 1000,
        "data": "text", "data_hash": "d", "validation_tokens": 10, "recipe": {"batch_size": 8},
        "reference": {"loss": 2.0, "perplexity": math.exp(2.0), "bits_per_byte": 0.7}, "heads": heads,
    }  # fmt: skip
    return curve.finish({**base, **changes})


def save(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "curve.json").write_text(json.dumps(content))
    return folder


def test_jobs_of_a_sweep_become_one_line(tmp_path):
    for i, r in enumerate((64, 8, 2)):
        save(tmp_path / "sweep" / str(i), made({r: 3.0 - math.log10(r)}))
    assert curve.main([str(tmp_path / "sweep"), "--out", str(tmp_path / "sweep" / "merged")]) == 0
    once = json.loads((tmp_path / "sweep" / "merged" / "curve.json").read_text())
    assert [h["rank"] for h in once["heads"]] == [2, 8, 64]
    assert curve.main([str(tmp_path / "sweep"), "--out", str(tmp_path / "sweep" / "merged")]) == 0  # own output is not input
    assert json.loads((tmp_path / "sweep" / "merged" / "curve.json").read_text()) == once
    rows = list(csv.DictReader(open(tmp_path / "sweep" / "merged" / "curve.csv")))
    assert [int(r["rank"]) for r in rows] == [2, 8, 64] and float(rows[0]["loss"]) == once["heads"][0]["loss"]
    assert (tmp_path / "sweep" / "merged" / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_not_comparable_stays_apart(tmp_path):
    others = [
        dict(backbone_hash="other"), dict(data_hash="other"), dict(tokens=2000), dict(recipe={"batch_size": 16}),
    ]  # fmt: skip
    for i, change in enumerate([{}, *others]):
        save(tmp_path / str(i), made({8: 2.5, 64: 2.1}, **change))
    curves = curve.merge(curve.read([tmp_path], skip=tmp_path / "out"))
    assert len(curves) == 5 and len(set(labels(curves))) == 5
    curve.write(curves, tmp_path / "out")
    again = curve.merge(curve.read([tmp_path / "out"], skip=tmp_path))
    assert again == curves


def test_best_is_the_lowest_of_each_rank_and_start():
    a, b = made({8: 2.5}), made({8: 2.4})
    b["heads"][0]["lr"] = 0.2
    c = copy.deepcopy(b)
    c["heads"][0].update(init="scaled", loss=2.9)
    d = copy.deepcopy(b)
    d["heads"][0].update(lr=0.3, loss=None, perplexity=None, status="diverged")
    (merged,) = curve.merge([a, b, c, d])
    best = {(h["init"], h["lr"]) for h in merged["heads"] if h["best"]}
    assert best == {("fisher", 0.2), ("scaled", 0.2)} and len(merged["heads"]) == 4


def test_two_results_for_one_head_are_refused():
    a, b = made({8: 2.5}), made({8: 2.6})
    with pytest.raises(UserError, match="rank 8, lr 0.1, seed 0 has two results"):
        curve.merge([a, b])
    assert len(curve.merge([a, a])[0]["heads"]) == 1


@pytest.mark.parametrize(
    "content, words",
    [(None, "no curve.json there"), ("{", "not a curve"), ("[]", "not a curve"), ('{"schema": 1}', "it lacks"), ("3", "not a curve"),
     ('{"curves": []}', "no curve"), ('{"curves": 3}', "no curve"), (json.dumps(made({8: 2.5}, recipe=None)), "recipe"),
     (json.dumps({**made({8: 2.5}), "heads": [{"rank": 8}]}), "a head lacks"),
     (json.dumps({**made({8: 2.5}), "heads": [3]}), "a head lacks"), (json.dumps({**made({8: 2.5}), "heads": []}), "empty"),
     (json.dumps(made({8: 2.5}, schema=9)), "schema 9, this version reads 1")],
)  # fmt: skip
def test_bad_folders_are_one_line(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "curve.json").write_text(content)
    assert curve.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    assert curve.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert curve.main([str(tmp_path)]) == 2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    save(tmp_path / "run", made({8: 2.5}))
    (tmp_path / "file").write_text("in the way")
    assert curve.main([str(tmp_path / "run"), "--out", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and (tmp_path / "file").read_text() == "in the way"


def test_the_second_reference_is_the_trained_head_of_full_rank():
    assert made({8: 2.5})["trained_reference"] is None
    assert made({8: 2.5, 64: 1.9})["trained_reference"]["loss"] == 1.9

"""The forecast's law recovers what was planted, its intervals cover, and its runs are those of train.py."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from bottleneck.benchmark import forecast as benchmark
from bottleneck.core.errors import UserError
from bottleneck.studies import forecast as study
from bottleneck.studies.formulas import forecast as laws
from bottleneck.studies.measure import forecast as measure
from support.study_runs import composed, run_study

T1, T2 = laws.SHORT
LAW = laws.Law(0.6, (0.0, 0.0), 0.4, 0.1)


def planted(*, noise: float, seed: int = 0) -> list[laws.Curve]:
    """Curves F + c T^-β with β = 0.4 and noise on each loss, of four backbones and two texts."""
    rng, out = np.random.default_rng(seed), []
    for backbone, d, V in (("a", 128, 4096), ("b", 256, 8192), ("c", 384, 32768), ("e", 576, 49152)):
        for text in ("prose", "code"):
            for r in (8, 16, 32, 64, 128):
                floor, c = 2 + 4 / math.sqrt(r), rng.uniform(0.3, 0.6)
                at = {t: floor + c * (t / T2) ** -0.4 + noise * rng.normal() for t in (T1, T2, 4 * T2, 16 * T2)}
                out.append(laws.Curve(backbone, text, d, V, r, {0: floor + 3, **at}))
    return out


def test_a_planted_law_is_recovered_and_extends_the_losses():
    data = laws.points(planted(noise=0.0))
    law = laws.fit(data)
    assert law.beta == pytest.approx(0.4, abs=1e-5) and law.b == pytest.approx((0.0, 0.0), abs=1e-5)
    assert law.a == pytest.approx(0.4 / ((T2 / T1) ** 0.4 - 1), abs=1e-5)  # the slope of a power law
    for curve, tokens in data:
        assert law.forecast(curve, tokens)[0] == pytest.approx(curve.losses[tokens], abs=1e-4)


def test_first_runs_below_the_power_law_are_made_up_for():
    """A start that is better than the first short run would be: its gain is short by 0.01 + 0.002 log(r / d)."""
    curves = planted(noise=0.0)
    for c in curves:
        c.losses[T1] -= 0.01 + 0.002 * math.log(c.rank / c.hidden_size)
    law = laws.fit(laws.points(curves))
    slope = 0.4 / ((T2 / T1) ** 0.4 - 1)
    assert (law.a, law.beta) == pytest.approx((slope, 0.4), abs=1e-4)
    assert law.b == pytest.approx((0.01 * slope, 0.002 * slope), abs=1e-4)


def test_intervals_of_what_was_left_out_cover_as_often_as_they_say():
    """Four sets of planted curves; the law never sees the group that it forecasts."""
    shares: dict[str, list[float]] = {name: [] for name in laws.GROUPS}
    for seed in range(4):
        data = laws.points(planted(noise=0.002, seed=seed))
        for name in laws.GROUPS:
            shares[name].append(laws.summary(name, laws.leave_one_out(data, name)).coverage)
    for name, found in shares.items():
        assert 0.85 < np.mean(found) < 0.96, name


def test_what_is_left_out_does_not_change_its_own_forecast():
    """Changing the measured losses of one backbone changes the forecasts of the others only."""
    curves = planted(noise=0.002)
    changed = [
        laws.Curve(**{**vars(c), "losses": {t: x - 0.2 * (t > T2) for t, x in c.losses.items()}})
        if c.backbone == "c"
        else c
        for c in curves
    ]

    def width(data: list[laws.Curve], backbone: str) -> list[float]:
        held = laws.leave_one_out(laws.points(data), "backbone")
        return [f.half_width for f in held if f.group == backbone]

    assert width(curves, "c") == width(changed, "c") and width(curves, "a") != width(changed, "a")


def test_the_conformal_quantile_by_hand():
    errors = np.arange(1, 21) / 100 * np.where(np.arange(20) % 2, 1, -1)
    assert laws.conformal(errors) == 0.19  # the 19th of 20: ceil(21 · 0.9)
    assert laws.conformal(errors[:3]) == 0.03  # too few: the largest


@pytest.fixture
def small(monkeypatch):
    """Steps of 256 tokens, short runs of 8 and 32 of them, one rate, and the law of planted curves."""
    stored = laws.Stored(LAW, laws.Range((8, 64), (100, 900), (4, 16), ((64, 16 * T2),)), ())
    for module in (laws, measure):
        monkeypatch.setattr(module, "STEP_TOKENS", 256)
    monkeypatch.setattr(laws, "SHORT", (8 * 256, 32 * 256))
    monkeypatch.setattr(laws, "BLOCK", 64)
    monkeypatch.setattr(measure, "FACTORS", (1.0,))
    monkeypatch.setattr(measure, "CALIBRATION", 4096)
    monkeypatch.setattr(laws.Stored, "statement", "checked")
    monkeypatch.setattr(laws, "stored", lambda: stored)


def words(toy: list[str]) -> list[str]:
    text = [o for o in toy if o.startswith(("backbone", "data"))]
    return [*text, "study=forecast", "tokens=3000", "trainer=cpu", "trainer.micro_batch_size=4", "trainer.threads=1"]


def test_its_runs_are_those_of_train_py_and_do_not_depend_on_their_company(toy, tmp_path, small, run, caplog):
    """The loss after a budget is that of a run of train.py with the same settings, although one pass serves all."""
    given = [*words(toy), "study.ranks=[4,32]", "study.budgets=[12288]"]
    found = run_study(tmp_path / "f", *given, "study.check=[10240]")
    lr = next(r["lr"] for r in found["losses"] if (r["tokens"], r["rank"]) == (10240, 4))
    o = measure.OPTIM
    keys = [f"optim.{k}={getattr(o, k)}" for k in ("betas", "eps", "weight_decay", "warmup", "lr_final")]
    start = ["head=refined", "head.whiten=true", f"head.calibration_tokens={measure.CALIBRATION}", f"optim.lr={lr}"]
    alone = run(*keys, *start, "tokens=10240", "batch_size=4", "ranks=[4]", "data.validation_tokens=3000").curve
    (head,) = alone["heads"]
    (loss,) = (r["loss"] for r in found["losses"] if (r["tokens"], r["rank"]) == (10240, 4))
    assert loss == pytest.approx(head["loss"], abs=1e-6) and loss < head["initial_loss"] - 0.01
    assert found["reference"] == pytest.approx(alone["reference"]["loss"], abs=1e-6)
    by_rank = {h["rank"]: h for h in found["heads"]}
    near, far = by_rank[4]["forecasts"]
    assert near["measured"] == loss and near["low"] < near["loss"] < near["high"] and not near["outside"]
    assert (
        by_rank[32]["forecasts"][0]["low"] is None
        and "rank 32, fitted on 4 to 16" in by_rank[32]["forecasts"][0]["outside"]
    )
    assert far["measured"] is None

    csv = tmp_path / "curves.csv"
    benchmark.run(_arguments([tmp_path / "f"], csv))
    stored = laws.read(csv)
    assert {c.rank for c in stored} == {4, 32} and stored[0].losses[10240] == loss
    parts = sorted((tmp_path / "f" / "forecast.parts").glob("*.json"))
    before = [p.stat().st_mtime_ns for p in parts]
    again = run_study(tmp_path / "f", *given, "study.check=[10240]")  # nothing is trained twice
    assert again == found and [p.stat().st_mtime_ns for p in parts] == before
    assert "on a CPU" in caplog.text


def _arguments(runs, to):
    import argparse

    return argparse.Namespace(runs=runs, to=to)


@pytest.mark.parametrize(
    "word, said",
    [
        ("study.budgets=[1000]", "study.budgets=1000: must be at least 1,974,272 tokens"),
        ("study.check=[1048576]", "study.check=1048576: must be at least 1,974,272 tokens"),
        ("study.budgets=[]", "give at least one budget"),
        ("data.epochs=2", "data.epochs=2: a study reads its text once"),
        ("study.ranks=[0]", "study.ranks"),
    ],
)
def test_impossible_keys_are_refused_before_anything_is_read(word, said):
    from bottleneck.studies.shared.config import check_study

    with pytest.raises(UserError, match=said):
        check_study(composed("study=forecast", word))


def test_a_text_too_short_is_refused_in_the_words_of_the_study_before_weights_load(toy, tmp_path, small, monkeypatch):
    """Regression: the key was said to be `tokens`, after the closed forms had been measured and stored."""
    monkeypatch.setattr(measure, "loaded", None)
    given = [*words(toy), "study.budgets=[1e6]", "study.ranks=[4]", "data.name=toy"]

    def refused(start: str, end: str, *more: str) -> list[int]:
        with pytest.raises(UserError) as found:
            run_study(tmp_path / "f", *given, *more)
        assert not list((tmp_path / "f").iterdir())
        about = r"toy has (\d+) training tokens in blocks of 64; "
        numbers = re.fullmatch(re.escape(start) + about + end, str(found.value))
        assert numbers is not None, str(found.value)
        return list(map(int, numbers.groups()))

    trained = "study.check={}: its budgets are trained, and "  # in whole steps
    have, most = refused(trained.format(999936), r"give at most (\d+), or more text", "study.check=[10240,1e6]")
    assert have - 256 < most <= have < 999936 and most % 256 == 0
    cut = ("study.check=20000", "data.max_tokens=9000")
    have, most = refused(trained.format(19968), r"give at most (\d+), or a larger data.max_tokens", *cut)
    assert have - 256 < most <= have < 9500
    monkeypatch.setattr(laws, "SHORT", (8 * 256, have // 256 * 256))
    refused(trained.format(19968), "leave it out, or a larger data.max_tokens", *cut)
    monkeypatch.setattr(laws, "SHORT", (8 * 256, 76800))
    short = "study=forecast: its short runs read 76800 training tokens, "
    refused(short, "give a larger study.max_tokens", "study.max_tokens=9000", "data.max_tokens=9000")
    monkeypatch.setattr(laws, "SHORT", (8 * 256, 768000))
    refused("study=forecast: its short runs read 768000 training tokens, ", "give more text")


def test_what_is_outside_the_fitted_range_has_no_interval_but_a_reason():
    range_ = laws.range_of(laws.points(planted(noise=0.0)))
    inside = planted(noise=0.0)[0]
    assert range_.outside(inside, 512) == [] and range_.outside_budget(16 * T2, 576) == []
    wide = laws.Curve("z", "prose", 4096, 128_256, 2048, inside.losses)
    assert len(range_.outside(wide, 2048)) == 4 and range_.outside_budget(17 * T2, 4096)
    stored = laws.Stored(LAW, range_, ())
    (row,) = study.forecast(wide, stored, [4 * T2], 512)
    assert row["low"] is None and row["high"] is None and len(row["outside"]) == 3


def test_a_longer_run_that_is_no_better_has_no_interval():
    """Regression: without a gain from the longer short run the interval was the narrowest of all."""
    stored = laws.stored()
    assert not any(stored.range.outside(c, 512) for c in laws.read())
    for losses in ({0: 5.0, T1: 4.5, T2: 4.6}, {0: 3.0, T1: 3.05, T2: 3.02}):
        curve = laws.Curve("z", "prose", 512, 32_768, 64, losses)
        (row,) = study.forecast(curve, stored, [4 * T2], 512)
        assert row["low"] is None and "no better than" in row["outside"][0]


def test_the_stored_curves_are_whole():
    """Each has its closed form and both short runs, and the JSON of the check can be written."""
    curves = laws.read()
    assert len(curves) > 20 and all(c.budgets for c in curves)
    json.dumps([vars(c) for c in laws.stored().checks])


def test_a_rate_that_diverged_does_not_count():
    """Regression: its missing loss ended the study after all of its training."""
    row = {"backbone": "b", "text": "t", "hidden_size": 8, "vocab_size": 9, "rank": 2}
    rows = [row | {"tokens": t, "loss": x} for t in (0, *laws.SHORT) for x in (None, "", 3.0)]  # "": read from a CSV
    (c,) = laws.curves_of(rows)
    assert c.losses == dict.fromkeys((0, *laws.SHORT), 3.0)


def test_a_budget_is_outside_where_only_narrower_backbones_had_it():
    curves = planted(noise=0.0)
    data = [(c, t) for c, t in laws.points(curves) if c.hidden_size < 400 or t == 4 * T2]
    range_ = laws.range_of(data)
    assert range_.budgets == ((128, 16 * T2), (256, 16 * T2), (384, 16 * T2), (576, 4 * T2))
    assert range_.outside_budget(16 * T2, 384) == [] and range_.outside_budget(4 * T2, 500) == []
    (reason,) = range_.outside_budget(5 * T2, 500)
    assert reason.endswith("at hidden sizes from 576 on")
    assert range_.outside_budget(5 * T2, 4096) == [reason]  # wider than all: as the widest

"""Merging runs: comparable heads share a line of the picture; bad folders give a one-line error."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from importlib import metadata

import pytest
from rich.console import Console

from bottleneck.core.errors import UserError
from bottleneck.results import curve
from bottleneck.results.labels import labels
from bottleneck.results.merging import finish
from bottleneck.results.picture import draw
from support.curves import made


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
    assert (
        curve.main([str(tmp_path / "sweep"), "--out", str(tmp_path / "sweep" / "merged")]) == 0
    )  # the command's own output is not read as input
    assert json.loads((tmp_path / "sweep" / "merged" / "curve.json").read_text()) == once
    rows = list(csv.DictReader(open(tmp_path / "sweep" / "merged" / "curve.csv")))
    assert [int(r["rank"]) for r in rows] == [2, 8, 64] and float(rows[0]["loss"]) == once["heads"][0]["loss"]
    assert (tmp_path / "sweep" / "merged" / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_not_comparable_stays_apart(tmp_path):
    others = [
        dict(backbone_hash="other"),
        dict(data_hash="other"),
        dict(tokens=2000),
        dict(recipe={"batch_size": 16}),
    ]
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


def test_runs_of_different_targets_are_not_one_curve():
    """Their metrics compare with the target. Of one target they are one curve; the picture tells two apart."""
    runs = [
        made({rank: 2.5}) | {"target": {"name": "t", "hash": hash, "loss": 2.0, "original": {}}}
        for rank, hash in ((8, "aaaaaaaa"), (16, "aaaaaaaa"), (32, "bbbbbbbb"))
    ]
    merged = curve.merge(runs)
    assert [(c["target"]["hash"][0], [h["rank"] for h in c["heads"]]) for c in merged] == [("a", [8, 16]), ("b", [32])]
    assert labels(merged) == ["toy, target aaaaaa", "toy, target bbbbbb"]


def test_two_results_for_one_head_are_refused():
    a, b = made({8: 2.5}), made({8: 2.6})
    with pytest.raises(UserError, match="rank 8, lr 0.1, seed 0 has two results"):
        curve.merge([a, b])
    assert len(curve.merge([a, a])[0]["heads"]) == 1


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no curve.json there"),
        ("{", "not a curve"),
        ("[]", "not a curve"),
        ('{"schema": 1}', "it lacks"),
        ("3", "not a curve"),
        ('{"curves": []}', "no curve"),
        ('{"curves": 3}', "no curve"),
        (json.dumps(made({8: 2.5}, recipe=None)), "recipe"),
        (json.dumps({**made({8: 2.5}), "heads": [{"rank": 8}]}), "a head lacks"),
        (json.dumps({**made({8: 2.5}), "heads": [3]}), "a head is not an object"),
        (json.dumps({**made({8: 2.5}), "heads": []}), "empty"),
        (json.dumps(made({8: 2.5}, schema=9)), "schema 9, this version reads 1"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "curve.json").write_text(content)
    assert curve.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    assert curve.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert curve.main([str(tmp_path)]) == 2


def test_a_run_that_is_given_twice_counts_once_and_is_named(tmp_path, caplog):
    run = save(tmp_path / "run", made({8: 2.5}))
    save(tmp_path / "other", made({64: 2.1}))
    again = [run, tmp_path / "other", run / "curve.json"]
    assert curve.main([*map(str, again), "--out", str(tmp_path / "out")]) == 0
    assert caplog.messages == [f"{run / 'curve.json'}: the run is given twice and counts once"]
    assert [h["rank"] for h in json.loads((tmp_path / "out" / "curve.json").read_text())["heads"]] == [8, 64]


def test_a_run_as_its_own_out_is_refused(tmp_path, capsys):
    """Regression: its curve.json was said not to be there."""
    run, other = tmp_path / "run", tmp_path / "other"
    save(run, made({8: 2.5}))
    save(other, made({64: 2.1}))
    before = (run / "curve.json").read_bytes()
    for runs in ([run], [run / "curve.json"], [other, run]):
        assert curve.main([*map(str, runs), "--out", str(run)]) == 2
        assert capsys.readouterr().err == f"error: --out {run}: is one of the runs; give another folder\n"
    assert (run / "curve.json").read_bytes() == before


def test_the_folder_of_another_run_is_kept(tmp_path, capsys):
    """Its curve.json would be lost; a folder of a merged curve may be written again."""
    run, other = save(tmp_path / "run", made({8: 2.5})), save(tmp_path / "other", made({16: 2.5}))
    (other / "run.json").write_text("{}")
    before = (other / "curve.json").read_bytes()
    assert curve.main([str(run), "--out", str(other)]) == 2
    assert "is the folder of a run, whose curve.json would be lost" in capsys.readouterr().err
    assert (other / "curve.json").read_bytes() == before
    assert [curve.main([str(run), "--out", str(tmp_path / "out")]) for _ in range(2)] == [0, 0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    save(tmp_path / "run", made({8: 2.5}))
    (tmp_path / "file").write_text("in the way")
    assert curve.main([str(tmp_path / "run"), "--out", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and (tmp_path / "file").read_text() == "in the way"


def test_the_second_reference_is_the_trained_head_of_full_rank():
    assert made({8: 2.5})["trained_reference"] is None
    c = made({8: 2.5, 64: 1.9})
    assert c["trained_reference"]["loss"] == 1.9
    c["heads"][1] |= {"kind": "truncated", "options": {"rows": 50}}  # no matrix: most of the vocabulary has no logit
    assert finish(c)["trained_reference"] is None


def test_a_multiruns_merged_curve_is_read_where_it_is_named(tmp_path, capsys):
    """A multirun's folder stands for its jobs; its merged curve is read only if its own folder is given."""
    sweep = tmp_path / "sweep"
    for i, r in enumerate((64, 8)):
        save(sweep / str(i), made({r: 2.5}))
    (sweep / "multirun.yaml").write_text("")
    merged = curve.merge(curve.read([sweep], skip=tmp_path))
    curve.write(merged, sweep / "curve")
    for path in (sweep, sweep / "curve", sweep / "curve" / "curve.json"):
        assert curve.merge(curve.read([path], skip=tmp_path)) == merged, path


def test_losses_by_frequency_are_in_the_csv(tmp_path):
    one = made({8: 2.5, 64: 2.1})
    for h in one["heads"]:
        h |= {
            "kl": 0.5,
            "top1_agreement": 0.5,
            "top5_agreement": 0.5,
            "acceptance": 0.5,
            "bands": [{"band": "1–10", "tokens": 4, "loss": h["loss"]}, {"band": "11–", "tokens": 0, "loss": None}],
        }
    one["reference"]["bands"] = [{"band": "1–10", "tokens": 4, "loss": 2.0}, {"band": "11–", "tokens": 0, "loss": None}]
    curve.write([one], tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "curve.csv")))
    assert [float(r["loss_1-10"]) for r in rows] == [2.5, 2.1] and rows[0]["loss_11-"] == ""


def test_kinds_are_in_the_csv(tmp_path):
    """Rows of several kinds at one rank could not be told apart: the file had only the keys that every head has."""
    c = made({8: 2.5, 16: 2.4})
    c["heads"].append(c["heads"][0] | {"kind": "mos", "options": {"components": 3}})
    curve.write([c], tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "curve.csv")))
    options = ["", "", '{"components": 3}']
    assert [(r["kind"], r["options"]) for r in rows] == list(zip(["low_rank", "low_rank", "mos"], options))
    curve.write([made({8: 2.5})], tmp_path)
    assert "kind" not in (tmp_path / "curve.csv").read_text()


def test_heads_that_all_diverged_leave_a_whole_result(run, capsys, tmp_path):
    result = run("optim.lr=1e12", "tokens=2048")
    assert all(h["status"] == "diverged" for h in result.curve["heads"])
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"curve.json", "curve.csv", "curve.png", "heads"}
    assert "all heads diverged: give lower rates (optim.lr)" in " ".join(capsys.readouterr().out.split())
    # also without infinite numbers: a loss far above the initial one counts as diverged
    thrown = run("optim.lr=30", "tokens=2048", run_dir=tmp_path / "thrown").curve
    assert any(h["status"] == "diverged" and h["loss"] is not None for h in thrown["heads"])
    told = result.curve["versions"]
    assert set(told) == {
        "bottleneck",
        "torch",
        "transformers",
        "pytorch-lightning",
        "commit",
        "python",
        "system",
        "device",
    }  # no host name, no path
    assert told["torch"] == metadata.version("torch") and told["device"].endswith("CPU")
    again = run("optim.lr=1e12", "tokens=2048", "ckpt_path=last")
    assert again.curve == json.loads((tmp_path / "run" / "curve.json").read_text())
    assert curve.main([str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["heads"][0].update(loss=math.nan), "a head's loss is nan, not a number or null"),
        (lambda c: c.update(tokens="many"), "its tokens is many, not a whole number"),
        (lambda c: c["reference"].update(loss="x"), "its reference's loss is x, not a number or null"),
        (lambda c: c["heads"][1].update(rank="8"), "a head's rank is 8, not a whole number above 0"),
        (lambda c: c["heads"][1].update(best=None), "a head's best is None, not true or false"),
        (lambda c: c.update(versions=None), "its versions is None, not an object"),
        (
            lambda c: c["heads"][0].update(
                kl=0.1, top1_agreement=1.0, bands=[{"band": "1–10", "tokens": 1, "loss": 1.0}]
            ),
            "the bands of its head of rank 8 are not those of its reference",
        ),
        (lambda c: c["heads"][0].update(bands=[3]), "a head's bands is [3], not a list of bands"),
    ],
)
def test_values_of_the_wrong_kind_are_one_line(tmp_path, capsys, change, words):
    content = made({8: 2.5, 64: 2.1})
    change(content)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "curve.json").write_text(json.dumps(content))
    assert curve.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and words in line and not (tmp_path / "out").exists()


def test_names_are_drawn_and_printed_as_they_stand(tmp_path, capsys):
    """Matplotlib would read dollar signs as mathematics, Rich brackets as colours."""
    one = made({8: 2.5, 64: 2.1}, backbone=r"$\bad$ [bold]x")
    curve.write([one], tmp_path)
    curve.show([one], Console(width=200))
    assert r"$\bad$ [bold]x on text" in capsys.readouterr().out


def head(rank: int, lr: float, perplexity: float, seed: int = 0) -> dict:
    """One head of a curve as train.py writes it, with what the table needs."""
    return {
        "rank": rank,
        "lr": lr,
        "seed": seed,
        "init": "fisher",
        "parameters": 1,
        "loss": math.log(perplexity),
        "perplexity": perplexity,
        "bits_per_byte": 1.0,
        "initial_loss": 2000.25,
        "status": "ok",
        "best": False,
        "kl": -1e-7,
    }


def printed(heads: list[dict], width: int = 80) -> str:
    c = {
        "backbone": "toy",
        "data": "text",
        "tokens": 1000,
        "recipe": {},
        "heads": curve.mark_best(heads),
        "reference": {"loss": 2.0, "perplexity": 7.389},
    }
    console = Console(width=width, file=io.StringIO())
    curve.show([c], console)
    return console.file.getvalue()


def test_the_table_cuts_no_number_and_names_the_seeds_and_rates_it_chose_from():
    text = printed([head(8, 0.1, 15.55, 2), head(8, 0.1, 17.28, 0), head(8, 0.1, 16.2, 1), head(8, 1e-4, 1e120, 0)])
    assert (
        "the best of 3 seeds" in text
        and "all 3 seeds" in text
        and "15.55–17.28" in text
        and "…" not in text
        and " 2,000 " in text
        and "-0.0000" not in text
    )
    assert "1e+120" in printed([head(8, 0.1, 1e120)]) and "seeds" not in printed([head(8, 0.1, 1e120)])
    grid = [
        head(r, lr, 10 + abs(math.log10(lr) - at))
        for r, at in ((8, -3), (16, -2), (32, -1))
        for lr in (1e-3, 1e-2, 1e-1)
    ]
    text = printed(grid)
    assert (
        "the lowest rate tried is the best at rank 8: try lower ones" in text
        and "the highest rate tried is the best at rank 32: try higher ones" in text
    )
    assert "rate tried" not in printed([h for h in grid if h["lr"] < 0.1]), "two rates are no grid"


def test_lines_are_named_by_what_their_recipes_have():
    base = {"backbone": "toy", "data": "t", "tokens": 1, "backbone_hash": "a", "data_hash": "b"}
    names = labels(
        [{**base, "recipe": {"warmup": 0.1}}, {**base, "recipe": {"warmup": 0.1, "objective": "mixed", "mix": 0.9}}]
    )
    assert names == ["toy", "toy, mix 0.9, objective mixed"]
    starts = [
        {**base, "tokens": t, "recipe": {}, "heads": [head(8, 0.1, 2.0) | {"init": i}]}
        for i, t in (("scaled", 149_946_368), ("fisher", 5_000))
    ]
    assert labels(starts) == ["toy, scaled, 149.9M tokens", "toy, fisher, 5,000 tokens"]


def test_long_names_stand_below_the_picture_and_a_shared_original_head_is_drawn_once():
    """Regression: they were drawn over the curves and cut off at the axes' left edge."""
    import matplotlib.pyplot as plt

    seen = []
    close = plt.close
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            plt,
            "close",
            lambda figure: (
                seen.append((figure.legends, figure.axes[0].get_legend(), figure.get_window_extent())),
                close(figure),
            ),
        )
        c = {
            "backbone": "a-backbone-of-a-rather-long-name",
            "data": "t",
            "tokens": 1,
            "backbone_hash": "a",
            "data_hash": "b",
            "reference": {"perplexity": 9.0, "loss": 2.2},
        }
        two = [
            {
                **c,
                "recipe": {"mix": m, "objective": "an-objective-of-a-rather-long-name" * (m > 0.5)},
                "heads": curve.mark_best([head(8, 0.1, 30.0), head(16, 0.1, 12.0)]),
            }
            for m in (0.5, 0.9)
        ]
        draw(two, io.BytesIO())
    ((legend,), inside, page) = seen[0]
    names = [t.get_text() for t in legend.get_texts()]
    assert inside is None and sum("original head" in n for n in names) == 1 and len(names) == len(set(names))
    box = legend.get_window_extent()
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0


@pytest.mark.parametrize("high", [30.0, 3e4, 1e60])
def test_the_axis_of_perplexities_can_be_read(high):
    """A handful of ticks, however wide the range is."""
    import matplotlib.pyplot as plt

    seen = []
    close = plt.close
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            plt,
            "close",
            lambda figure: (
                seen.append(
                    [
                        t
                        for t in figure.axes[0].get_yticks()
                        if figure.axes[0].get_ylim()[0] <= t <= figure.axes[0].get_ylim()[1]
                    ]
                ),
                close(figure),
            ),
        )
        c = {
            "backbone": "toy",
            "data": "t",
            "tokens": 1,
            "backbone_hash": "a",
            "data_hash": "b",
            "recipe": {},
            "reference": {"perplexity": 9.0, "loss": 2.2},
        }
        draw([{**c, "heads": curve.mark_best([head(8, 0.1, high), head(16, 0.1, 12.0)])}], io.BytesIO())
    assert 3 <= len(seen[0]) <= 16, seen

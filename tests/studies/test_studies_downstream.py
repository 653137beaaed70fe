"""Table 1 from result files of lm-evaluation-harness, invented ones and Pythia's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bottleneck.core.errors import UserError
from bottleneck.studies.downstream import compare_checkpoints
from bottleneck.studies.shared.harness_results import Score, is_bias, lower_is_better, read_harness_results, scores
from bottleneck.studies.shared.steps import step_number
from support.study_runs import run_study


def old(folder: Path, step: int, **tasks) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step{step}.json").write_text(json.dumps({"results": tasks, "versions": {}, "config": {"model": "hf"}}))


def current(folder: Path, revision: str, stamp: str, **tasks) -> None:
    """A file as versions since 0.4 write it: metric,filter keys, aliases, errors that may be "N/A"; the step in
    model_args.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {t: {"alias": t, **{f"{k},none": v for k, v in table.items()}} for t, table in tasks.items()}
    content = {
        "results": tables,
        "config": {"model": "hf", "model_args": f"pretrained=EleutherAI/pythia-160m,revision={revision},dtype=float"},
        "model_name": "x",
    }
    (folder / f"results_2024-05-{stamp}T12-00-00.123.json").write_text(json.dumps(content))


def test_planted_drops_are_found_in_both_formats(tmp_path):
    for i, (ppl, acc) in enumerate([(500, 0.2), (40, 0.70), (25, 0.74), (33, 0.735)]):
        tasks = {
            "lambada_openai": {"ppl": ppl, "ppl_stderr": ppl * 0.03, "acc": 0.3, "acc_stderr": 0.01},
            "sciq": {"acc": acc, "acc_stderr": 0.014, "acc_norm": 0.5, "acc_norm_stderr": 0.01},
        }
        old(tmp_path / "old", 1000 * i + 1, **tasks)
        now = {
            "lambada_openai": {"perplexity": ppl, "perplexity_stderr": ppl * 0.03, "acc": 0.3, "acc_stderr": "N/A"},
            "sciq": dict(tasks["sciq"]),
        }
        current(tmp_path / "new" / "EleutherAI__pythia-160m", f"step{1000 * i + 1}", f"0{i + 1}", **now)
    for name in ("old", "new"):
        c = run_study(
            tmp_path / f"out-{name}",
            "study=downstream",
            f"study.results={tmp_path / name}",
            "study.tasks=[lambada_openai,sciq,sciq:acc_norm]",
        )
        assert c["steps"] == [1, 1001, 2001, 3001]
        drop = c["tasks"]["lambada_openai"]
        assert (
            drop["saturates"] is True
            and drop["metric"] == "perplexity"
            and drop["best"]["step"] == 2001
            and drop["final"]["value"] == 33
        )
        assert drop["drop"] == pytest.approx(8) and drop["z"] == pytest.approx(0.27763 / (0.03 * 2**0.5), rel=1e-3)
        assert c["tasks"]["sciq"]["saturates"] is False and c["tasks"]["sciq"]["best"] == {
            "step": 2001,
            "value": 0.74,
            "stderr": 0.014,
        }
        assert c["tasks"]["sciq:acc_norm"]["metric"] == "acc_norm" and c["tasks"]["sciq:acc_norm"]["drop"] == 0


def test_both_formats_give_the_same_scores():
    assert scores({"acc": 0.5, "acc_stderr": 0.01, "alias": "x"}) == scores(
        {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": " - x"}
    )
    assert scores({"acc,none": 0.5, "acc_stderr,none": "N/A"}) == {"acc": Score(0.5, None)}
    assert scores({"exact_match,flexible-extract": 0.7, "exact_match,strict-match": 0.6}) == {
        "exact_match": Score(0.6, None)
    }
    assert (
        lower_is_better("ppl")
        and lower_is_better("word_perplexity")
        and not lower_is_better("acc_norm")
        and not lower_is_better("f1")
    )


def test_comparison_of_best_and_final_scores():
    def one(values, errors, metric="acc", **kw):
        return compare_checkpoints(
            list(range(1, len(values) + 1)), [Score(v, e) for v, e in zip(values, errors)], metric, 0.05, **kw
        )

    assert (
        one([0.2, 0.6, 0.5], [0.01] * 3)["saturates"] is True
        and one([0.2, 0.6, 0.59], [0.01] * 3)["saturates"] is False
    )
    assert one([50, 20, 30], [1] * 3, "ppl")["saturates"] is True and one([30, 20, 10], [1] * 3, "ppl")["drop"] == 0
    unknown = one([0.6, 0.5], [None, None])
    assert unknown["saturates"] is None and unknown["chance"] is None and unknown["verdict"].startswith("no errors")
    assert (
        one([0.5, 0.6], [None, None])["verdict"] == "no significant drop"
        and one([0.6], [0.01])["verdict"] == "a single checkpoint"
    )
    # without errors the scatter of many checkpoints decides
    noisy = [0.60 + 0.002 * (-1) ** i for i in range(20)]
    assert (
        one([*noisy, 0.5], [None] * 21)["saturates"] is True and one([*noisy, 0.599], [None] * 21)["saturates"] is False
    )
    # with two results 2.1 errors suffice; the best of thirty leads by that much by chance
    lucky = [0.5] * 29 + [0.47]
    lucky[10] = 0.50 + 0.0001
    assert one([0.5, 0.47], [0.01] * 2)["saturates"] is True and one(lucky, [0.01] * 30)["saturates"] is False
    # an untrained model may win by always giving one answer, so the warm-up does not count
    early = [0.63, 0.37, 0.38, 0.37]
    assert (
        compare_checkpoints([1, 500, 900, 1000], [Score(v, 0.04) for v in early], "acc", 0.05, skip=0.02)["saturates"]
        is False
    )
    assert compare_checkpoints([1, 500, 900, 1000], [Score(v, 0.04) for v in early], "acc", 0.05)["saturates"] is True


def test_measures_of_bias_get_no_verdict(tmp_path):
    """crows_pairs: neither a larger nor a smaller difference of likelihoods means a better model."""
    for step, difference in ((1, 3.0), (2, 3.2), (3, 4.5)):
        bias = {"likelihood_difference": difference, "likelihood_difference_stderr": 0.05, "pct_stereotype": 0.6}
        old(tmp_path / "m", step, crows_pairs_english=bias, sciq={"acc": 0.9 - 0.1 * step, "acc_stderr": 0.01})
    tasks = run_study(tmp_path / "out", "study=downstream", f"study.results={tmp_path / 'm'}")["tasks"]
    assert tasks["crows_pairs_english"]["saturates"] is None and tasks["sciq"]["saturates"] is True
    assert tasks["crows_pairs_english"]["verdict"] == "no verdict: measures a bias, not quality"
    for metric in ("pct_stereotype", "amb_bias_score", "pct_male_preferred", "likelihood_diff"):
        assert is_bias(metric)
    assert not any(is_bias(metric) for metric in ("acc", "perplexity", "exact_match", "f1", "mc2", "brier_score"))


def test_the_direction_of_a_score_is_the_files_else_the_names(tmp_path):
    """A metric that rises is no drop where lower is better; one whose direction nobody states gets no verdict."""
    for step, value in ((1, 0.2), (2, 0.5), (3, 0.9)):
        (tmp_path / "m").mkdir(exist_ok=True)
        row = {"score,none": value, "score_stderr,none": 0.01}
        content = {
            "results": {"toxicity": row, "novel": row, "calibration": {"ece,none": value, "ece_stderr,none": 0.01}},
            "higher_is_better": {"toxicity": {"score": False}},
        }
        (tmp_path / "m" / f"step{step}.json").write_text(json.dumps(content))
    tasks = run_study(tmp_path / "out", "study=downstream", f"study.results={tmp_path / 'm'}")["tasks"]
    assert tasks["toxicity"]["saturates"] is True and tasks["toxicity"]["lower_is_better"]
    assert tasks["calibration"]["saturates"] is True and tasks["calibration"]["best"]["step"] == 1
    assert tasks["novel"]["saturates"] is None
    assert tasks["novel"]["verdict"] == "no verdict: not known whether a higher score is better"


@pytest.mark.parametrize("points", [7, 11, 20])
@pytest.mark.parametrize("kind", ["normal", "t3", "laplace"])
def test_scores_without_errors_drop_no_more_often_than_asked(points, kind):
    """2,000 flat series, seeds 0 to 3 pooled: the correction accounts for the scatter of a short series and for tails.

    Three standard errors of a share above 5 % are allowed.
    """
    draws = []
    for rng in map(np.random.default_rng, range(4)):
        shape = (500, points)
        draws.append(rng.standard_t(3, shape) if kind == "t3" else getattr(rng, kind)(size=shape))
    series = (0.6 + 0.01 * np.concatenate(draws)).tolist()
    steps = list(range(1, points + 1))
    alarms = sum(compare_checkpoints(steps, [Score(x, None) for x in row], "acc", 0.05)["saturates"] for row in series)
    assert alarms / 2000 <= 0.0646


def test_published_results_of_pythia(tmp_path):
    """LAMBADA's perplexity rises late for 70m and 160m, not for 410m (Godey et al. 2024, Table 1).

    The figures are those that EleutherAI publishes with Pythia (github.com/EleutherAI/pythia, evals, zero-shot), of
    three tasks.
    """
    real = tmp_path / "real"
    for model, steps in json.loads((Path(__file__).parents[1] / "assets" / "pythia_results.json").read_text()).items():
        (real / model).mkdir(parents=True)
        for step, results in steps.items():
            (real / model / f"step{step}.json").write_text(json.dumps({"results": results}))
    c = run_study(tmp_path, "study=downstream", f"study.results={real}", "study.tasks=[lambada_openai,sciq,arc_easy]")
    models = {m["model"]: m["tasks"] for m in c["models"]}
    assert {m: t["lambada_openai"]["saturates"] for m, t in models.items()} == {
        "pythia-70m": True,
        "pythia-160m": True,
        "pythia-410m": False,
    }
    best = models["pythia-160m"]["lambada_openai"]["best"]
    assert best["step"] == 63_000 and best["value"] == pytest.approx(24.84, abs=0.01)
    assert models["pythia-70m"]["sciq"]["saturates"] is True and not any(
        t["saturates"] for t in models["pythia-410m"].values()
    )
    one = run_study(
        tmp_path / "one", "study=downstream", f"study.results={real / 'pythia-70m'}", "study.tasks=lambada_openai"
    )
    assert one["model"] == "pythia-70m" and one["tasks"]["lambada_openai"]["saturates"] is True


def test_folder_layouts_in_use(tmp_path):
    table = {"results": {"sciq": {"acc": 0.5, "acc_stderr": 0.01}}}
    for path in (
        "a/step10/EleutherAI__x/results_2024-01-01T00-00-00.1.json",
        "a/step9/EleutherAI__x/results_2025-01-01T00-00-00.1.json",
        "b/160m_step7.json",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(table))
    got = read_harness_results(tmp_path)
    assert {m: [r.step for r in along] for m, along in got.items()} == {"a/EleutherAI__x": [9, 10], "b": [7]}
    # tasks of one step may be spread over files
    (tmp_path / "b" / "step7-more.json").write_text(json.dumps({"results": {"piqa": {"acc": 0.6}}}))
    assert set(read_harness_results(tmp_path)["b"][0].tasks) == {"sciq", "piqa"}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("step2.json", {"results": {"piqa": {"acc": 0.5}}}, "step2.json: no task sciq in it; it has piqa"),
        ("step2.json", "{", "step2.json: not a result"),
        (
            "step2.json",
            {"results": [1]},
            "step2.json: not a result of lm-evaluation-harness: its results are no tables",
        ),
        ("step2.json", {"results": {"sciq": {"acc": 10**400}}}, "step2.json: acc of sciq is inf"),
        ("final.json", {"results": {"sciq": {"acc": 0.5}}}, "final.json: no step in its name"),
        ("step2.json", {"results": {"sciq": {"f1": 0.5}}}, "no metric that the other steps have too"),
        ("step2.json", {"results": {"sciq": {"acc": float("nan")}}}, "step2.json: acc of sciq is nan"),
        ("again_step1.json", {"results": {"sciq": {"acc": 0.9}}}, "with other numbers"),
    ],
)
def test_bad_results_are_one_line_that_names_the_file(tmp_path, name, content, words):
    old(tmp_path / "m", 1, sciq={"acc": 0.4})
    (tmp_path / "m" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        run_study(tmp_path / "out", "study=downstream", f"study.results={tmp_path / 'm'}", "study.tasks=[sciq]")
    assert words in str(caught.value), str(caught.value)


def test_missing_folders_and_metrics(tmp_path):
    for results, tasks, words in ((tmp_path / "none", "sciq", "no such folder"), (tmp_path, "sciq", "no result files")):
        with pytest.raises(UserError, match=words):
            run_study(tmp_path / "out", "study=downstream", f"study.results={results}", f"study.tasks={tasks}")
    old(tmp_path / "m", 1, sciq={"acc": 0.4})
    with pytest.raises(UserError, match="step1.json: task sciq has no metric acc_nrm; it has acc"):
        run_study(tmp_path / "out", "study=downstream", f"study.results={tmp_path / 'm'}", "study.tasks=sciq:acc_nrm")


def test_models_in_a_flat_folder_are_kept_apart(tmp_path, monkeypatch):
    """The files' contents name the models; files whose contents name none form a model of their own."""
    for name, told, step in (
        ("a", "pretrained=EleutherAI/pythia-70m,revision=step1000,dtype=float", ""),
        ("b", {"pretrained": "EleutherAI/pythia-70m", "revision": "step3000"}, ""),
        ("c", "pretrained=EleutherAI/pythia-160m,revision=step2000", ""),
        ("d", "pretrained=/ckpts/mine/checkpoint-500", ""),
        ("e", "pretrained=/ckpts/mine/checkpoint-900/", ""),
        ("f", "pretrained=/ckpts/other/700", ""),
        ("g", "pretrained=EleutherAI/pythia-160m,peft=me/adapter", "_step5"),
        ("h", "", "_step2500"),
    ):
        table = {
            "results": {"sciq": {"acc": 0.5, "acc_stderr": 0.01}},
            "config": {"model_args": told},
            "model_name": "k3jz81qd",
        }
        (tmp_path / f"results_{name}{step}.json").write_text(json.dumps(table))
    want = {
        "EleutherAI/pythia-70m": [1000, 3000],
        "EleutherAI/pythia-160m": [2000],
        "/ckpts/mine": [500, 900],
        "/ckpts/other": [700],
        "me/adapter": [5],
        tmp_path.name: [2500],
    }
    assert {m: [r.step for r in along] for m, along in read_harness_results(tmp_path).items()} == want
    monkeypatch.chdir(tmp_path)
    assert {m: [r.step for r in along] for m, along in read_harness_results(Path(".")).items()} == want
    (tmp_path / "results_h_step2500.json").write_text(json.dumps(table | {"model_name": "me/named"}))
    assert "me/named" in read_harness_results(tmp_path) and tmp_path.name not in read_harness_results(tmp_path)


def test_text_before_the_step_names_a_model_if_needed(tmp_path):
    """Two names with one task at one step are two models, in a flat folder or as folders; different tasks are one
    model's.
    """
    table = {"results": {"sciq": {"acc": 0.5, "acc_stderr": 0.01}}}
    for root, path in (("flat", "{m}_step{s}.json"), ("dirs", "{m}__step{s}/results_2024-05-01T12-00-00.{s}.json")):
        for m in ("pythia-70m", "pythia-160m"):
            for step in (1000, 2000):
                file = tmp_path / root / path.format(m=m, s=step)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(table | {"m": m}))
        assert {m: [r.step for r in along] for m, along in read_harness_results(tmp_path / root).items()} == {
            "pythia-70m": [1000, 2000],
            "pythia-160m": [1000, 2000],
        }
    for task in ("sciq", "piqa"):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        for step in (1, 2):
            (tmp_path / "tasks" / f"{task}_step{step}.json").write_text(json.dumps({"results": {task: {"acc": 0.5}}}))
    (along,) = read_harness_results(tmp_path / "tasks").values()
    assert [set(r.tasks) for r in along] == [{"sciq", "piqa"}] * 2


def test_steps_in_unusual_places(tmp_path):
    table = {"results": {"sciq": {"acc": 0.5}}}
    for path, told in (
        ("shots/step2000/5/results.json", ""),
        ("k/step1k.json", ""),
        ("k/step143k.json", ""),
        ("mid/a.json", "pretrained=/ck/run/step1000/hf"),
        ("mid/b.json", "pretrained=/ck/12/step2000/hf"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(table | {"config": {"model_args": told}}))
    assert {m: [r.step for r in along] for m, along in read_harness_results(tmp_path).items()} == {
        "shots/5": [2000],
        "k": [1000, 143_000],
        "mid": [1000, 2000],
    }
    assert (
        step_number("step1kernel") == 1
        and step_number("checkpoint-1000") == 1000
        and step_number("12") == 12
        and step_number("x12") is None
    )


def test_missing_errors_follow_from_the_number_of_questions(tmp_path):
    for step, acc in ((1, 0.8), (2, 0.3)):
        content = {
            "results": {"sciq": {"acc,none": acc, "acc_stderr,none": "N/A"}},
            "n-samples": {"sciq": {"original": 400, "effective": 400}},
        }
        (tmp_path / f"step{step}.json").write_text(json.dumps(content))
    t = run_study(tmp_path / "out", "study=downstream", f"study.results={tmp_path}")["tasks"]["sciq"]
    assert (
        t["saturates"] is True
        and t["best"]["stderr"] == pytest.approx(0.02)
        and t["z"] == pytest.approx(0.5 / (0.02**2 + 0.3 * 0.7 / 400) ** 0.5)
    )


def test_old_and_new_names_of_a_metric_are_one_series(tmp_path):
    (tmp_path / "step1.json").write_text(
        json.dumps({"results": {"lambada": {"ppl": 20.0, "ppl_stderr": 0.5, "acc": 0.5}}})
    )
    (tmp_path / "step2.json").write_text(
        json.dumps({"results": {"lambada": {"perplexity,none": 30.0, "perplexity_stderr,none": 0.7, "acc,none": 0.5}}})
    )
    for asked in ("lambada", "lambada:ppl"):
        t = run_study(tmp_path / asked, "study=downstream", f"study.results={tmp_path}", f"study.tasks=['{asked}']")[
            "tasks"
        ][asked]
        assert (
            t["metric"] == "perplexity"
            and t["saturates"] is True
            and t["best"] == {"step": 1, "value": 20.0, "stderr": 0.5}
        )


def test_a_folder_with_files_of_two_models_is_reported(tmp_path, caplog):
    caplog.set_level("WARNING")
    current(tmp_path / "zero-shot", "step1", "01", sciq={"acc": 0.4})
    assert list(read_harness_results(tmp_path)) == ["zero-shot"] and not caplog.records
    other = json.loads(
        next((tmp_path / "zero-shot").iterdir()).read_text().replace("160m", "70m").replace("step1", "step2")
    )
    (tmp_path / "zero-shot" / "other.json").write_text(json.dumps(other))
    assert (
        list(read_harness_results(tmp_path)) == ["zero-shot"]
        and "zero-shot: its files are of EleutherAI/pythia-160m, EleutherAI/pythia-70m" in caplog.text
    )


def test_task_groups_without_numbers_are_skipped(tmp_path):
    """Current versions write such groups; asking for one by name is a one-line error."""
    for step in (1, 2):
        (tmp_path / f"step{step}.json").write_text(
            json.dumps(
                {
                    "results": {
                        "sciq": {"alias": "sciq", "acc,none": 0.5, "acc_stderr,none": 0.01},
                        "bare": {"alias": "bare"},
                        "old": {" ": " ", "alias": "old"},
                        "new": {"name": "new", "alias": "new", "sample_len": 7},
                        "changed": {"acc,none": 0.5} if step == 1 else {"f1,none": 0.5},
                    }
                }
            )
        )
    words = ["study=downstream", f"study.results={tmp_path}"]
    assert list(run_study(tmp_path / "out", *words)["tasks"]) == ["sciq"]
    with pytest.raises(UserError, match="step1.json: task old has no numbers"):
        run_study(tmp_path / "out", *words, "study.tasks=old")
    # a file that has a group's mean beside one that has only its name
    (tmp_path / "step1-more.json").write_text(json.dumps({"results": {"bare": {"acc,none": 0.7}}}))
    assert read_harness_results(tmp_path)[tmp_path.name][0].tasks["bare"] == {"acc": Score(0.7, None)}


def test_other_json_files_are_skipped(tmp_path, caplog):
    """Results of studies are skipped silently, other JSON with a note, so the study can run again in its folder."""
    caplog.set_level("INFO")
    for step in (1, 2):
        old(tmp_path / "m" / f"step{step}", step, sciq={"acc": 0.4, "acc_stderr": 0.01})
    words = ["study=downstream", f"study.results={tmp_path / 'm'}"]
    first = run_study(tmp_path / "m", *words)
    assert "passed over" not in caplog.text
    (tmp_path / "m" / "step2" / "config.json").write_text('{"model_type": "gpt_neox"}')
    (tmp_path / "m" / "list.json").write_text("[1]")
    assert (
        run_study(tmp_path / "m", *words) == first
        and "skipped, without results of lm-evaluation-harness: list.json, step2/config.json" in caplog.text
    )
    for step in (1, 2):
        (tmp_path / "m" / f"step{step}" / f"step{step}.json").unlink()
    with pytest.raises(UserError, match="no results of lm-evaluation-harness there; none of its 3 JSON files has any"):
        run_study(tmp_path / "m", *words)

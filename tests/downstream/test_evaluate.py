"""Scores on tasks: lm-eval's numbers equal log-likelihoods computed by hand; results that exist are kept."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from bottleneck.backbone.model import Backbone
from bottleneck.config.schema import BackboneConfig
from bottleneck.downstream import lm_eval as evaluate
from bottleneck.downstream import scores
from bottleneck.serve import export
from bottleneck.training.finished_run import FinishedRun, open_run
from conftest import ROOT, composed
from support.curves import made
from support.finished import best, finished, heads_loss, row

TASK = ROOT / "tests" / "assets" / "tasks" / "everyday.yaml"
LINES = [json.loads(line) for line in (ROOT / "tests" / "assets" / "tasks" / "everyday.jsonl").read_text().splitlines()]
LIMIT = 8


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Keeps the cache of `datasets` out of the user's folder."""
    import datasets

    old = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = old


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The embedded backbone with rank 64, rank 8, and the SVD's full rank untouched by training: a few seconds."""
    from train import train

    base = tmp_path_factory.mktemp("tiny")
    overrides = [
        "data.block_size=128",
        "data.max_tokens=8000",
        "data.validation_tokens=1000",
        f"data.cache_dir={base / 'cache'}",
        "tokens=1024",
        "batch_size=4",
        "trainer=cpu",
        "trainer.micro_batch_size=4",
        "head=svd",
        "head.calibration_tokens=512",
        "ranks=[8,64,256]",
        "optim.lr=1e-12",
        "trainer.progress=false",
    ]
    return train(composed(overrides), base / "run")


def test_the_embedded_backbones_head(swept, tmp_path):
    """Rank 64 of the embedded backbone, exported: the curve's loss through plain Transformers, and text."""
    to = export.export(open_run(swept.run_dir), best(swept.curve, 64), tmp_path / "e")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(to), AutoTokenizer.from_pretrained(to)
    assert abs(heads_loss(model, swept.trainer.datamodule.validation_batches()) - best(swept.curve, 64)["loss"]) < 1e-5
    prompt = tokenizer("The file is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("The file is") and len(text) > 15


def by_hand(folder: Path, docs: list[dict]) -> dict[str, float]:
    """acc, acc_norm and Brier score of a folder's model, from the log-likelihood of every answer, in plain PyTorch."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    acc = norm = brier = 0.0
    for doc in docs:
        context = f"Question: {doc['question']}\nAnswer:"
        start, scores = len(tokenizer(context)["input_ids"]), []
        for choice in doc["choices"]:
            ids = torch.tensor(tokenizer(f"{context} {choice}")["input_ids"])
            with torch.no_grad():
                logp = model(ids[None]).logits[0].double().log_softmax(-1)
            scores.append(sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids))))
        lengths = torch.tensor([float(len(c)) for c in doc["choices"]])
        p = torch.tensor(scores)
        acc += int(p.argmax()) == doc["answer"]
        norm += int((p / lengths).argmax()) == doc["answer"]
        brier += (p.softmax(0) - torch.eye(len(p))[doc["answer"]]).square().sum().item()
    return {"acc": acc / len(docs), "acc_norm": norm / len(docs), "brier_score": brier / len(docs)}


def results(folder: Path, head: str) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((folder / "evaluate" / head).glob("results_*.json"))]


def test_scores_are_log_likelihoods_by_hand_and_are_kept(swept, tmp_path, caplog):
    caplog.set_level(logging.INFO, "bottleneck")
    folder = shutil.copytree(swept.run_dir, tmp_path / "run")
    given = [str(folder), "--tasks", str(TASK), "--limit", str(LIMIT), "--device", "cpu"]
    assert evaluate.main([*given, "--ranks", "64"]) == 0
    run = open_run(folder)
    export.export(run, run.pick(64), tmp_path / "e64")
    for name, model in (("full", Path(run.backbone.path)), (run.file(run.pick(64)).stem, tmp_path / "e64")):
        (content,) = results(folder, name)
        want = by_hand(model, LINES[:LIMIT])
        got = {k.split(",")[0]: v for k, v in content["results"]["everyday"].items() if "," in k and "stderr" not in k}
        assert got.keys() == want.keys() and all(abs(got[k] - want[k]) < 1e-5 for k in want), (name, got, want)
        # what lm-eval's own command writes
        assert {
            "results",
            "configs",
            "versions",
            "n-shot",
            "config",
            "n-samples",
            "date",
            "lm_eval_version",
            "model_name",
        } <= content.keys()
        assert content["config"]["limit"] == LIMIT and content["n-samples"]["everyday"]["effective"] == LIMIT
        assert content["model_name"] == name

    # a second time nothing is computed; with all ranks, the two that are missing
    caplog.clear()
    assert evaluate.main([*given, "--ranks", "64"]) == 0
    assert caplog.text.count("results exist, skipped") == 2 and len(results(folder, "full")) == 1
    caplog.clear()
    assert evaluate.main(given) == 0
    told = caplog.text
    assert told.count("results exist, skipped") == 2 and told.count("scoring everyday") == 2
    rows = list(csv.DictReader(open(folder / "downstream.csv")))
    assert [r["rank"] for r in rows if r["main"] == "True"] == ["8", "64", "256", ""]
    assert (folder / "downstream.png").read_bytes()[:4] == b"\x89PNG"
    # at r = d the SVD of the original head scores what the backbone scores; at r = 8 it does not
    brier = {r["rank"]: float(r["value"]) for r in rows if r["metric"] == "brier_score"}
    assert abs(brier["256"] - brier[""]) < 1e-4 < abs(brier["8"] - brier[""])

    # another limit, another head file: computed again
    assert evaluate.main([*given[:3], "--limit", "2", "--ranks", "64"]) == 0
    assert len(results(folder, "full")) == 2
    shutil.copy(run.file(run.pick(8)), tmp_path / "old")
    _scale(run.file(run.pick(8)))
    caplog.clear()
    assert evaluate.main([*given, "--ranks", "8"]) == 0
    told = caplog.text
    assert told.count("results exist, skipped") == 1 and told.count("scoring everyday") == 1


def _scale(path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as f:
        tensors, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    save_file({**tensors, "A": tensors["A"] * 2}, path, metadata=about)


def test_heads_that_are_not_scored_are_named(caplog, tmp_path):
    """They were left out of the table without a word."""
    caplog.set_level("INFO")
    c = made({8: 2.5})
    c["heads"].append(c["heads"][0] | {"kind": "gated"})
    assert len(evaluate._chosen(FinishedRun(tmp_path, c, None), None)) == 2
    assert "not one matrix: heads of kind gated" in caplog.text


def test_heads_of_several_kinds_are_told_apart(capsys, monkeypatch):
    """Rows and lines used to be named by the rank alone, so that two kinds of one rank looked like one head."""
    import matplotlib.axes
    import matplotlib.figure

    main = {"task": "t", "metric": "acc", "limit": None, "main": True, "stderr": 0.1, "samples": 4}
    heads = [
        ("full", "", None, 0.9),
        ("r8", "", 8, 0.4),
        ("b_r8", "block bands=2", 8, 0.5),
        ("b_r16", "block bands=2", 16, 0.6),
    ]
    table = [main | {"head": h, "kind": k, "rank": r, "value": v} for h, k, r, v in heads]
    evaluate._show(table, ["t"], None)
    out = capsys.readouterr().out
    assert [line.split("│")[1].strip() for line in out.splitlines() if "0." in line] == [
        "original head", "8", "8 (block bands=2)", "16 (block bands=2)"]  # fmt: skip
    drawn = {}
    monkeypatch.setattr(
        matplotlib.axes.Axes, "errorbar", lambda self, x, y, *a, label, **kw: drawn.update({label: (x, y)})
    )
    scores._draw_task(matplotlib.figure.Figure().subplots(), "t", table, "C0")
    assert drawn == {"t (acc, n = 4)": ([8], [0.4]), "t, block bands=2 (acc, n = 4)": ([8, 16], [0.5, 0.6])}


def test_tasks_in_files_and_folders(tmp_path, monkeypatch):
    """Data files are found beside the task from any folder; tasks of a group are not listed twice."""
    monkeypatch.chdir(tmp_path)
    assert list(evaluate.load_tasks([str(TASK)])) == ["everyday"]
    folder = shutil.copytree(TASK.parent, tmp_path / "mine")
    second = TASK.read_text().replace("task: everyday", "task: second")
    (folder / "second.yaml").write_text(second)
    assert list(evaluate.load_tasks(["mine"])) == ["everyday", "second"]
    (folder / "both.yaml").write_text("group: both\ntask: [everyday, second]\naggregate_metric_list: [{metric: acc}]\n")
    found = evaluate.load_tasks(["mine"])
    assert list(found) == ["both"]
    one = evaluate.load_tasks(["mine/everyday.yaml"])["everyday"]
    print_ = evaluate.fingerprint
    assert print_(one, None) == print_(evaluate.load_tasks([str(TASK)])["everyday"], None) != print_(one, 5)
    (folder / "second.yaml").write_text(second.replace("Question: ", "Q: "))
    assert print_(found["both"], None) != print_(evaluate.load_tasks(["mine"])["both"], None)


BAD = {
    "no lm-eval name": (["--tasks", "everyday.yaml"], "--tasks everyday.yaml: no such file or folder"),
    "empty": (["--tasks", ","], "give at least one task"),
    "no tasks in it": (["--tasks", "EMPTY"], r"no task files (*.yaml) in this folder"),
    "not a task": (["--tasks", "EMPTY/notes.yaml"], "notes.yaml: "),
    "no data": (["--tasks", "EMPTY/lost.yml"], "lost.yml: FileNotFoundError"),
    "twice": (["--tasks", f"{TASK},{TASK.parent}"], "everyday is given twice"),
    "rank": (["--tasks", str(TASK), "--ranks", "7"], "rank 7: "),
    "ranks": (["--tasks", str(TASK), "--ranks", "8,x"], "--ranks x: must be whole numbers"),
    "limit": (["--tasks", str(TASK), "--limit", "0"], "--limit 0: must be at least 1"),
    "batch": (["--tasks", str(TASK), "--batch-size", "0"], "--batch-size 0: must be"),
    "device": (["--tasks", str(TASK), "--device", "abacus"], "--device abacus: not available; allowed are cpu"),
    "backbone": (["--tasks", str(TASK), "--backbone", "/no/such"], "no such folder"),
    "run": (["--tasks", str(TASK), "NOWHERE"], "NOWHERE: no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, swept, tmp_path, capsys, monkeypatch):
    arguments, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "EMPTY"
    empty.mkdir()
    if case != "no tasks in it":
        (empty / "notes.yaml").write_text("[1, 2]")
        (empty / "lost.yml").write_text(TASK.read_text().replace("everyday.jsonl", "gone.jsonl"))
    where = [] if "NOWHERE" in arguments else [str(swept.run_dir)]
    assert evaluate.main([*where, *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and words in lines[0], lines
    assert not (swept.run_dir / "evaluate").exists()


def test_a_missing_lm_eval_is_reported(swept, capsys, monkeypatch):
    real = evaluate.importlib.util.find_spec
    monkeypatch.setattr(
        evaluate.importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a)
    )
    assert evaluate.main([str(swept.run_dir), "--tasks", str(TASK)]) == 2
    assert "pip install -e '.[evaluate]'" in capsys.readouterr().err


def test_full_disk(swept, tmp_path, monkeypatch, capsys):
    """lm-eval's tracker hides errors; they are detected, and an incomplete file is not a result."""
    folder = shutil.copytree(swept.run_dir, tmp_path / "run")
    plain = Path.write_text

    def short(self, text, *args, **kwargs):
        if self.name.startswith("results_"):
            plain(self, text[:50], *args, **kwargs)
            raise OSError(28, "No space left on device", str(self))
        return plain(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", short)
    assert evaluate.main([str(folder), "--tasks", str(TASK), "--limit", "1", "--ranks", "8", "--device", "cpu"]) == 2
    assert "results cannot be written" in capsys.readouterr().err
    assert not list(folder.rglob("results_*")) and not list((folder / "evaluate").glob(".*.part"))


def test_parts_of_killed_commands_are_removed(swept, tmp_path):
    """Those of running processes stay."""
    folder = shutil.copytree(swept.run_dir, tmp_path / "run")
    dead, alive = (folder / "evaluate" / f".full.{pid}.part" for pid in (999999999, os.getppid()))
    for part in (dead, alive):
        (part / "deep").mkdir(parents=True)
    assert evaluate.main([str(folder), "--tasks", str(TASK), "--limit", "1", "--ranks", "8", "--device", "cpu"]) == 0
    assert not dead.exists() and alive.exists()


ROLLING = """task: rolling
dataset_path: json
dataset_kwargs:
  data_files: everyday.jsonl
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
"""


def with_special_tokens(folder: Path, template: str) -> Path:
    """The embedded backbone with a tokenizer that adds end of text in some places."""
    home = ROOT / "data" / "backbones" / "tiny"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).symlink_to(home / name)
    tokenizer = AutoTokenizer.from_pretrained(home)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("front, end", [(True, False), (False, True), (True, True)])
def test_one_beginning_of_text_token(tmp_path, front, end):
    """A tokenizer that adds the token itself, as Llama's: rolling likelihoods and answers have it once, as by hand.

    Regression: with one at the end, as Llama's with `add_eos_token`, answers lost their first token.
    """
    first = "<|endoftext|> " * front
    model = with_special_tokens(tmp_path / "model", first + "$A" + " <|endoftext|>" * end)
    plain, tasks = with_special_tokens(tmp_path / "plain", first + "$A"), tmp_path / "tasks"
    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = tokenizer.bos_token_id
    some = tokenizer("a")["input_ids"]
    assert (some[0] == bos) == front and (some[-1] == bos) == end and some.count(bos) == front + end
    shutil.copytree(TASK.parent, tasks)
    (tasks / "rolling.yaml").write_text(ROLLING)
    backbone = Backbone.load(BackboneConfig(path=str(model)))
    folder = finished(tmp_path / "run", str(model), backbone.vocab_size, backbone.hidden_size, backbone.hash, [row(4)])
    arguments = ["--tasks", f"{TASK},{tasks / 'rolling.yaml'}", "--limit", "4", "--ranks", "4", "--device", "cpu"]
    assert evaluate.main([str(folder), *arguments]) == 0
    (content,) = results(folder, "full")
    bits = size = 0.0
    for doc in LINES[:4]:
        ids = torch.tensor([bos, *tokenizer(doc["question"], add_special_tokens=False)["input_ids"]])
        logp = backbone.head.logits(backbone(ids[None]))[0].double().log_softmax(-1)
        bits -= logp[:-1].gather(1, ids[1:, None]).sum().item() / math.log(2)
        size += len(doc["question"].encode())
    assert abs(content["results"]["rolling"]["bits_per_byte,none"] - bits / size) < 1e-5
    want = by_hand(plain, LINES[:4])
    assert all(abs(content["results"]["everyday"][f"{k},none"] - want[k]) < 1e-5 for k in want)

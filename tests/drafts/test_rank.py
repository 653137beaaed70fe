"""The rank command: acceptances against a computation by hand, the formula, the files, and refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from bottleneck.backbone.model import Backbone
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError
from bottleneck.drafts import rank, steps
from bottleneck.drafts.acceptance import by_frequency, candidates, equal_rows
from bottleneck.drafts.speedup import Best, best_of, speedups
from support.draft_runs import make_target


def test_speedups_are_those_of_leviathan_where_a_pass_takes_as_long_for_every_length():
    """Theorem 3.8: (1 - a^(k+1)) / ((1 - a)(k c + 1)), with a the acceptance and c the draft's share of a pass."""
    a, c = 0.7, 0.1
    accepted = [sum(a**i for i in range(1, k + 1)) for k in range(1, 9)]
    found = speedups(accepted, 0.2, [2.0] * 9)
    for k, s in enumerate(found, start=1):
        assert s == pytest.approx((1 - a ** (k + 1)) / ((1 - a) * (k * c + 1)))
    assert best_of(found) == Best(found.index(max(found)) + 1, max(found))
    assert best_of(speedups(accepted, 20.0, [2.0] * 9)) == Best(0, 1.0)  # a slow draft does not pay


def test_truncated_rows_have_the_bytes_of_a_rank_and_are_the_most_frequent():
    d, V = 64, 8192
    for r in (1, 4, 16, 48):
        K = equal_rows(r, d, V)
        assert 0 <= r * (V + d) - K * d < d
    text = torch.tensor([5, 3, 5, 2, 3, 5, 0]).numpy()
    assert by_frequency(text, 7).tolist() == [5, 3, 0, 2, 1, 4, 6]


def test_the_head_of_a_rank_is_the_one_that_this_target_accepts_most():
    def head(lr, loss, acceptance, status="ok"):
        return {"init": "fisher", "rank": 8, "lr": lr, "loss": loss, "acceptance": acceptance, "status": status}

    heads = [head(1, 3.0, 0.4), head(2, 3.2, 0.5), head(3, None, None, "diverged")]
    curve = {"heads": heads, "target": {"hash": "a"}}
    assert candidates(curve, "a") == heads[1:2]
    assert candidates(curve, "b") == candidates({"heads": heads}, "a") == heads[:1]
    assert len(candidates({"heads": [*heads, {**heads[0], "rank": 4}]}, "b")) == 2


@pytest.fixture
def swept(run, toy_backbone, tmp_path, monkeypatch):
    """A run taught by a target, and the target; times are measured once."""
    monkeypatch.setattr(steps, "REPEATS", 1)
    target = make_target(toy_backbone, tmp_path / "wide")
    run("ranks=[2,8]", "objective=lk", f"head.teacher=model:{target}", "tokens=2048", "optim.lr=1e-2")
    return tmp_path / "run", target


def test_the_command_measures_what_the_run_measured_and_writes_three_files(swept, capsys):
    folder, target = swept
    argv = [str(folder), "--target", str(target), "--context", "8", "--threads", "1", "--batch", "2", "1"]
    content = rank.command(argv)
    curve = json.loads((folder / "curve.json").read_text())
    by_name = {row["head"]: row for row in content["heads"]}
    for h, name in zip(curve["heads"], by_name):
        row = by_name[name]
        assert row["rank"] == h["rank"] and row["trained"] and row["bytes"] == 2 * h["parameters"]
        assert [row["acceptance"], *row["accepted"]] == pytest.approx(
            [h["acceptance"], *(h[f"accepted_{k}"] for k in range(1, 9))], abs=1e-6
        )
    original = by_name["original head"]
    assert original["accepted"][7] == pytest.approx(curve["target"]["original"]["accepted_8"], abs=1e-6)
    rivals = [row for row in content["heads"] if row["kind"] == "truncated"]
    assert [row["rank"] for row in rivals] == [2, 8] and not any(row["trained"] for row in rivals)
    assert all(0 <= h["parameters"] * 2 - row["bytes"] < 64 for h, row in zip(curve["heads"], rivals))
    for row in content["heads"]:
        for batch, found in row["batches"].items():
            at = content["steps"][batch]
            draft = at["draft_body_s"] + found["head_s"]
            assert found["speedup"] == speedups(row["accepted"], draft, at["target_s"])
    assert list(content["steps"]) == ["1", "2"] and set(content["best"]) == {"1", "2"}
    assert json.loads((folder / "rank" / "rank.json").read_text()) == content
    assert len((folder / "rank" / "rank.csv").read_text().splitlines()) == 1 + len(content["heads"])
    assert (folder / "rank" / "rank.png").read_bytes()[:4] == b"\x89PNG"
    assert "ship" in capsys.readouterr().out or None in content["best"].values()


def test_a_rivals_acceptance_by_hand(swept):
    """The truncated head of a rank's bytes: the original head's softmax over the most frequent tokens of the text."""
    from bottleneck.data.module import ValidationBlocks
    from bottleneck.data.prepare import prepare
    from bottleneck.training.finished_run import open_run, stored_data

    folder, target = swept
    run = open_run(folder)
    content = rank.evaluate(run, str(target), batches=[1], context=8, threads=1)
    draft, judge = (Backbone.load(BackboneConfig(path=str(p))) for p in (run.backbone.path, target))
    corpus = prepare(stored_data(folder), rank.load_tokenizer(run.backbone))
    kept = by_frequency(corpus.train, 320)[: equal_rows(2, 32, 320)]
    total = count = 0
    for ids, y in ValidationBlocks(corpus, 64, None):
        p = torch.softmax(judge.head.float_logits(judge(ids[None])[0])[:, :320], -1)[:, kept]
        q = torch.softmax(draft.head.float_logits(draft(ids[None])[0])[:, kept], -1)
        total, count = total + torch.minimum(p, q).sum(-1)[y != -100].sum().item(), count + int((y != -100).sum())
    (row,) = [row for row in content["heads"] if row["kind"] == "truncated" and row["rank"] == 2]
    assert row["acceptance"] == pytest.approx(total / count, abs=1e-5)


def test_documents_are_kept_apart_as_in_the_run(run, toy_backbone, tmp_path, monkeypatch):
    """Draft and target then read each document of a block alone; the command used to read joined text."""
    from bottleneck.data.module import ValidationBlocks
    from bottleneck.data.prepare import prepare
    from bottleneck.training.finished_run import open_run, stored_data

    monkeypatch.setattr(steps, "REPEATS", 1)
    target = make_target(toy_backbone, tmp_path / "wide")
    apart = ("data.mask_documents=true", "data.reset_positions=true", "data.validation_fraction=0.2")
    run("ranks=[2]", "tokens=1024", "data.block_size=64", *apart)
    finished = open_run(tmp_path / "run")
    content = rank.evaluate(finished, str(target), batches=[1], context=8, threads=1)
    draft, judge = (Backbone.load(BackboneConfig(path=str(p))) for p in (finished.backbone.path, target))
    head = finished.head(finished.pick(2))
    corpus = prepare(stored_data(finished.folder), rank.load_tokenizer(finished.backbone))
    eos, total, count, cuts = int(corpus.manifest["eos"]), 0.0, 0, 0
    for ids, y in ValidationBlocks(corpus, 64, None):
        begins = [0, *(i for i in (ids == eos).nonzero().flatten().tolist() if i > 0), len(ids)]
        cuts += len(begins) - 2
        for a, b in zip(begins, begins[1:]):
            p = torch.softmax(judge.head.float_logits(judge(ids[None, a:b])[0])[:, :320], -1)
            q = torch.softmax(head.logits(draft(ids[None, a:b])[0]), -1)
            keep = y[a:b] != -100
            total, count = total + torch.minimum(p, q).sum(-1)[keep].sum().item(), count + int(keep.sum())
    assert cuts > 3 and content["heads"][0]["acceptance"] == pytest.approx(total / count, abs=1e-5)


def test_what_does_not_fit_is_refused_in_one_line(swept, toy_backbone, tmp_path, monkeypatch):
    folder, target = swept
    with pytest.raises(UserError, match="--batch 0: must be at least 1"):
        rank.command([str(folder), "--target", str(target), "--batch", "0"])
    monkeypatch.setattr(Backbone, "load", lambda *a, **k: pytest.fail("weights were loaded"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copytree(target, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{")
    allowed = "give a Hub name, a model's folder or a .gguf file"
    for name, said in (
        ("none", "no such folder"),
        ("none.gguf", "no such file"),
        ("bare", f"no config.json there; {allowed}"),
        ("file", f"is a file; {allowed}"),
        ("damaged", "cannot load its "),
    ):
        given = tmp_path / name
        with pytest.raises(UserError, match=f"^--target {given}: {said}"):
            rank.command([str(folder), "--target", str(given)])
    with pytest.raises(UserError, match="^--target : is empty"):
        rank.command([str(folder), "--target", ""])
    curve = json.loads((folder / "curve.json").read_text())
    (folder / "curve.json").write_text(json.dumps({**curve, "data_hash": "0"}))
    with pytest.raises(UserError, match="the text of data.files is not that of the run any more"):
        rank.command([str(folder), "--target", str(target)])

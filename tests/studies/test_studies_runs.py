"""The studies on models: series of checkpoints, resuming, and every number against a direct computation."""

from __future__ import annotations

import csv
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bottleneck.backbone.model import Backbone
from bottleneck.studies import spectrum
from bottleneck.studies.formulas.cosines import brute_force
from bottleneck.studies.measure import saturation
from bottleneck.studies.measure.spectrum import spectra
from bottleneck.studies.shared import loading, series
from bottleneck.studies.shared.config import check_study
from bottleneck.studies.shared.text import study_text
from support.study_runs import QUICK, composed, run_study, toy_series

NOISES = {"step0": 2.0, "step20": 0.1, "step100": 0.0, "step1000": 0.7}  # ordered by number, not by name


@pytest.fixture(scope="module")
def steps(toy_backbone, tmp_path_factory):
    return toy_series(toy_backbone, tmp_path_factory.mktemp("series") / "toy", NOISES)


@pytest.fixture(scope="module")
def quick(toy_text, tmp_path_factory):
    return [
        *QUICK,
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "backbone=local",
    ]


@pytest.fixture(scope="module")
def text(quick, toy_backbone):
    """The text that the studies read, and the toy's hidden states and targets on it."""
    c = check_study(composed("study=spectrum", *quick, f"backbone.path={toy_backbone}"))
    backbone = Backbone.load(c.backbone)
    pairs = [(backbone(x).flatten(0, 1), y.flatten()) for x, y in study_text(c, series.checkpoints(c)).batches(4)]
    h, y = torch.cat([h for h, _ in pairs]), torch.cat([y for _, y in pairs])
    return h[y >= 0], y[y >= 0]


def head_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_output_embeddings().weight.detach()


# ---------------------------------------------------------------- saturation
def test_losses_along_a_series_equal_direct_computation(tmp_path, quick, steps, text):
    c = run_study(tmp_path, "study=saturation", f"backbone.path={steps}", *quick)
    (m,) = c["models"]
    assert c["tokens"] == 1500 == len(text[1]) and [p["step"] for p in m["checkpoints"]] == [0, 20, 100, 1000]
    for p in m["checkpoints"]:  # only the heads differ
        want = torch.nn.functional.cross_entropy(text[0] @ head_of(steps / f"step{p['step']}").T, text[1])
        assert p["loss"] == pytest.approx(want.item(), rel=1e-4) and 0 < p["stderr"] < 0.3 * p["loss"]
    assert m["best"]["step"] == min(m["checkpoints"], key=lambda p: p["loss"])["step"] and c["fit"] is None
    rows = list(csv.DictReader(open(tmp_path / "saturation.csv")))
    assert [float(r["loss"]) for r in rows] == [p["loss"] for p in m["checkpoints"]]


@pytest.mark.slow
def test_an_interrupted_series_resumes_with_the_same_result(tmp_path, quick, steps, monkeypatch):
    whole = run_study(tmp_path / "whole", "study=saturation", f"backbone.path={steps}", *quick)
    visited = []
    real = saturation.visit

    def stops(cp, *args):
        visited.append(cp.step)
        if len(visited) == 3:
            raise KeyboardInterrupt
        return real(cp, *args)

    monkeypatch.setattr(saturation, "visit", stops)
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path / "cut", "study=saturation", f"backbone.path={steps}", *quick)
    assert not (tmp_path / "cut" / "saturation.json").exists()
    assert run_study(tmp_path / "cut", "study=saturation", f"backbone.path={steps}", *quick) == whole
    assert visited == [0, 20, 100, 100, 1000]
    with pytest.raises(Exception, match="was computed with tokens 1500, now it is 700; give another hydra.run.dir"):
        run_study(tmp_path / "cut", "study=saturation", f"backbone.path={steps}", *quick, "tokens=700")


@pytest.mark.slow
def test_a_series_holds_one_model_at_a_time(tmp_path, quick, steps, monkeypatch):
    alive: list = []
    real = loading.Backbone.load

    def load(*args):
        assert not [ref for ref in alive if ref() is not None], "the checkpoint before is still in memory"
        backbone = real(*args)
        alive.append(weakref.ref(backbone))
        return backbone

    monkeypatch.setattr(loading.Backbone, "load", load)
    for study in ("saturation", "spectrum", "anisotropy"):
        run_study(tmp_path / study, f"study={study}", f"backbone.path={steps}", *quick, "tokens=200")
    assert len(alive) == 12


def test_several_models_and_one_checkpoint(tmp_path, quick, steps):
    c = run_study(
        tmp_path,
        "study=saturation",
        f"study.models=[{steps / 'step20'},{steps / 'step100'}]",
        "backbone.path=unused",
        *quick,
    )
    assert [m["model"] for m in c["models"]] == ["step20", "step100"] and all(
        m["saturates"] is None for m in c["models"]
    )
    chosen = check_study(composed("study=saturation", f"backbone.path={steps}", "study.steps=[20,1000]", *quick))
    assert [cp.step for cp in series.checkpoints(chosen)] == [20, 1000]
    hub = check_study(composed("study=saturation", "backbone=pythia-160m", "study.steps=pythia", "data=pile"))
    found = series.checkpoints(hub)
    assert (
        len(found) == 154
        and found[11].backbone.revision == "step1000"
        and found[-1].step == 143_000
        and found[-1].label == "pythia-160m@step143000"
    )
    assert hub.data.block_size == 512 and hub.data.max_tokens == 50_000


# ---------------------------------------------------------------- spectrum
@pytest.mark.slow
def test_spectra_along_a_series(tmp_path, quick, steps, text):
    c = run_study(tmp_path, "study=spectrum", f"backbone.path={steps}", *quick)
    h = text[0].double()
    root = torch.linalg.cholesky(
        h.T @ h / len(h) + 1e-12 * torch.eye(32, dtype=torch.float64)
    )  # another root: the same singular values
    for e in c["checkpoints"]:
        W = head_of(steps / f"step{e['step']}").double()
        for name, M in (("head", W), ("weighted", W @ root)):
            S = torch.linalg.svdvals(M)
            assert torch.allclose(
                torch.tensor(e[name]["singular_values"], dtype=torch.float64), S, rtol=1e-3, atol=1e-4 * S[0].item()
            )


def test_hidden_false_reads_the_head_alone(tmp_path, quick, steps, monkeypatch, caplog):
    def never(*_):
        raise AssertionError("the whole model was loaded")

    with_text = run_study(tmp_path / "a", "study=spectrum", f"backbone.path={steps}", *quick)
    monkeypatch.setattr(loading.Backbone, "load", never)
    c = run_study(tmp_path / "b", "study=spectrum", f"backbone.path={steps}", "study.hidden=false", *quick)
    for a, b in zip(with_text["checkpoints"], c["checkpoints"]):
        assert b["head"]["entropy"] == pytest.approx(a["head"]["entropy"], rel=1e-9) and "weighted" not in b
    # errors elsewhere in the model are not noticed; a warning says so once
    caplog.set_level("INFO")
    shutil.copytree(steps / "step20", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    save_file(
        {k: v if k == "embed_out.weight" else v * float("nan") for k, v in tensors.items()},
        tmp_path / "bad" / "model.safetensors",
        metadata={"format": "pt"},
    )
    c = run_study(
        tmp_path / "c",
        "study=spectrum",
        f"study.models=[{steps / 'step20'},{tmp_path / 'bad'}]",
        "backbone.path=unused",
        "study.hidden=false",
        *quick,
    )
    assert (
        c["checkpoints"][0]["head"] == c["checkpoints"][1]["head"]
        and caplog.text.count("only the head is read; the other weights are not looked at") == 1
    )


def test_padding_is_reported_and_dropped(tmp_path, quick, toy_backbone, toy_text):
    """A head padded from 320 to 384 rows: padding is reported, and left out of the spectrum on request."""
    model = AutoModelForCausalLM.from_pretrained(toy_backbone)
    model.resize_token_embeddings(384, mean_resizing=False)
    model.get_output_embeddings().weight.data[320:] *= 5
    folder = toy_series(toy_backbone, tmp_path / "p", {"padded": 0.0}) / "padded"
    model.save_pretrained(folder)
    kept = run_study(tmp_path / "kept", "study=spectrum", f"backbone.path={folder}", *quick)["checkpoints"][0]
    dropped = run_study(
        tmp_path / "dropped", "study=spectrum", f"backbone.path={folder}", "study.drop_padding=true", *quick
    )["checkpoints"][0]
    assert (
        kept["padding"]["rows"] >= 64
        and kept["padding"]["mean_norm"] > kept["padding"]["mean_norm_tokens"]
        and kept["rows"] == 384
    )
    assert dropped["rows"] == 384 - kept["padding"]["rows"] and dropped["head"]["energy"] < kept["head"]["energy"]
    entries = dropped["rows"]
    assert dropped["head"]["energy"] == pytest.approx(
        head_of(folder)[:entries].double().square().sum().item(), rel=1e-6
    )


def test_tied_heads_are_read_from_the_embeddings(tmp_path, toy_backbone):
    folder = toy_series(toy_backbone, tmp_path, {"tied": 0.0}) / "tied"
    for file in ("model.safetensors", "config.json"):
        (folder / file).unlink()
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(shape)
    model.save_pretrained(folder)
    c = check_study(composed("study=spectrum", "backbone=local", f"backbone.path={folder}", "study.hidden=false"))
    (cp,) = series.checkpoints(c)
    head = loading.load_head(cp, series.check_same_shapes([cp]))
    assert head.tied and torch.equal(head.W_VD, model.get_input_embeddings().weight)
    assert spectra(head, None, False, None)["tied"] is True


# ---------------------------------------------------------------- anisotropy
def test_cosines_of_every_layer_equal_those_of_all_pairs(tmp_path, quick, steps):
    c = run_study(tmp_path, "study=anisotropy", f"backbone.path={steps}", *quick, "tokens=300")
    want = check_study(composed("study=anisotropy", *quick, f"backbone.path={steps}", "tokens=300"))
    batches = list(study_text(want, series.checkpoints(want)).batches(4))
    for e in (c["checkpoints"][0], c["checkpoints"][-1]):
        model = AutoModelForCausalLM.from_pretrained(steps / f"step{e['step']}", dtype=torch.float32).eval()
        with torch.no_grad():
            out = [model(x, output_hidden_states=True) for x, _ in batches]
        for x in e["layers"]:
            h = torch.cat([o.hidden_states[x["layer"]][y >= 0] for o, (_, y) in zip(out, batches)])
            assert len(h) == 300 and x["mean_cosine"] == pytest.approx(brute_force(h), abs=1e-6)
            assert x["mean_cosine_centred"] == pytest.approx(brute_force(h - h.mean(0)), abs=1e-5) and x[
                "mean_norm"
            ] == pytest.approx(h.norm(dim=1).mean().item(), rel=1e-5)
        logits = torch.cat([o.logits[y >= 0] for o, (_, y) in zip(out, batches)])
        y = torch.cat([y[y >= 0] for _, y in batches])
        assert e["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-4)
    assert [x["layer"] for x in c["checkpoints"][0]["layers"]] == [0, 1, 2] and isinstance(
        c["checkpoints"][0]["reading"], str
    )


# ---------------------------------------------------------------- estimate and theory
def test_the_estimate_is_what_training_starts_from(tmp_path, run, toy):
    """The loss of every start equals that of train.py before its first step."""
    text = [o for o in toy if o.startswith(("backbone", "data"))]
    c = run_study(
        tmp_path / "e",
        "study=estimate",
        *text,
        "tokens=100000",
        "study.ranks=[2,8,32]",
        "study.calibration_tokens=1024",
        "trainer=cpu",
        "trainer.micro_batch_size=4",
        "trainer.progress=false",
    )
    by = {(h["init"], h["rank"]): h for h in c["heads"]}
    for init in ("fisher", "refined", "svd", "scaled"):
        curve = run(f"head.init={init}", "tokens=512", run_dir=tmp_path / init).curve
        assert c["reference"]["loss"] == pytest.approx(curve["reference"]["loss"], rel=1e-5)
        for h in curve["heads"]:
            assert by[init, h["rank"]]["loss"] == pytest.approx(h["initial_loss"], rel=1e-4), (init, h["rank"])
    full = by["fisher", 32]
    assert full["kl"] == pytest.approx(0, abs=1e-6) and full["top1_agreement"] > 0.999 and full["acceptance"] > 0.999
    assert (
        by["refined", 2]["kl"] <= by["fisher", 2]["kl"] + 1e-6
        and by["fisher", 2]["kl"] > by["fisher", 8]["kl"] > full["kl"]
    )


def test_trained_heads_are_compared(tmp_path, run, toy):
    text = [o for o in toy if o.startswith(("backbone", "data"))]
    curve = run("ranks=[2,8,32]", run_dir=tmp_path / "run").curve
    shared = [
        *text,
        f"study.curve={tmp_path / 'run'}",
        "tokens=2000",
        "study.ranks=[2,8]",
        "trainer=cpu",
        "trainer.progress=false",
    ]
    c = run_study(tmp_path / "e", "study=estimate", "study.inits=[fisher]", *shared)
    assert [h["trained_loss"] for h in c["heads"]] == [h["loss"] for h in curve["heads"]] and c["trained"][
        "tokens"
    ] == 10240  # the curve's ranks are added
    gaps = [run["heads"][0]["loss"] - run["reference"]["loss"] for run in (c, curve)]
    assert c["heads"][0]["excess"] == pytest.approx(gaps[0] - gaps[1])
    t = run_study(tmp_path / "t", "study=theory", *shared)
    reference = min(curve["reference"]["loss"], curve["heads"][2]["loss"])
    assert t["holds"] is True and [row["rank"] for row in t["ranks"]] == [2, 8, 32]
    for row, h in zip(t["ranks"], curve["heads"]):
        assert row["trained_gap"] == pytest.approx(h["loss"] - reference) and row["kl_truncated"] <= row["bound"] + 1e-5
    assert t["ranks"][0]["bound"] > t["ranks"][1]["bound"] > 100 * t["ranks"][2]["bound"] >= 0
    run_study(
        tmp_path / "run", "study=theory", *shared[:-4], f"study.curve={tmp_path / 'run' / 'curve.json'}", *shared[-3:]
    )  # into the run's own folder
    other = json.loads((tmp_path / "run" / "curve.json").read_text()) | {"backbone_hash": "0" * 16}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(Exception, match="no curve of toy there"):
        run_study(tmp_path / "x", "study=theory", *shared, f"study.curve={tmp_path / 'other.json'}")


def test_all_result_files_are_written_or_none(tmp_path, quick, steps, monkeypatch):
    """If the picture cannot be drawn, neither JSON nor CSV is written; partial results are kept."""

    def broken(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr(spectrum, "draw", broken)
    with pytest.raises(RuntimeError):
        run_study(tmp_path, "study=spectrum", f"backbone.path={steps}", "study.hidden=false", *quick)
    assert not (tmp_path / "spectrum.json").exists() and len(list((tmp_path / "spectrum.parts").glob("*.json"))) == 4

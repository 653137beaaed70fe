"""Bad input of export: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bottleneck.backbone.model import Backbone, load_model
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.run_file import RUN_FILE
from bottleneck.serve import export
from bottleneck.serve.arguments import FORMS
from conftest import VOCAB
from support.finished import finished, row
from support.finished import swept as swept  # a fixture


def _rewrite(change):
    def apply(folder: Path) -> None:
        content = json.loads((folder / "curve.json").read_text())
        change(content)
        (folder / "curve.json").write_text(json.dumps(content))

    return apply


def _heads(make):
    def apply(folder: Path) -> None:
        for path in (folder / "heads").glob("r8_*.safetensors"):
            make(path)

    return apply


def _resaved(change, about=None):
    def make(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=about or {"bottleneck": json.dumps({"backbone_hash": "DIGEST"})})

    return _heads(make)


def _without_run_file(folder: Path) -> None:
    """Make the folder look like one of an earlier version."""
    (folder / RUN_FILE).unlink()


def _diverge(content):
    for h in content["heads"]:
        h.update(status="diverged", loss=None, perplexity=None, bits_per_byte=None, best=False) if h[
            "rank"
        ] == 8 else None


def _one_rate_diverged(content):
    for h in content["heads"]:
        h.update(status="diverged", loss=None, perplexity=None, bits_per_byte=None, best=False) if h["rank"] == 8 and h[
            "lr"
        ] == 0.01 else None


BAD = {
    "one rate": (
        _rewrite(_one_rate_diverged),
        ["--lr", "0.01"],
        r"rank 8, lr 0.01: diverged .* ranks that did not diverge: .*8 \(lr 0.001\)",
    ),
    "no folder": (lambda f: shutil.rmtree(f), [], "no such folder"),
    "a file": (lambda f: (shutil.rmtree(f), f.touch()), [], "is a file; give the folder of the run"),
    "no curve": (lambda f: (f / "curve.json").unlink(), [], "no curve.json there; give the folder of a finished run"),
    "not json": (lambda f: (f / "curve.json").write_text("{"), [], "not a curve of bottleneck"),
    "merged": (_rewrite(lambda c: c.update(curves=[dict(c), dict(c)])), [], "merged curve"),
    "rank": (lambda f: None, ["--rank", "9"], "rank 9: .* has no such head; its ranks are 2, 8, 32"),
    "lr": (lambda f: None, ["--lr", "0.5"], "--lr 0.5: rank 8 .* it has lr 0.001, 0.01"),
    "seed": (lambda f: None, ["--seed", "4"], "--seed 4: rank 8 .* it has seed 0"),
    "word": (lambda f: None, ["--rank", "many"], "argument --rank: invalid int value"),
    "form": (lambda f: None, ["--form", "thin"], "argument --form: invalid choice"),
    "diverged": (
        _rewrite(_diverge),
        [],
        r"rank 8: diverged .* ranks that did not diverge: 2 \(lr 0.001\), 2 \(lr 0.01\), 32",
    ),
    "head missing": (_heads(Path.unlink), [], "r8_lr.*safetensors: no such file"),
    "head junk": (_heads(lambda p: p.write_bytes(b"junk")), [], "damaged or not a head file"),
    "head cut": (_heads(lambda p: p.write_bytes(p.read_bytes()[:-100])), [], "damaged or not a head file"),
    "head foreign": (_resaved(lambda t: None, {"format": "pt"}), [], "not a head file of bottleneck"),
    "head of another": (_resaved(lambda t: None), [], "a head of backbone DIGEST"),
    "head shape": (
        _resaved(lambda t: t.update(A=t["A"][:-1].clone())),
        [],
        "A and B are .319, 8. and .8, 32., curve.json says",
    ),
    "checkpoint": (
        lambda f: (_without_run_file(f), (f / "checkpoints" / "last.ckpt").write_bytes(b"junk")),
        [],
        "last.ckpt: damaged or not a checkpoint",
    ),
    "no config": (
        lambda f: (_without_run_file(f), shutil.rmtree(f / "checkpoints")),
        [],
        "checkpoints/last.ckpt or .hydra/config.yaml, so the path of the backbone is unknown",
    ),
    "moved": (lambda f: None, ["--backbone", "/no/such/folder"], "no such folder"),
    "changed": (
        _rewrite(lambda c: None),
        ["--backbone", "OTHER"],
        "its weights are .* were trained on .* it has changed",
    ),
    "changed factored": (_rewrite(lambda c: None), ["--backbone", "OTHER", "--form", "factored"], "it has changed"),
    "full target": (lambda f: None, ["--to", "FULL"], "exists and is not empty"),
    "file target": (lambda f: None, ["--to", "FULL/x"], "exists and is not empty"),
    "target in a file": (lambda f: None, ["--to", "FULL/x/y"], "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, swept, toy_backbone, tmp_path, capsys):
    spoil, arguments, words = BAD[case]
    folder = shutil.copytree(swept.run_dir, tmp_path / "run")
    other, full = tmp_path / "other", tmp_path / "full"
    if "OTHER" in arguments:
        model = AutoModelForCausalLM.from_pretrained(toy_backbone)
        with torch.no_grad():
            model.get_input_embeddings().weight[7, 3] += 1
        model.save_pretrained(other)
        AutoTokenizer.from_pretrained(toy_backbone).save_pretrained(other)
    full.mkdir()
    (full / "x").write_text("kept")
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    places = {"OTHER": str(other)}
    arguments = [places.get(a, a.replace("FULL", str(full))) for a in arguments]
    given = ["--rank", "8", "--to", str(tmp_path / "new" / "deep"), *arguments]  # the last of two options counts
    assert export.main([str(folder), *given]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "error" in line]
    assert len(lines) == 1 and "Traceback" not in err
    assert re.search(words, lines[0]), lines[0]
    assert sorted(tmp_path.rglob("*")) == before and (full / "x").read_text() == "kept"


@pytest.mark.parametrize("form", FORMS)
def test_full_disk(form, swept, tmp_path, capsys):
    """A limit on the size of files stands for a full disk; the system's message is repeated."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        code = export.main([str(swept.run_dir), "--rank", "8", "--to", str(tmp_path / "e"), "--form", form])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert code == 2 and "cannot be written" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_values_that_a_dtype_cannot_hold(toy_backbone, tmp_path, capsys):
    digest = Backbone(load_model(BackboneConfig(path=str(toy_backbone))), "toy").hash
    folder = finished(tmp_path / "run", str(toy_backbone), VOCAB, 32, digest, [row(4)])
    path = next((folder / "heads").iterdir())
    tensors = load_file(path)
    tensors["A"][0, 0] = 1e6
    save_file(tensors, path, metadata={"bottleneck": json.dumps({"backbone_hash": digest})})
    for form in FORMS:
        assert (
            export.main([str(folder), "--rank", "4", "--to", str(tmp_path / "e"), "--dtype", "float16", "--form", form])
            == 2
        )
        assert "wider" in capsys.readouterr().err and not (tmp_path / "e").exists()
    for dtype in ("float16", "bfloat16"):  # values within range are written
        to = tmp_path / dtype
        tensors["A"][0, 0] = 1.0
        save_file(tensors, path, metadata={"bottleneck": json.dumps({"backbone_hash": digest})})
        assert export.main([str(folder), "--rank", "4", "--to", str(to), "--dtype", dtype]) == 0
        model = AutoModelForCausalLM.from_pretrained(to)
        assert str(model.dtype) == f"torch.{dtype}" and torch.equal(
            model.get_output_embeddings().weight, (tensors["A"] @ tensors["B"]).to(model.dtype)
        )
    tensors["A"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"bottleneck": json.dumps({"backbone_hash": digest})})
    assert export.main([str(folder), "--rank", "4", "--to", str(tmp_path / "e")]) == 2
    assert "not finite" in capsys.readouterr().err


def test_a_multiruns_folder_names_a_job(swept, tmp_path, capsys):
    shutil.copytree(swept.run_dir, tmp_path / "sweep" / "0")
    assert export.main([str(tmp_path / "sweep"), "--rank", "8", "--to", str(tmp_path / "e")]) == 2
    assert "of a multirun give one job's folder, such as" in capsys.readouterr().err


def test_parts_of_killed_exports_are_removed(swept, tmp_path):
    """Partial folders are named after their target and process; those of running processes stay."""
    dead, alive, other = (
        tmp_path / name for name in (".head.999999999.part", f".head.{os.getppid()}.part", ".head.v2.999999999.part")
    )
    for part in (dead, alive, other):
        part.mkdir()
    assert export.main([str(swept.run_dir), "--rank", "8", "--to", str(tmp_path / "head"), "--form", "factored"]) == 0
    assert not dead.exists() and alive.exists() and other.exists()

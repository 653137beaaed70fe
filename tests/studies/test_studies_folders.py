"""Unusual folders: heads of zeros, NaN weights, trainers' checkpoints, tensors that contradict the config."""

from __future__ import annotations

import json
import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bottleneck.core.errors import UserError
from bottleneck.studies.shared.config import check_study
from bottleneck.studies.shared.series import one_checkpoint
from support.study_runs import QUICK, composed, edit_head, run_study, toy_series

SERIES = ("saturation", "spectrum", "anisotropy")
ALL = (*SERIES, "estimate", "gradient", "theory")


@pytest.fixture(scope="module")
def quick(toy_text, tmp_path_factory):
    return [
        *QUICK,
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "backbone=local",
    ]


def few(name: str) -> list[str]:
    return {
        "estimate": ["study.ranks=[4]", "study.inits=[fisher]", "study.calibration_tokens=256"],
        "gradient": ["study.ranks=[4]", "study.calibration_tokens=256"],
        "theory": ["study.ranks=[4]"],
    }.get(name, [])


@pytest.fixture
def model(toy_backbone, tmp_path):
    return shutil.copytree(toy_backbone, tmp_path / "model")


@pytest.mark.parametrize("name", ALL)
def test_a_head_of_zeros_is_accepted(tmp_path, quick, model, name):
    """A checkpoint at step 0 may have one."""
    edit_head(model, torch.zeros_like)
    content = run_study(tmp_path / "out", f"study={name}", *quick, *few(name), f"backbone.path={model}")
    if name == "saturation":
        assert content["models"][0]["final"]["loss"] == pytest.approx(math.log(320), rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_nan_embeddings_are_one_line(tmp_path, quick, model, name):
    tensors = load_file(model / "model.safetensors")
    (key,) = [k for k in tensors if k.endswith(("embed_in.weight", "embed_tokens.weight"))]
    tensors[key][:200] = math.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not (a )?number"):
        run_study(tmp_path / "out", f"study={name}", *quick, *few(name), f"backbone.path={model}")


def test_nan_weights_in_a_bin_file_are_one_line(tmp_path, quick, model):
    """The error is one line that names the weights, not the family."""
    tensors = load_file(model / "model.safetensors")
    for key in tensors:
        if "dense" in key:
            tensors[key].fill_(math.nan)
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"backbone model: 1024 of the weights \S+dense\S+ are not usable numbers"):
        run_study(tmp_path / "out", "study=saturation", *quick, f"backbone.path={model}")


def test_a_model_folder_with_checkpoints_below_is_the_model(tmp_path, quick, model, caplog):
    caplog.set_level(logging.INFO)
    for step in (500, 1000):
        shutil.copytree(model, tmp_path / f"c{step}")
    for step in (500, 1000):
        shutil.move(tmp_path / f"c{step}", model / f"checkpoint-{step}")
    assert one_checkpoint(
        check_study(composed("study=estimate", *quick, f"backbone.path={model}"))
    ).backbone.path == str(model)
    content = run_study(tmp_path / "out", "study=spectrum", "study.hidden=false", *quick, f"backbone.path={model}")
    assert [e["step"] for e in content["checkpoints"]] == [
        500,
        1000,
    ] and "are visited, not the model in the folder itself" in caplog.text


def test_the_head_is_measured_in_the_precision_of_its_file(tmp_path, quick, model):
    """In bfloat16 the head would have other small singular values; with and without text, the file's are reported."""
    U, V = (torch.linalg.qr(torch.randn(n, 32, generator=torch.Generator().manual_seed(n))).Q for n in (320, 32))
    edit_head(model, lambda W: (U * torch.logspace(2, -2, 32)) @ V.T)
    for words in (["study.hidden=false"], ["backbone.dtype=bfloat16"]):
        (entry,) = run_study(tmp_path / words[0][-5:], "study=spectrum", *quick, *words, f"backbone.path={model}")[
            "checkpoints"
        ]
        assert entry["head"]["condition"] == pytest.approx(1e4, rel=1e-2)


def test_a_tied_config_with_two_stored_matrices(tmp_path, quick, model):
    """The stored tensors decide, with and without the whole model."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    found = [
        run_study(tmp_path / h, "study=spectrum", f"study.hidden={h}", *quick, f"backbone.path={model}")["checkpoints"][
            0
        ]
        for h in ("true", "false")
    ]
    assert found[0]["head"] == found[1]["head"] and not any(f["tied"] for f in found)
    tensors = load_file(model / "model.safetensors")
    a, b = (
        next(k for k in tensors if k.endswith(names))
        for names in (("embed_in.weight", "embed_tokens.weight"), ("embed_out.weight", "lm_head.weight"))
    )
    tensors[a] = tensors[b].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (entry,) = run_study(tmp_path / "equal", "study=spectrum", "study.hidden=false", *quick, f"backbone.path={model}")[
        "checkpoints"
    ]
    assert entry["tied"] and entry["head"] == found[0]["head"]


def test_drop_padding_needs_a_tokenizer(tmp_path, quick, model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    words = ["study=spectrum", "study.hidden=false", *quick, f"backbone.path={model}"]
    assert run_study(tmp_path / "kept", *words)["checkpoints"][0]["padding"]["rows"] is None
    with pytest.raises(
        UserError,
        match="study.drop_padding=true: model has no tokenizer, .* are not known; give backbone.tokenizer",
    ):
        run_study(tmp_path / "dropped", *words, "study.drop_padding=true")


def test_a_tokenizer_that_changes_along_a_series_names_the_checkpoint(tmp_path, quick, toy_backbone):
    series = toy_series(toy_backbone, tmp_path / "toy", {"step1": 0.0, "step2": 0.1})
    file = series / "step2" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content, indent=3))  # other bytes, the same tokenizer
    run_study(tmp_path / "same", "study=saturation", *quick, f"backbone.path={series}")
    a, b = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)[100:102]
    vocab = content["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="step2: its tokenizer is not that of .*step1"):
        run_study(tmp_path / "other", "study=saturation", *quick, f"backbone.path={series}")

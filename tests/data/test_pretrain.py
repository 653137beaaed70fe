"""The recipe of the embedded backbone at toy size, from text to a folder that Transformers loads."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, sentences


def test_pretraining_learns_and_keeps_checkpoints(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"text": d, "source": "toy", "path": str(i)} for i, d in enumerate(sentences(3, 3000, words=40))]
    corpus.write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = "--vocab 400 --width 32 --layers 1 --context 64 --batch 16 --tokens 81920 --warmup 5 --lr 1e-2"
    args += " --jobs 2 --no-compile --save-at 0 40"
    command = [
        sys.executable,
        "-m",
        "data.recipes.pretrain",
        "--corpus",
        str(corpus),
        "--out",
        str(tmp_path / "out"),
        *args.split(),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["tokens"] == 81920
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    ids = torch.tensor([tokenizer(sentences(4, 1, words=40)[0])["input_ids"][:64]])
    losses = {}
    for name in ("step0", "step40", "model"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name, dtype=torch.float32)
        losses[name] = model(input_ids=ids, labels=ids).loss.item()
    assert losses["step0"] > losses["step40"] > losses["model"] - 0.1
    assert losses["model"] < losses["step0"] - 1 and abs(result["held_out_loss"] - losses["model"]) < 1

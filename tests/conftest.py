"""A generated toy backbone and text, and fixtures that run the main job in this process or in a new one."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # Transformers copies a folder's own code there, without a lock
    os.environ["HF_MODULES_CACHE"] = os.path.expanduser(f"~/.cache/huggingface/modules-{worker}")
if not torch.cuda.is_available():  # the Triton kernels then run in its interpreter; read when they are first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
import transformers
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from bottleneck.config import schema as config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
transformers.utils.logging.set_verbosity_error()
VOCAB, HIDDEN, CONTEXT = 320, 32, 64


def sentences(seed: int, documents: int, words: int = 120) -> list[str]:
    """Documents of a small invented language with some structure: each word prefers a few followers."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    lexicon_rng = random.Random(0)
    lexicon = ["".join(lexicon_rng.choices(letters, k=lexicon_rng.randint(2, 7))) for _ in range(150)]
    out = []
    for _ in range(documents):
        word = rng.randrange(len(lexicon))
        text = []
        for _ in range(words):
            text.append(lexicon[word])
            word = (word * 7 + rng.choice((1, 2, 3, 50))) % len(lexicon)
        out.append(" ".join(text) + ".")
    return out


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory) -> Path:
    """A jsonl file of 300 documents, about 100k tokens."""
    path = tmp_path_factory.mktemp("text") / "toy.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in sentences(1, 300)))
    return path


@pytest.fixture(scope="session")
def toy_backbone(tmp_path_factory) -> Path:
    """An untrained GPT-NeoX of 32 dimensions with a byte-level BPE of 320 entries: a folder Transformers loads."""
    folder = tmp_path_factory.mktemp("backbone") / "toy"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sentences(2, 50), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    GPTNeoXForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy(toy_backbone, toy_text, tmp_path_factory) -> list[str]:
    """Overrides of a run on the toys that takes a second: 20 steps of 8 x 64 tokens, on the CPU."""
    return [
        "backbone=local",
        f"backbone.path={toy_backbone}",
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "data.block_size=64",
        "data.validation_tokens=3000",
        "batch_size=8",
        "tokens=10240",
        "trainer=cpu",
        "trainer.micro_batch_size=4",
        "trainer.threads=1",
        "trainer.checkpoint_every=3",
        "ranks=[2,8,32]",
        "optim.full_rank=1",
        "head.calibration_tokens=1024",
        "trainer.progress=false",
    ]


def composed(overrides: list[str]):
    """The config that `python train.py OVERRIDES` sees."""
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=overrides)


@pytest.fixture
def run(toy, tmp_path):
    """run(*overrides, run_dir=…): the main job in this process; returns its Result."""
    from train import train

    def call(*overrides: str, run_dir: Path | None = None):
        return train(composed([*toy, *overrides]), run_dir or tmp_path / "run")

    return call


def command(*overrides: str, script: str = "train.py") -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, overrides)]


def shell(*overrides: str, cwd: Path | None = None, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """Run `python train.py OVERRIDES` in a new process."""
    # do not pass on the W&B session of an earlier test
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    full = {**inherited, "PYTHONUNBUFFERED": "1", **env}
    return subprocess.run(
        command(*overrides), cwd=cwd or ROOT, env=full, capture_output=True, text=True, timeout=timeout
    )


def heads_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The head files of a run: name -> tensors."""
    from safetensors.torch import load_file

    return {p.stem: load_file(p) for p in sorted((Path(folder) / "heads").glob("*.safetensors"))}


def assert_same_heads(a: dict, b: dict) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys() and a
    for name in a:
        for tensor in ("A", "B"):
            assert torch.equal(a[name][tensor], b[name][tensor]), (name, tensor)

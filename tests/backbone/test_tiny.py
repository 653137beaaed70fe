"""The embedded backbone and text: small, loadable by Transformers, really pretrained, and disjoint."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.ngram import nll

ROOT = Path(__file__).parents[2]
TINY, SAMPLE = ROOT / "data/backbones/tiny", ROOT / "data/sample"
BLOCK = 512


@cache
def rows(split):
    return [json.loads(line) for line in open(SAMPLE / f"{split}.jsonl", encoding="utf-8")]


@cache
def tokens(split):
    """The split as one stream of token ids; the end token closes each document."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer([r["text"] for r in rows(split)], add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*x, tokenizer.eos_token_id], np.int64) for x in ids])


@cache
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def shingles(text):
    words = text.lower().split()
    return {hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)}


def test_folder_is_small_and_safe():
    files = [f for f in TINY.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16_000_000
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".md"}


def test_loads_as_the_architecture_it_claims():
    config = model().config
    assert config.model_type == "gpt_neox" and not config.tie_word_embeddings
    assert (config.hidden_size, config.vocab_size, config.max_position_embeddings) == (256, 8192, BLOCK)
    head, embedding = model().get_output_embeddings(), model().get_input_embeddings()
    assert head.bias is None and head.weight.shape == (8192, 256)
    assert head.weight.data_ptr() != embedding.weight.data_ptr()


def test_stored_in_bfloat16():
    assert AutoModelForCausalLM.from_pretrained(TINY, dtype="auto").dtype == torch.bfloat16


def test_head_has_full_rank():
    """A head of a rank below d would itself be a lower bottleneck than the one under study."""
    values = torch.linalg.svdvals(model().get_output_embeddings().weight.data)
    assert values[-1] > 1e-3 * values[0]


def test_tokenizer_round_trip():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = "Être — or 不; \ttabs\n\n  and spaces, don't fold."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 8192
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == model().config.eos_token_id


@pytest.mark.slow
def test_beats_a_five_gram_model():
    """A backbone that was hardly trained fails here: the 5-gram model knows the sample's training text."""
    stream = torch.from_numpy(tokens("validation"))
    total = count = 0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, BLOCK):
            block = stream[start : start + BLOCK + 1]
            logits = model()(block[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum").item()
            count += len(block) - 1
    loss, five_gram = total / count, nll(tokens("train"), tokens("validation"))
    print(f"backbone {loss:.4f}, 5-gram {five_gram:.4f} nats a token")
    assert loss < five_gram - 0.5


def test_ngram_probabilities_sum_to_one():
    train = np.cumsum(np.random.default_rng(0).integers(0, 7, 400)) % 7
    for context in ([0, 0, 0, 0], train[10:14].tolist()):
        assert sum(np.exp(-nll(train, [*context, w], vocab=7)) for w in range(7)) == pytest.approx(1)


def test_train_and_validation_are_disjoint():
    train = {(r["source"], r["path"]) for r in rows("train")}
    validation = {(r["source"], r["path"]) for r in rows("validation")}
    assert len(train) == len(rows("train")) and len(validation) == len(rows("validation"))
    assert not train & validation
    seen = set().union(*(shingles(r["text"]) for r in rows("train")))
    for r in rows("validation"):
        own = shingles(r["text"])
        assert len(own & seen) <= 0.12 * len(own), f"{r['source']} {r['path']} is also in the training text"


def test_readme_names_every_source():
    text = (SAMPLE / "README.md").read_text(encoding="utf-8")
    for source in {r["source"] for s in ("train", "validation") for r in rows(s)}:
        assert f"`{source}`" in text, source

"""Several texts mixed by weight: shares, orders, epochs, validation by text, resuming, bad input."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch

from bottleneck.backbone.model import load_tokenizer
from bottleneck.config.checks import check_config
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.core.errors import UserError
from bottleneck.data.mix import PERIOD, SOURCE_BITS, MixOrder
from bottleneck.data.module import StepBatches, ValidationBlocks
from bottleneck.data.prepare import prepare
from bottleneck.results.schema import fault
from conftest import assert_same_heads, composed, heads_of, sentences
from support.token_writers import megatron

KEPT = np.random.default_rng(0).permutation(997)


@pytest.fixture(scope="module")
def tokenizer(toy_backbone):
    return load_tokenizer(BackboneConfig(path=str(toy_backbone)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tokenizer) -> dict[str, dict[str, str]]:
    """Keys of three sources: plain text, other text with its own validation, and a Megatron pair."""
    folder = tmp_path_factory.mktemp("mix")
    for name, seed, count in (("prose", 1, 200), ("code", 2, 60), ("held", 3, 20)):
        rows = sentences(seed, count, words=40)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in rows))
    ids = [tokenizer(d, add_special_tokens=False)["input_ids"] for d in sentences(4, 80, words=50)]
    pair = str(megatron(folder / "pair", ids))
    return {
        "prose": {"files": str(folder / "prose.jsonl")},
        "code": {"files": str(folder / "code.jsonl"), "validation_files": str(folder / "held.jsonl")},
        "pair": {"tokens": pair},
        "cache": {"cache_dir": str(folder / "cache")},
    }


def config(texts, mix, **kw) -> DataConfig:
    sources = {name: texts[name] for name in mix}
    return DataConfig(mix=mix, sources=sources, block_size=16, validation_tokens=600, **texts["cache"], **kw)


# ---------------------------------------------------------------- the order
@pytest.mark.parametrize("weights", [[0.8, 0.2], [1 / 3, 2 / 3], [0.9, 0.099, 0.001], [0.1] * 10, [0.37, 0.41, 0.22]])
def test_shares_are_exact_at_every_place(weights):
    """Of the first n sequences each source has n times its weight, to about a sequence; the whole to 0.1 %."""
    order = MixOrder([np.arange(10**7)] * len(weights), weights, 1, 0)
    n = 3 * PERIOD + 1234
    source, own = order.places(0, n)
    for i, w in enumerate(weights):
        count = np.cumsum(source == i)
        assert np.abs(count - w * np.arange(1, n + 1)).max() <= len(weights) / 2 + 1
        assert own[source == i].tolist() == list(range(count[-1]))
    far = 10**6
    share = np.bincount(order.places(0, far)[0], minlength=len(weights)) / far
    assert np.abs(share - weights).max() < 1e-5
    for a, b in ((0, 1), (PERIOD - 3, PERIOD + 5), (5000, 5001), (7, n - 7)):
        assert [x.tolist() for x in order.places(a, b)] == [source[a:b].tolist(), own[a:b].tolist()]


def test_a_short_source_is_read_again_in_another_order():
    """Every pass reads all of it; the other source goes on; the order ends before one pass too many."""
    order = MixOrder([KEPT, KEPT[:100]], [0.5, 0.5], 3, 5)
    assert len(order) in range(598, 603)
    assert order.reads(400) == [400 * 0.5 / 997, 2.0]
    whole = order[: len(order)]
    first, second = (whole[whole >> SOURCE_BITS == i] & (2**SOURCE_BITS - 1) for i in (0, 1))
    assert first.tolist() == KEPT[: len(first)].tolist() and len(second) == 300
    passes = second.reshape(3, 100)
    assert passes[0].tolist() == KEPT[:100].tolist() and all(set(p) == set(KEPT[:100]) for p in passes.tolist())
    assert len({tuple(p) for p in passes.tolist()}) == 3
    assert len(MixOrder([KEPT, KEPT[:100]], [0.5, 0.5], 1, 5)) in range(198, 203)


# ---------------------------------------------------------------- the corpus
def test_batches_are_those_of_the_sources(texts, tokenizer):
    """The sequences of each source are the ones, in the order, that it has without a mix."""
    mix = {"prose": 6.0, "code": 3.0, "pair": 1.0}
    corpus = prepare(config(texts, mix), tokenizer)
    alone = {n: prepare(DataConfig(**texts[n], **texts["cache"], block_size=16, validation_tokens=600), tokenizer)
             for n in mix}  # fmt: skip
    steps = 20
    batches = StepBatches(corpus, 16, 10, steps, 3, None)
    seen = torch.cat([batches[k] for k in range(steps)])
    parts = batches.order.places(0, 10 * steps)[0]
    for i, (name, share) in enumerate(zip(mix, (0.6, 0.3, 0.1))):
        mine = seen[parts == i]
        assert len(mine) == pytest.approx(200 * share, abs=1)
        own = StepBatches(alone[name], 16, 1, len(mine), 3, None)
        assert torch.equal(mine, torch.cat([own[k] for k in range(len(mine))]))
    halves = [StepBatches(corpus, 16, 10, steps, 3, None, rank, 2) for rank in (0, 1)]
    assert all(torch.equal(torch.cat([h[k] for h in halves]), batches[k]) for k in range(steps))
    blocks, at = ValidationBlocks(corpus, 16, None), 0
    for own in alone.values():  # each source's validation text, from its first block on
        theirs = ValidationBlocks(own, 16, None)
        assert all(torch.equal(x, y) for k in range(len(theirs)) for x, y in zip(blocks[at + k], theirs[k]))
        at += len(theirs)
    assert at == len(blocks)
    assert corpus.validation_bytes == sum(c.validation_bytes for c in alone.values())
    others = [prepare(config(texts, m), tokenizer) for m in ({**mix, "pair": 2.0}, {"prose": 6.0, "code": 3.0})]
    assert len({c.fingerprint for c in (corpus, *others)}) == 3
    assert prepare(config(texts, {n: 10 * w for n, w in mix.items()}), tokenizer).fingerprint == corpus.fingerprint


def overrides(texts, mix: str, *more: str) -> list[str]:
    own = [f"data.sources.{n}.{k}={v}" for n in ("prose", "code") for k, v in texts[n].items() if f"{n}:" in mix]
    return ["data=mix", "data.files=null", f"data.mix={mix}", *own, "data.max_tokens=null", *more]


def test_a_run_on_a_mix(run, texts, tmp_path):
    """Perplexity of each text beside the whole, in every file; resumed in the middle, the heads have the same bits."""
    given = overrides(texts, "{prose: 3, code: 1}", "data.epochs=4", "ranks=[2,8]")
    whole = run(*given, run_dir=tmp_path / "whole").curve
    rows = [*whole["heads"], whole["reference"]]
    for row in rows:
        assert [d["domain"] for d in row["domains"]] == ["prose", "code"]
        tokens = [d["tokens"] for d in row["domains"]]
        assert sum(tokens) == whole["validation_tokens"]
        mean = sum(d["loss"] * t for d, t in zip(row["domains"], tokens)) / sum(tokens)
        assert mean == pytest.approx(row["loss"], abs=1e-6)
        assert all(d["perplexity"] == pytest.approx(math.exp(d["loss"])) for d in row["domains"])
    assert whole["recipe"]["mix"] == {"prose": 3.0, "code": 1.0} and fault(json.loads(json.dumps(whole))) is None
    with open(tmp_path / "whole/curve.csv", newline="") as f:
        table = list(csv.DictReader(f))
    assert float(table[0]["perplexity_code"]) == whole["heads"][0]["domains"][1]["perplexity"]
    alone = run("data.files=" + texts["prose"]["files"], "tokens=1024", "ranks=[2]").curve  # the same text by itself
    assert alone["reference"]["loss"] == pytest.approx(whole["reference"]["domains"][0]["loss"], abs=1e-6)
    assert "domains" not in alone["reference"] and "mix" not in alone["recipe"]
    given.append(f"plugin={stopping(tmp_path)}")
    with pytest.raises(UserError, match="stopped"):
        run(*given, run_dir=tmp_path / "cut")
    run(*given, "ckpt_path=last", run_dir=tmp_path / "cut")
    assert_same_heads(heads_of(tmp_path / "whole"), heads_of(tmp_path / "cut"))


def stopping(tmp_path):
    """A plugin that ends the first run in its eleventh step."""
    path = tmp_path / "stopping.py"
    path.write_text(
        "import pathlib\nfrom bottleneck.core.errors import UserError\n"
        "from bottleneck.training.module import HeadSweep\n"
        "step, done = HeadSweep.training_step, pathlib.Path(__file__ + '.done')\n"
        "def once(self, batch, i):\n    if self.global_step == 10 and not done.exists():\n        done.touch()\n"
        "        HeadSweep.training_step = step\n        raise UserError('stopped')\n"
        "    return step(self, batch, i)\nHeadSweep.training_step = once\n"
    )
    return path


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "given, words",
    [
        (["data.mix={prose: 1}"], "must be two texts or more"),
        (["data.mix={prose: 1, code: 0}"], "data.mix.code=0: must be a number above 0"),
        (["data.mix={prose: 1, code: -2}"], "data.mix.code=-2: must be a number above 0"),
        (["data.mix={prose: 1, code: much}"], "data.mix.code='much': must be a number above 0"),
        (["data.mix={prose: 1, coed: 1}"], "data.sources.code: has no weight; data.mix has prose, coed"),
        (["data.mix={prose: 1, code: 1, news: 1}"], "data.mix: news is unknown; give data.sources.news.files=.*sample"),
        (["data.mix={prose: 1, code: 1}", "data.sources.code.fils=x"], "data.sources.code.fils: unknown key.*files"),
        (["data.mix={prose: 1, code: 1}", "data.sources.code.seed=1"], "data.sources.code.seed: is the same for all"),
        (["data.mix={prose: 1, code: 1}", "data.sources.code.tokens=x"], "data.sources.code: data: give either"),
        (
            ["data.mix={prose: 1, code: 1}", "data.sources.code.text_unit=up"],
            "data.sources.code: text_unit=up: must be",
        ),
        (["data.mix={prose: 1, code: 1}", "data.files=x"], "data: give either .*; files and mix are given"),
        (
            ["data.mix={prose: 1, code: 1}", "data.validation_files=x"],
            "data.validation_files: data.mix does not use",
        ),
        (["data.mix={prose: 1, code: 1, a/b: 1}"], "data.mix: 'a/b' must be letters"),
        (["data.mix={}"], "data.sources.prose: only data.mix uses it"),
        (["data.mix=false"], "data.mix=False: must be weights by name"),
        (["data.sources=true"], "data.sources=True: must be keys by name"),
        (["data.mix=null", "data.sources=0"], "data.sources=0: must be keys by name"),
    ],
)
def test_bad_mixes_are_one_line(texts, given, words):
    whole = [
        o for o in overrides(texts, "{prose: 1, code: 1}") if not o.startswith("data.mix") and o != "data.files=null"
    ]
    with pytest.raises(UserError, match=words) as caught:
        check_config(composed([*whole, *given]))
    assert "\n" not in str(caught.value)


def test_choices_are_sources_and_short_ones_are_refused(texts, tokenizer, tmp_path):
    given = ["data=mix", "data.mix={sample: 1, code: 9}", f"data.sources.code.files={texts['code']['files']}"]
    checked = check_config(composed(given)).data
    assert checked.sources["sample"]["files"].endswith("data/sample")
    corpus = prepare(config(texts, {"prose": 0.5, "code": 0.5}), tokenizer)
    with pytest.raises(UserError, match="0.5 from code; that reads it .* times, data.epochs=1 allows 1"):
        StepBatches(corpus, 16, 10, 200, 3, None)
    assert len(StepBatches(corpus, 16, 10, 200, 3, None, epochs=10)) == 200

"""Text to batches: split by document, packing, exact coverage, shuffling, damaged caches, bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zstandard
from torchdata.stateful_dataloader import StatefulDataLoader

from bottleneck.backbone.model import load_tokenizer
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.core.errors import UserError
from bottleneck.data.cache import find_fault
from bottleneck.data.module import IGNORE, StepBatches, TextData, ValidationBlocks, leading_bos
from bottleneck.data.prepare import prepare
from bottleneck.data.sources import Source, join_rows
from conftest import sentences

DOCS = sentences(5, 60, words=40)


@pytest.fixture(scope="module")
def tokenizer(toy_backbone):
    return load_tokenizer(BackboneConfig(path=str(toy_backbone)))


def config(tmp_path, **kw) -> DataConfig:
    return DataConfig(**{"cache_dir": str(tmp_path / "cache"), "block_size": 16, "validation_fraction": 0.2, **kw})


def jsonl(path: Path, docs) -> str:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    return str(path)


def documents(stream: np.ndarray, tokenizer) -> list[str]:
    """The documents of a token stream: they are separated by end-of-text tokens."""
    cuts = np.flatnonzero(stream == tokenizer.eos_token_id)
    return [tokenizer.decode(stream[a + 1 : b]) for a, b in zip(cuts[:-1], cuts[1:])]


def test_every_document_once_and_disjoint(tmp_path, tokenizer):
    """Train and validation hold every document exactly once and whole; copies of a document land on one side."""
    corpus = prepare(config(tmp_path, files=jsonl(tmp_path / "a.jsonl", DOCS + DOCS[:10])), tokenizer)
    train, held = documents(corpus.train, tokenizer), documents(corpus.validation, tokenizer)
    assert sorted(train + held) == sorted(DOCS + DOCS[:10])
    assert not set(train) & set(held) and 3 < len(held) < 30
    assert corpus.validation_bytes == sum(len(d.encode()) for d in held)


def test_formats_give_the_same_tokens(tmp_path, tokenizer):
    """The same content as txt, jsonl, parquet and compressed files gives the same stream."""
    docs = DOCS[:12]
    (tmp_path / "one").mkdir()
    for i, d in enumerate(docs):
        (tmp_path / "one" / f"{i:02d}.txt").write_text(d)
    raw = "".join(json.dumps({"text": d}) + "\n" for d in docs).encode()
    (tmp_path / "z.jsonl.zst").write_bytes(zstandard.compress(raw))
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(raw))
    pd.DataFrame({"text": docs}).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "par.txt").write_text("\n\n".join(docs))
    prints = {
        prepare(config(tmp_path, files=str(tmp_path / f)), tokenizer).fingerprint
        for f in ("one", "one/*.txt", "z.jsonl.zst", "g.jsonl.gz", "p.parquet", "par.txt")
    }
    assert len(prints) == 1


def test_validation_files_and_folders(tmp_path, tokenizer):
    """Given validation text is not split again, and documents that are in both texts stay held out."""
    folder = tmp_path / "both"
    folder.mkdir()
    jsonl(folder / "train.jsonl", DOCS)
    jsonl(folder / "validation.jsonl", DOCS[:5])
    (folder / "NOTICES.txt").write_text("not text to train on")
    by_folder = prepare(config(tmp_path, files=str(folder)), tokenizer)
    by_key = prepare(
        config(tmp_path, files=str(folder / "train.jsonl"), validation_files=str(folder / "validation.jsonl")),
        tokenizer,
    )
    assert by_folder.fingerprint == by_key.fingerprint
    assert documents(by_folder.validation, tokenizer) == DOCS[:5] and documents(by_folder.train, tokenizer) == DOCS[5:]


def test_limits(tmp_path, tokenizer):
    files = jsonl(tmp_path / "a.jsonl", DOCS)
    corpus = prepare(config(tmp_path, files=files, max_tokens=400, validation_tokens=100), tokenizer)
    assert 400 < len(corpus.train) < 900 and 100 < len(corpus.validation) < 400


def test_what_is_kept_does_not_depend_on_the_machine(tmp_path, tokenizer, monkeypatch):
    """data.max_tokens stops after the same document on any number of cores, so the same documents are held out."""
    monkeypatch.setattr("bottleneck.data.encode.CORE_CHARS", 5000)
    file, kept = jsonl(tmp_path / "t.jsonl", sentences(5, 3000)), set()
    for cores in (1, 4, 64):
        monkeypatch.setattr("bottleneck.data.encode.cores", lambda cores=cores: cores)
        kept.add(
            prepare(
                config(tmp_path, files=file, max_tokens=100_000, cache_dir=str(tmp_path / str(cores))), tokenizer
            ).fingerprint
        )
    assert len(kept) == 1


def test_a_file_that_is_named_twice_counts_once(tmp_path, tokenizer, monkeypatch):
    jsonl(tmp_path / "t.jsonl", sentences(5, 20))
    monkeypatch.chdir(tmp_path)
    alone = prepare(config(tmp_path, files="t.jsonl"), tokenizer)
    for files in (["t.jsonl", str(tmp_path / "t.jsonl")], ["./t.jsonl", "*.jsonl", str(tmp_path / "*.jsonl")]):
        assert prepare(config(tmp_path, files=files), tokenizer).fingerprint == alone.fingerprint
    held = config(tmp_path, files="t.jsonl", validation_files=str(tmp_path / "t.jsonl"))
    with pytest.raises(UserError, match="only validation files there"):
        prepare(held, tokenizer)


def test_names_with_brackets(tmp_path, tokenizer):
    corpus = prepare(config(tmp_path, files=jsonl(tmp_path / "br[1].jsonl", DOCS)), tokenizer)
    assert len(documents(corpus.train, tokenizer)) + len(documents(corpus.validation, tokenizer)) == len(DOCS)


def test_wikitext_rows_become_articles():
    rows = [" = A = \n", "one\n", " = = part = = \n", "two", " = B = \n", "three\n"]
    assert list(join_rows(rows, r"^ = [^=]+ = $")) == [" = A = \none\n = = part = = \ntwo\n", " = B = \nthree\n"]


def test_cache_is_reused_and_damage_is_repaired(tmp_path, tokenizer):
    cfg = config(tmp_path, files=jsonl(tmp_path / "a.jsonl", DOCS))
    first = prepare(cfg, tokenizer)
    stamp = (first.folder / "train.bin").stat().st_mtime_ns
    assert (prepare(cfg, tokenizer).folder / "train.bin").stat().st_mtime_ns == stamp
    wanted = first.fingerprint

    def flip():
        raw = bytearray((first.folder / "train.bin").read_bytes())
        raw[len(raw) // 2] ^= 1
        (first.folder / "train.bin").write_bytes(raw)

    damages = [
        flip,
        lambda: (first.folder / "validation.bin").write_bytes(b"\0\0"),
        lambda: (first.folder / "manifest.json").write_text("{"),
        lambda: (first.folder / "manifest.json").unlink(),
    ]
    for damage in damages:
        damage()
        assert find_fault(first.folder) is not None
        assert prepare(cfg, tokenizer).fingerprint == wanted and find_fault(first.folder) is None
    half = first.folder.with_name(first.folder.name + ".part")  # a killed process leaves this behind
    half.mkdir()
    (half / "train.bin").write_bytes(b"x")
    (first.folder / "manifest.json").unlink()
    assert prepare(cfg, tokenizer).fingerprint == wanted and not half.exists()
    assert prepare(DataConfig(**{**vars(cfg), "block_size": 8}), tokenizer).folder != first.folder


def test_a_failed_preparation_leaves_nothing(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + "{broken\n" * 3)
    with pytest.raises(UserError, match="a.jsonl: cannot be read") as caught:
        prepare(config(tmp_path, files=str(path)), tokenizer)
    assert "\n" not in str(caught.value)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([".lock"], [])


def test_the_broken_file_of_several_is_named(tmp_path, tokenizer):
    for name in ("a", "b", "d"):
        jsonl(tmp_path / f"{name}.jsonl", DOCS)
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n{broken\n')
    with pytest.raises(UserError, match="c.jsonl: cannot be read as json"):
        prepare(config(tmp_path, files=str(tmp_path / "*.jsonl")), tokenizer)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    tmp = tmp_path_factory.mktemp("c")
    return prepare(config(tmp, files=jsonl(tmp / "a.jsonl", sentences(6, 200))), tokenizer)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_same_sequences_whatever_the_processes(corpus, world):
    """A step has the same sequences on 1, 2 and 4 processes; all steps together read distinct blocks of the stream."""
    whole = StepBatches(corpus, 16, 8, 20, seed=3, bos=None)
    parts = [StepBatches(corpus, 16, 8, 20, seed=3, bos=None, rank=r, world=world) for r in range(world)]
    for step in range(20):
        assert torch.equal(whole[step], torch.cat([p[step] for p in parts]))
    assert len(np.unique(whole.order[: 20 * 8])) == 20 * 8
    i = whole.order[0]
    assert whole[0][0].tolist() == corpus.train[i * 16 : i * 16 + 17].tolist()
    other = StepBatches(corpus, 16, 8, 20, seed=4, bos=None)
    assert not torch.equal(whole[0], other[0])
    assert torch.equal(whole.calibration(30), whole[0][:2])


@pytest.mark.parametrize("epochs", [2, 3])
def test_epochs_read_the_same_text_in_other_orders(corpus, epochs):
    """The first epoch equals the run that reads the text once; each other epoch reads its blocks in another order."""
    once = StepBatches(corpus, 16, 8, 6, seed=3, bos=None)
    steps = 6 * epochs - (epochs == 3)  # a budget that is no multiple of the epochs ends within the last one
    whole = StepBatches(corpus, 16, 8, steps, seed=3, bos=None, epochs=epochs)
    assert len(whole) == steps
    seen = [torch.cat([whole[k] for k in range(6 * e, min(6 * e + 6, steps))]).tolist() for e in range(epochs)]
    assert seen[0] == torch.cat([once[k] for k in range(6)]).tolist()
    for e in range(1, epochs):
        assert all(seen[e] != earlier[: len(seen[e])] for earlier in seen[:e])
        assert (
            (sorted(seen[e]) == sorted(seen[0])) if 6 * e + 6 <= steps else all(block in seen[0] for block in seen[e])
        )
    assert torch.equal(whole.calibration(30), once.calibration(30))
    halves = [StepBatches(corpus, 16, 8, steps, 3, None, rank, 2, epochs) for rank in (0, 1)]
    assert torch.equal(whole[7], torch.cat([h[7] for h in halves]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_counts_every_token_once(corpus, world):
    """The targets of all processes are the validation stream without its first token; inputs are one behind."""
    pieces = {}
    for rank in range(world):
        blocks = ValidationBlocks(corpus, 16, None, rank, world)
        for item, index in enumerate(blocks.indices):
            inputs, targets = blocks[item]
            keep = targets != IGNORE
            assert inputs[1:][keep[1:]].tolist() == targets[:-1][keep[1:]].tolist()
            assert index not in pieces
            pieces[index] = targets[keep]
    assert torch.cat([pieces[i] for i in sorted(pieces)]).tolist() == corpus.validation[1:].tolist()


def test_loader_resumes_exactly(corpus):
    data = TextData(corpus, 16, 8, 20, 4, 0, None)
    steps = data._steps(0, 1)
    loader = StatefulDataLoader(steps, batch_size=None)
    seen = iter(loader)
    for _ in range(7):
        next(seen)
    again = StatefulDataLoader(steps, batch_size=None)
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert len(rest) == 13 and torch.equal(rest[0], steps[7])


def test_bos_leads_every_block_where_the_tokenizer_wants_one(corpus, tokenizer):
    assert leading_bos(tokenizer) is None
    plain, led = (StepBatches(corpus, 16, 4, 2, 0, bos) for bos in (None, 5))
    assert (led[0][:, 0] == 5).all() and torch.equal(led[0][:, 1:], plain[0][:, 1:])
    inputs, targets = ValidationBlocks(corpus, 16, 5)[1]
    assert inputs[0] == 5 and torch.equal(targets, ValidationBlocks(corpus, 16, None)[1][1])


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(files="nothing/*.txt"), "data.files=nothing/.*no such file"),
        (dict(files="{tmp}/a.pdf"), "unknown ending"),
        (dict(files="{tmp}/empty"), "holds no text"),
        (dict(files="{tmp}/a.jsonl", text_field="body"), "data.text_field=body: no such column.*columns there: text"),
        (dict(files="{tmp}/one.jsonl"), "single document"),
        (dict(files="{tmp}/nothing.jsonl"), "no document"),
        (dict(files=[]), "data.files"),
        (dict(files="{tmp}/a.jsonl", validation_files="{tmp}/none.jsonl"), "data.validation_files"),
        (dict(files="{tmp}/rows.jsonl"), "not text"),
        (dict(files="{tmp}/a.jsonl", document_start="("), "not a regular expression"),
    ],
)
def test_bad_input_is_one_line(tmp_path, tokenizer, kw, words):
    jsonl(tmp_path / "a.jsonl", DOCS)
    jsonl(tmp_path / "one.jsonl", DOCS[:1])
    (tmp_path / "rows.jsonl").write_text('{"text": 3}\n{"text": 4}\n')
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    kw = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in kw.items()}
    with pytest.raises(UserError, match=words) as caught:
        prepare(config(tmp_path, **kw), tokenizer)
    assert "\n" not in str(caught.value)


def test_budget_beyond_the_corpus(corpus):
    with pytest.raises(UserError, match="tokens: .* are requested"):
        TextData(corpus, 16, 64, 1000, 4, 0, None)
    blocks = (len(corpus.train) - 1) // 16
    assert TextData(corpus, 16, 1, 2 * blocks, 1, 0, None, epochs=2).steps == 2 * blocks
    with pytest.raises(UserError, match="for each of 2 epochs, .*a larger data.epochs"):
        TextData(corpus, 16, 1, 2 * blocks + 1, 1, 0, None, epochs=2)


def test_names():
    assert (
        Source(DataConfig(dataset="Salesforce/wikitext", subset="wikitext-103-raw-v1")).name
        == "wikitext/wikitext-103-raw-v1"
    )

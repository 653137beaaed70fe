"""Token files of other projects, written here from their layouts or by their own packages, and read in place."""

from __future__ import annotations

import gzip
import json
import resource
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from bottleneck.backbone.model import load_tokenizer
from bottleneck.config.checks import check_config
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.core.errors import UserError
from bottleneck.data import order as order_module
from bottleneck.data import parquet_ids
from bottleneck.data import prepare as prepare_module
from bottleneck.data import token_corpus as token_corpus_module
from bottleneck.data.cache import Corpus
from bottleneck.data.module import IGNORE, StepBatches, TextData, ValidationBlocks
from bottleneck.data.order import Order, Plan, shuffled
from bottleneck.data.prepare import prepare
from conftest import assert_same_heads, command, composed, heads_of, sentences
from support.megatron_pair import compare
from support.token_writers import llmc, megatron, pythia

DOCS = sentences(21, 120, words=30)


@pytest.fixture(scope="module")
def tokenizer(toy_backbone):
    return load_tokenizer(BackboneConfig(path=str(toy_backbone)))


@pytest.fixture(scope="module")
def ids(tokenizer) -> list[list[int]]:
    """The ids of the documents, without end-of-text."""
    return [tokenizer(d, add_special_tokens=False)["input_ids"] for d in DOCS]


def config(**kw) -> DataConfig:
    return DataConfig(**{"block_size": 16, "validation_fraction": 0.2, "validation_tokens": 600, **kw})


# ---------------------------------------------------------------- documents in every format
def closed(docs, eos) -> list[int]:
    return [i for d in docs for i in [*d, eos]]


def write(kind: str, folder: Path, docs, eos: int) -> str:
    """Documents in one of the formats, joined by end-of-text where the format has no boundaries. Returns the path."""
    import datasets
    import pandas as pd
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stream = closed(docs, eos)
    if kind.startswith("megatron"):
        kept = [[*d, eos] for d in docs] if "eod" in kind else docs
        dtype = "int32" if "int32" in kind else "uint16"
        return str(megatron(folder / "m_text_document", kept, dtype, 3 if "parts" in kind else 1))
    if kind == "nanogpt":
        np.array(stream, "<u2").tofile(folder / "n.bin")
        return str(folder / "n.bin")
    if kind == "llmc":  # llm.c puts end-of-text before each document, and cuts documents at the end of a shard
        before = [eos, *stream[:-1]]
        llmc(folder / "x_000001.bin", before[:500])
        llmc(folder / "x_000002.bin", before[500:], "uint32", 20240801)
        return str(folder)
    if kind == "npy":
        np.save(folder / "a.npy", np.array(stream, np.int32))
        return str(folder / "a.npy")
    if kind == "safetensors":
        save_file({"tokens": np.array(stream, np.int64)}, str(folder / "a.safetensors"))
        return str(folder / "a.safetensors")
    rows = [{"input_ids": d, "other": str(i)} for i, d in enumerate(docs)]
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(folder / "a.parquet", row_group_size=7)
        return str(folder / "a.parquet")
    if kind == "arrow":
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "d"), num_shards=3)
        (folder / "d/cache-123.arrow").write_bytes(b"not listed")
        return str(folder / "d")
    raise ValueError(kind)


KINDS = [
    "megatron",
    "megatron-eod",
    "megatron-parts-int32",
    "nanogpt",
    "llmc",
    "npy",
    "safetensors",
    "parquet",
    "arrow",
]


def text_corpus(tmp_path, tokenizer, **kw):
    for name, docs in (("train", DOCS[:100]), ("validation", DOCS[100:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    files = {"files": str(tmp_path / "train.jsonl"), "validation_files": str(tmp_path / "validation.jsonl")}
    return prepare(config(**files, cache_dir=str(tmp_path / "cache"), **kw), tokenizer)


# ---------------------------------------------------------------- the same as text
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [600, 100_000])
def test_every_format_gives_the_batches_of_the_same_text(tmp_path, tokenizer, ids, kind, limit):
    """Stream, identity, batches of two epochs, calibration, validation and bytes are those of data=local."""
    text = text_corpus(tmp_path, tokenizer, validation_tokens=limit)
    eos = tokenizer.eos_token_id
    train, held = write(kind, tmp_path / "t", ids[:100], eos), write(kind, tmp_path / "v", ids[100:], eos)
    corpus = prepare(config(tokens=train, validation_files=held, validation_tokens=limit), tokenizer)
    assert len(corpus.train) == len(text.train) and np.array_equal(corpus.train[: len(text.train)], text.train)
    assert np.array_equal(corpus.validation, text.validation) and corpus.fingerprint == text.fingerprint
    assert corpus.validation_bytes == text.validation_bytes and corpus.train.max() == text.train.max()
    for a, b in [(7, 8), (0, 1), (493, 505), (len(text.train) - 3, len(text.train)), (5, 900)]:
        assert np.array_equal(corpus.train[a:b], text.train[a:b])
    ours, theirs = (StepBatches(c, 16, 8, 12, 3, None, epochs=2) for c in (corpus, text))
    assert all(torch.equal(ours[i], theirs[i]) for i in range(12))
    assert torch.equal(ours.calibration(100), theirs.calibration(100))
    ours, theirs = (ValidationBlocks(c, 16, None) for c in (corpus, text))
    assert len(ours) == len(theirs) and all(
        torch.equal(a, b) for i in range(len(ours)) for a, b in zip(ours[i], theirs[i])
    )


def test_a_megatron_pair_trains_the_heads_of_its_text(toy, toy_backbone, tmp_path):
    """Heads bit for bit, losses and identity. By hand with 200M tokens: python tests/support/megatron_pair.py."""
    few = [o for o in toy if not o.startswith(("data.files", "data.cache_dir", "data=", "trainer=cpu"))]
    few += ["ranks=[2]", "tokens=1024"]
    found = compare(tmp_path, 30_000, few, toy_backbone / "tokenizer.json")
    assert found["same"] and found["ids"]["train"] > 30_000 and found["heads"] == 1


# ---------------------------------------------------------------- rows in the order of the source
def test_a_step_of_pythia_is_read_exactly(tmp_path, tokenizer, monkeypatch):
    """Step k's batch of a model that saw the rows in order, k counted in its own steps; the last rows are held out."""
    monkeypatch.setattr(token_corpus_module, "PYTHIA_ROWS", 8)
    rows = np.random.default_rng(0).integers(1, 300, (403, 17))
    path = pythia(tmp_path / "p", rows)
    common = dict(tokens=path, packing="rows", order="source", validation_tokens=48)
    corpus = prepare(config(**common, skip="step3"), tokenizer)
    batches = StepBatches(corpus, 16, 8, 40, seed=5, bos=None)
    for k in range(40):
        assert np.array_equal(batches[k].numpy(), rows[8 * (3 + k) : 8 * (4 + k)])
    assert np.array_equal(corpus.validation.reshape(-1, 17), rows[-3:])
    held = ValidationBlocks(corpus, 16, None)
    assert len(held) == 3 and all(torch.equal(held[i][1], torch.tensor(rows[400 + i][1:])) for i in range(3))
    assert all((held[i][1] != IGNORE).all() for i in range(3))
    with pytest.raises(UserError, match="tokens: .* are requested"):  # the held-out rows are never read
        StepBatches(corpus, 16, 8, 48, seed=5, bos=None)
    shuffled_rows = prepare(config(**common | {"order": "shuffled"}, skip=24), tokenizer)
    seen = np.concatenate([b.numpy() for b in (StepBatches(shuffled_rows, 16, 8, 47, 5, None)[k] for k in range(47))])
    held_rows = {tuple(r) for r in shuffled_rows.validation.reshape(-1, 17).tolist()}
    assert (
        len(held_rows) == 3 and {tuple(r) for r in seen.tolist()} <= {tuple(r) for r in rows[24:].tolist()} - held_rows
    )
    loader = StatefulDataLoader(batches, batch_size=None)
    iterator = iter(loader)
    for _ in range(7):
        next(iterator)
    again = StatefulDataLoader(batches, batch_size=None)
    again.load_state_dict(loader.state_dict())
    assert torch.equal(next(iter(again)), batches[7])  # a resumed run takes the next rows, in the middle of a shard
    (tmp_path / "p/document-00007-of-00020.bin").unlink()
    with pytest.raises(UserError, match="document-00007-of-00020.bin is missing"):
        prepare(config(**common), tokenizer)


def test_joined_text_in_the_order_of_the_source(tmp_path, tokenizer, ids):
    corpus = prepare(config(tokens=write("nanogpt", tmp_path / "n", ids, 0), order="source", skip=2), tokenizer)
    batches = StepBatches(corpus, 16, 4, 20, 0, None)
    stream = np.array([0, *closed(ids, 0)])
    for k in (0, 7, 19):
        starts = 16 * (2 + 4 * k + np.arange(4))
        assert np.array_equal(batches[k].numpy(), stream[starts[:, None] + np.arange(17)])
    assert stream[-len(corpus.validation) :].tolist() == corpus.validation.tolist()


# ---------------------------------------------------------------- validation held out of the source
@pytest.mark.parametrize("kind", ["megatron", "nanogpt", "arrow"])
@pytest.mark.parametrize("order", ["shuffled", "source"])
def test_held_out_documents_are_whole_and_never_trained_on(tmp_path, tokenizer, ids, kind, order):
    marked = [[5, 6, i + 7, *d] for i, d in enumerate(ids)]  # all documents differ
    corpus = prepare(config(tokens=write(kind, tmp_path / "t", marked, 0), order=order), tokenizer)
    held = [p.tolist() for p in np.split(corpus.validation, np.flatnonzero(corpus.validation == 0))]
    held = [p[1:] for p in held if len(p) > 1]
    assert len(held) > 1 and all(d in marked for d in held)
    steps = len(corpus.order(0))
    read = StepBatches(corpus, 16, 1, steps, 0, None)
    seen = " ".join(" ".join(map(str, read[k][0].tolist())) for k in range(steps))
    for d in held:
        assert " ".join(map(str, d[:8])) not in seen
    assert steps * 16 > len(corpus.train) - len(corpus.validation) - 40 * len(held)  # few other tokens are lost
    other = prepare(config(tokens=str(tmp_path / "t"), order=order, seed=1), tokenizer)
    assert (other.fingerprint == corpus.fingerprint) == (order == "source")


def test_folders_are_split_by_their_names(tmp_path, tokenizer, ids):
    """nanoGPT's train.bin and val.bin, FineWeb's fineweb_train_000001.bin, a `datasets.DatasetDict`."""
    import datasets

    for name, docs in (("train", ids[:100]), ("val", ids[100:])):
        np.array(closed(docs, 0), "<u2").tofile(tmp_path / f"{name}.bin")
        (tmp_path / "f").mkdir(exist_ok=True)
        llmc(tmp_path / f"f/fineweb_{name}_000001.bin", [0, *closed(docs, 0)][:-1])
    pair = {n: datasets.Dataset.from_list([{"input_ids": d} for d in docs]) for n, docs in
            (("train", ids[:100]), ("validation", ids[100:]))}  # fmt: skip
    datasets.DatasetDict(pair).save_to_disk(str(tmp_path / "d"))
    glob = str(tmp_path / "train.bin")
    wanted = prepare(config(tokens=glob, validation_files=str(tmp_path / "val.bin")), tokenizer).fingerprint
    for path in (tmp_path / "f", tmp_path / "d"):
        assert prepare(config(tokens=str(path)), tokenizer).fingerprint == wanted
    with pytest.raises(UserError, match="only validation files there"):
        prepare(config(tokens=str(tmp_path / "val.bin"), validation_files=str(tmp_path / "val.bin")), tokenizer)


# ---------------------------------------------------------------- bad input
def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def widen(path: Path, dtype: str) -> None:
    """The ids of a .bin stored with more bytes each."""
    np.fromfile(path, "<u2").astype(dtype).tofile(path)


def shift(path: Path, at: int) -> None:
    """Add a million to the 8 bytes at a place of a Megatron index."""
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[at : at + 8] = struct.pack("<q", struct.unpack("<q", content[at : at + 8])[0] + 1_000_000)
    index.write_bytes(content)


@pytest.mark.parametrize(
    "kind, damage, words",
    [
        ("megatron", lambda p: cut(p, 2), "m_text_document.bin: has .* ids, .*m_text_document.idx says .*truncated"),
        ("megatron", lambda p: cut(p.with_suffix(".idx"), 8), "m_text_document.idx: has .* bytes, its header says"),
        ("megatron", lambda p: p.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0"), "too short for a Megatron index"),
        ("megatron", lambda p: p.with_suffix(".idx").write_bytes(b"x" * 200), "not a Megatron index"),
        ("nanogpt", lambda p: cut(p, 1), "n.bin: has .* bytes, which is no whole number of uint16 ids"),
        ("nanogpt", lambda p: p.write_bytes(b"PK\x03\x04" + bytes(50)), "n.bin: is a zip file, not token ids"),
        ("npy", lambda p: cut(p, 4), "a.npy: ends before its .* ids do; it was truncated"),
        ("npy", lambda p: cut(p, p.stat().st_size - 9), "a.npy: cannot be read as npy"),
        ("npy", lambda p: np.save(p, np.asfortranarray(np.zeros((4, 5), int))), "a.npy: is stored by columns"),
        ("npy", lambda p: np.save(p, np.zeros(9)), "a.npy: holds float64"),
        ("safetensors", lambda p: cut(p, 8), "a.safetensors: ends before tokens does; it was truncated"),
        ("safetensors", lambda p: p.write_bytes(b"\xff" * 30), "not a safetensors file, or truncated"),
        ("parquet", lambda p: cut(p, 9), "a.parquet: cannot be read as parquet"),
        ("nanogpt", lambda p: p.write_bytes(b""), "n.bin: has 0 bytes"),
        ("nanogpt", lambda p: widen(p, "<u4"), "n.bin: holds ids of 4 or 8 bytes"),
        ("nanogpt", lambda p: widen(p, "<i8"), "n.bin: holds ids of 4 or 8 bytes"),
        ("nanogpt", lambda p: p.write_bytes(p.read_bytes()[:8]), "data.block_size=16: n.bin has .* too few for one"),
        ("nanogpt", lambda p: p.write_bytes(gzip.compress(b"a") + b"x"), "n.bin: is a gzip file"),
        ("megatron", lambda p: shift(p, 34 + 12 * 120 + 8 * 50), "its documents do not begin one after the other"),
        ("megatron", lambda p: shift(p, 34 + 4 * 120 + 8 * 50), "sequences 49 and 50 are not stored one after"),
        ("arrow", lambda p: (p / "state.json").write_text("{"), "state.json: not the state.json of datasets"),
    ],
)
def test_damaged_and_foreign_files_are_one_line(tmp_path, tokenizer, ids, kind, damage, words):
    path = Path(write(kind, tmp_path, ids, 0))
    damage(path)
    with pytest.raises(UserError, match=words) as caught:
        prepare(config(tokens=str(path)), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_truncated_llmc_shard_and_arrow_file(tmp_path, tokenizer, ids):
    write("llmc", tmp_path, ids, 0)
    cut(tmp_path / "x_000002.bin", 4)
    with pytest.raises(UserError, match="x_000002.bin: has .* bytes, its header says .* ids; it was truncated"):
        prepare(config(tokens=str(tmp_path)), tokenizer)
    write("arrow", tmp_path / "a", ids, 0)
    cut(next((tmp_path / "a/d").glob("data-00001*.arrow")), 300)
    with pytest.raises(UserError, match="data-00001.*: cannot be read as arrow"):
        prepare(config(tokens=str(tmp_path / "a/d")), tokenizer)


@pytest.mark.parametrize("value", [320, 60_000])
def test_ids_beyond_the_vocabulary_name_shard_row_and_value(tmp_path, tokenizer, ids, value, monkeypatch):
    wrong = [list(d) for d in ids]
    wrong[77][3] = value
    path = write("megatron", tmp_path / "m", wrong, 0)
    with pytest.raises(
        UserError, match=rf"m_text_document.bin: row 77 holds id {value}; the tokenizer's ids end at 319"
    ):
        prepare(config(tokens=path), tokenizer)
    path = write("nanogpt", tmp_path / "n", wrong, 0)
    with pytest.raises(UserError, match=rf"n.bin: position \d+ holds id {value}"):
        prepare(config(tokens=path), tokenizer)
    monkeypatch.setattr(token_corpus_module, "EXACT", 100)  # a large source is sampled; the id is found while reading
    monkeypatch.setattr(token_corpus_module, "SAMPLES", 2)
    corpus = prepare(config(tokens=path, validation_tokens=20), tokenizer)
    steps = len(corpus.order(0))
    with pytest.raises(UserError, match=rf"block \d+ of n.bin holds id {value}"):
        for k in range(steps):
            StepBatches(corpus, 16, 1, steps, 0, None)[k]


@pytest.mark.parametrize("dtype, limit, fits", [("uint16", 65_536, True), ("uint16", 262_144, False),
                                               ("int16", 50_304, False), ("uint8", 8192, False),
                                               ("uint32", 262_144, True)])  # fmt: skip
def test_ids_of_few_bits_are_not_those_of_a_large_vocabulary(tmp_path, dtype, limit, fits):
    """Ids that do not fit are cut off by NumPy in silence, and all that is left looks like ids."""
    np.save(tmp_path / "a.npy", np.array([1, 2, 100_000]).astype(dtype))
    shards = token_corpus_module.open_shards([tmp_path / "a.npy"], "auto", "input_ids")
    if fits:
        return token_corpus_module.check_width(shards, limit)
    with pytest.raises(UserError, match=r"a.npy: holds ids of \d+ bits, the tokenizer's go up to .*cut off"):
        token_corpus_module.check_width(shards, limit)


def test_shards_are_sorted_by_their_numbers(tmp_path, tokenizer):
    """Regression: by their letters x_10 came before x_2, so data.order=source was not the order of the source."""
    rows = np.random.default_rng(3).integers(1, 300, (12, 5, 17))
    for i, part in enumerate(rows):
        np.save(tmp_path / f"x_{i}.npy", part)
    for path in (tmp_path, tmp_path / "x_*.npy"):
        corpus = prepare(config(tokens=str(path), packing="rows", order="source", validation_tokens=17), tokenizer)
        assert np.array_equal(corpus.read(np.arange(60)), rows.reshape(60, 17))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h: h.__setitem__(2, h[2] + 3), "its header says .* ids; it was truncated"),
        (lambda h: h.__setitem__(2, -1), "its header says -1 ids; it was truncated"),
        (lambda h: h.__setitem__(2, h[2] // 2), r"its header says \d+ ids of 2 bytes \(version 1\); it is damaged"),
    ],
)
def test_a_wrong_header_of_llmc(tmp_path, tokenizer, ids, change, words):
    path = llmc(tmp_path / "a.bin", closed(ids, 0) if len(closed(ids, 0)) % 2 == 0 else closed(ids, 0)[1:])
    raw = np.fromfile(path, "<i4")
    change(raw)
    raw.tofile(path)
    with pytest.raises(UserError, match=words):
        prepare(config(tokens=str(path)), tokenizer)


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(tokens="nothing/*.bin"), "data.tokens=nothing/.*: no such file"),
        (dict(tokens=""), "data.tokens: is empty"),
        (dict(tokens="{tmp}/empty"), "holds no token files"),
        (dict(tokens="{tmp}/a.parquet", ids_field="tokens"), "data.ids_field=tokens: no such column.*input_ids, other"),
        (
            dict(tokens="{tmp}/a.parquet", ids_field="other"),
            "data.ids_field=other: holds .*; ids are lists of whole numbers",
        ),
        (
            dict(tokens="{tmp}/a.parquet", packing="rows"),
            r"row \d+ has \d+ ids; data.packing=rows takes rows as they are",
        ),
        (dict(tokens="{tmp}/a.txt"), "a.txt: not a file of token ids"),
        (dict(tokens="{tmp}/n.bin", format="megatron"), "there is no .idx file beside it"),
        (dict(tokens="{tmp}/n.bin", skip=100_000), "data.skip=100000: the source has"),
        (dict(tokens="{tmp}/n.bin", skip="stepx"), "data.skip=stepx: must be a number of rows or blocks, or stepN"),
        (dict(tokens="{tmp}/mds"), "data.tokens: there are no tokens in .*mds/index.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path, tokenizer, ids, kw, words):
    write("parquet", tmp_path, ids, 0)
    write("nanogpt", tmp_path, ids, 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mds").mkdir()
    (tmp_path / "mds/index.json").write_text('{"version": 2, "shards": []}')
    (tmp_path / "a.txt").write_text("x")
    kw = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in kw.items()}
    with pytest.raises(UserError, match=words) as caught:
        prepare(config(**kw), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.tokens=x"], "files and tokens are given"),
        (["data.packing=rows"], "data.packing: only data.tokens uses it"),
        (["data=tokens", "data.tokens=x", "data.max_tokens=5"], "data.max_tokens: data.tokens does not use it"),
        (["data=tokens"], "data.tokens"),
        (["data=tokens", "data.tokens=x", "data.packing=pad"], "data.packing"),
    ],
)
def test_keys_of_token_files(overrides, words):
    with pytest.raises(UserError, match=words):
        check_config(composed(overrides))


# ---------------------------------------------------------------- parquet, decoded as it is read
def test_parquet_is_decoded_a_row_group_at_a_time(tmp_path, tokenizer, ids, monkeypatch):
    """Little is kept, whatever the order; empty rows count; several files; identity is that of the other formats."""
    import pandas as pd

    docs = [d if i % 9 else [] for i, d in enumerate(ids)]
    for part, some in (("a", docs[:60]), ("b", docs[60:])):
        frame = pd.DataFrame({"input_ids": [np.array(d, np.int64) for d in some], "x": "y"})
        (tmp_path / "p").mkdir(exist_ok=True)
        frame.to_parquet(tmp_path / f"p/{part}.parquet", row_group_size=7)
    held = dict(validation_files=write("nanogpt", tmp_path / "v", ids[:20], 0))
    wanted = prepare(config(tokens=write("megatron", tmp_path / "m", docs, 0), **held), tokenizer)
    monkeypatch.setattr(parquet_ids, "decoded", parquet_ids._Decoded())
    monkeypatch.setattr(parquet_ids, "KEPT", 9000)  # about three of 18 groups
    for order in ("shuffled", "chunks", "source"):
        paths = str(tmp_path / "p"), wanted.cfg.tokens
        corpora = [prepare(config(tokens=path, order=order, **held), tokenizer) for path in paths]
        assert len(corpora[0].stream) == len(wanted.stream) and corpora[0].fingerprint == corpora[1].fingerprint
        ours, theirs = (StepBatches(c, 16, 8, 40, 3, None) for c in corpora)
        assert all(torch.equal(ours[i], theirs[i]) for i in range(40))
        assert parquet_ids.decoded.bytes <= 9000 and 1 <= len(parquet_ids.decoded.kept) <= 4
    monkeypatch.setattr(parquet_ids, "LARGEST", 100)
    with pytest.raises(UserError, match="a.parquet: row group 0 holds .* ids and is decoded as a whole; at most 100"):
        prepare(config(tokens=str(tmp_path / "p"), **held), tokenizer)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_wrong_id_is_named_by_its_row_in_the_file(tmp_path, tokenizer, ids, kind):
    """It was the row of its row group or record batch, which is the same only in files of one."""
    import datasets
    import pandas as pd

    wrong = [*ids[:77], [5, 999], *ids[78:]]
    if kind == "parquet":
        pd.DataFrame({"input_ids": wrong}).to_parquet(tmp_path / "a.parquet", row_group_size=7)
    else:
        with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "a.arrow"), writer_batch_size=7) as writer:
            for d in wrong:
                writer.write({"input_ids": d})
            writer.finalize()
    with pytest.raises(UserError, match=rf"a.{kind}: row 77 holds id 999"):
        prepare(config(tokens=str(tmp_path)), tokenizer)


# ---------------------------------------------------------------- at scale
def test_a_large_permutation_is_one_without_being_stored():
    for size in (2, 3, 1000, 4097):
        assert sorted(shuffled(np.arange(size), size, 3).tolist()) == list(range(size))
        images = shuffled(np.arange(size), size, 3)
        assert np.array_equal(shuffled(images, size, 3, inverse=True), np.arange(size))
    far = shuffled(np.arange(100_000), 10**11, 0)
    assert len(np.unique(far)) == 100_000 and far.max() < 10**11
    assert abs(far.mean() / 10**11 - 0.5) < 0.01 and abs(np.corrcoef(far[:-1], far[1:])[0, 1]) < 0.02
    assert not np.array_equal(far, shuffled(np.arange(100_000), 10**11, 1))


@pytest.mark.parametrize("kind", ["source", "shuffled", "chunks"])
@pytest.mark.parametrize("small", [10, 10**6])
def test_an_order_leaves_out_what_is_skipped_and_held_out(monkeypatch, kind, small):
    """Every other sequence once; a part of the order is the same as in the whole."""
    for name, value in (("SMALL", small), ("CHUNK", 8), ("MIXED", 4)):
        monkeypatch.setattr(order_module, name, value)
    order = Order(1000, 0, skip=100, held_out=np.array([50, 100, 500, 999]), kind=kind)
    assert len(order) == 897
    whole = order[:897].tolist()
    assert sorted(whole) == sorted(set(range(100, 1000)) - {100, 500, 999})
    assert order[:40].tolist() == whole[:40] and order[123:456].tolist() == whole[123:456]
    if kind == "source":
        assert whole[:3] == [101, 102, 103]
    if kind == "chunks":  # 32 sequences in a row come from 4 stretches of 8, and are mixed
        full = Order(1000, 0, skip=0, held_out=np.zeros(0, np.int64), kind=kind)[:1000]
        for window in full[:992].reshape(31, 32):
            counts = np.unique(window // 8, return_counts=True)[1]
            assert counts.tolist() == [8] * 4 and len(np.unique(np.diff(window))) > 8
        assert len(np.unique(full[:992:32] // 8)) == 31


def test_a_large_plan_is_computed_where_it_is_needed(monkeypatch):
    """Each epoch reads the same sequences, in another order."""
    monkeypatch.setattr(order_module, "SMALL", 10)
    order = Order(500, 0, skip=0, held_out=np.array([7]))
    plan = Plan(order, 300, 3, seed=1)
    epochs = plan[0:900].reshape(3, 300)
    assert epochs[0].tolist() == order[:300].tolist() and plan[250:650].tolist() == epochs.flatten()[250:650].tolist()
    assert all(sorted(e.tolist()) == sorted(epochs[0].tolist()) for e in epochs)
    assert not np.array_equal(epochs[1], epochs[0]) and not np.array_equal(epochs[1], epochs[2])


def test_opening_a_huge_source_reads_little_of_it(tmp_path, tokenizer, ids):
    """10^11 tokens as a sparse file: opened within 5 s of CPU time and little memory, and a late batch is read."""
    path = tmp_path / "huge.bin"
    with open(path, "wb") as f:
        f.truncate(2 * 10**11)
    held = write("nanogpt", tmp_path / "v", ids, 0)
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = prepare(config(tokens=str(path), block_size=2048, validation_files=held), tokenizer)
    steps = 10**11 // 2048 // 256 - 1  # one whole epoch
    data = TextData(corpus, 2048, 256, steps, 8, 0, None)
    assert data._steps(0, 1)[steps - 1].shape == (256, 2049)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # KiB, so 1 GiB


def test_more_shards_than_open_files(tmp_path, tokenizer, ids):
    """1,500 shards where a process may have 300 files open; a sampled source is judged by few of them."""
    stream = np.array(closed(ids, 0))
    for i, part in enumerate(np.array_split(stream, 1500)):
        llmc(tmp_path / f"x_{i:06d}.bin", part)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        corpus = prepare(config(tokens=str(tmp_path)), tokenizer)
        assert np.array_equal(corpus.stream[1 : 1 + len(stream)], stream)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


KILLER = """
import json, os, signal
from bottleneck.data.token_corpus import TokenCorpus

read = TokenCorpus.read

def recorded(self, indices, block=None):
    ids = read(self, indices, block)
    with open({log!r}, "a") as f:
        print(json.dumps([indices.tolist(), ids.tolist()]), file=f)
    if {row} in indices and not os.path.exists({log!r} + ".killed"):
        open({log!r} + ".killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return ids

TokenCorpus.read = recorded
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_shard_takes_the_next_row(run, toy, tmp_path):
    """SIGKILL while a row in the middle of shard 7 is read; resumed, every step has the batch of Pythia's layout."""
    rows = np.random.default_rng(0).integers(1, 300, (420, 65))  # 20 rows a shard; a run reads rows 100 to 259
    source = ["data=tokens", f"data.tokens={pythia(tmp_path / 'p', rows)}", "data.packing=rows", "data.order=source",
              "data.files=null", "data.skip=100"]  # fmt: skip
    run(*source, run_dir=tmp_path / "whole")
    log, plugin = tmp_path / "log", tmp_path / "killer.py"
    plugin.write_text(KILLER.format(log=str(log), row=150))
    cut_run = command(*toy, *source, f"plugin={plugin}", f"hydra.run.dir={tmp_path / 'cut'}")
    first = subprocess.run(cut_run, capture_output=True, timeout=200)
    assert first.returncode == -signal.SIGKILL
    before = len(log.read_text().splitlines())
    again = subprocess.run([*cut_run, "ckpt_path=last"], capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    batches = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    assert batches[0][0] == list(range(148, 156))  # the step after the checkpoint of step 6
    assert [b[0] for b in batches] == [list(range(k, k + 8)) for k in range(148, 260, 8)]
    assert all(ids == rows[indices].tolist() for indices, ids in batches)
    assert_same_heads(heads_of(tmp_path / "whole"), heads_of(tmp_path / "cut"))


# ---------------------------------------------------------------- writing
@pytest.mark.parametrize("kind", ["megatron", "npy"])
def test_written_tokens_are_read_back(toy, tmp_path, tokenizer, kind, capsys):
    """Round trip: the stream, its split and its identity; Megatron's files are also parsed here from the layout."""
    own = [*[o for o in toy if "cache_dir" not in o], f"data.cache_dir={tmp_path / 'cache'}"]
    assert prepare_module.main([*own, "--write", kind, "--out", str(tmp_path / "out")]) == 0
    folder, _, train, held = capsys.readouterr().out.splitlines()
    first = Corpus("x", Path(folder), json.loads((Path(folder) / "manifest.json").read_text()))
    big = dict(block_size=32, validation_tokens=10**9)
    corpus = prepare(config(tokens=str(tmp_path / "out"), **big), tokenizer)
    assert corpus.fingerprint == first.fingerprint and np.array_equal(corpus.validation, first.validation)
    assert np.array_equal(corpus.train[: len(corpus.train)], first.train)
    if kind == "megatron":
        raw = Path(train).with_suffix(".idx").read_bytes()
        magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", raw[:34])
        assert (magic, version, code, documents) == (b"MMIDIDX\0\0", 1, 8, sequences + 1)
        sizes = np.frombuffer(raw, "<i4", sequences, 34)
        pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
        ids = np.fromfile(train, "<u2")
        assert sequences == first.manifest["train"]["documents"] and sizes.sum() == len(ids) == len(first.train) - 1
        assert all(ids[p // 2 + n - 1] == 0 for p, n in zip(pointers, sizes))  # every document ends with end-of-text
    else:
        assert np.array_equal(np.load(held), first.validation)
    assert prepare_module.main([*own, "--write", kind, "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert prepare_module.main([*own, "--out", str(tmp_path / "other")]) == 2
    assert [p.name for p in tmp_path.iterdir() if ".part" in p.name] == []


def test_token_files_need_no_preparation(capsys):
    assert prepare_module.main(["data=tokens", "data.tokens=x.bin"]) == 2
    assert "read in place, there is nothing to prepare" in capsys.readouterr().err

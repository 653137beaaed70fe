"""Hub streams made by several processes, stopped and gone on with. Local shards go through the same code."""

from __future__ import annotations

import gzip
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zstandard

from bottleneck.backbone.model import load_tokenizer
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.core.errors import UserError
from bottleneck.data import stream_pieces
from bottleneck.data.cache import read_manifest
from bottleneck.data.held_out import HashSplit, document_hash
from bottleneck.data.prepare import prepare
from bottleneck.data.stream_pieces import Pieces, Reading
from conftest import sentences

ROOT = Path(__file__).parents[2]
DOCS = sentences(31, 700, words=20)
CUTS = (0, 40, 250, 251, 400, 640, 700)  # shards of very different lengths
ENDINGS = {
    ".jsonl": lambda raw: raw,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.compress,
    ".parquet": None,
}


@pytest.fixture(scope="module")
def tokenizer(toy_backbone):
    return load_tokenizer(BackboneConfig(path=str(toy_backbone)))


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(stream_pieces, "LEAST_CHARS", 1500)
    monkeypatch.setattr(stream_pieces, "MOST_CHARS", 1500)


def shards(folder: Path, ending: str, split: str = "train", docs=DOCS, cuts=CUTS) -> str:
    """Shards with rows without text among the others."""
    folder.mkdir(exist_ok=True)
    for i, (a, b) in enumerate(zip(cuts, cuts[1:])):
        rows = [{"text": d, "x": str(i)} for part in ([""], docs[a:b], [None, " "]) for d in part]
        path = folder / f"{split}-{i:05d}-of-{len(cuts) - 1:05d}{ending}"
        if ending == ".parquet":
            pd.DataFrame(rows).to_parquet(path, row_group_size=50)
        else:
            path.write_bytes(ENDINGS[ending]("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return str(folder)


def config(tmp_path: Path, cache: str, **kw) -> DataConfig:
    return DataConfig(**{"block_size": 16, "validation_tokens": 600, "cache_dir": str(tmp_path / cache), **kw})


def documents(ids: np.ndarray, tokenizer) -> list[str]:
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(ends, ends[1:])]


class Killed(BaseException):
    pass


@pytest.fixture
def stored(monkeypatch):
    """(process or thread, part, piece) of each piece that is made; `stored.limit` ends them, as by SIGKILL."""
    store, made = Pieces._store, []

    def counted(self, job, *rest):
        if counted.limit is not None and len(made) >= counted.limit:
            raise Killed
        made.append((threading.current_thread().name.split("-")[0], self.part, job))
        return store(self, job, *rest)

    counted.limit = None
    monkeypatch.setattr(Pieces, "_store", counted)
    counted.made = made
    return counted


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_document_once_and_the_split_is_by_hash(tmp_path, tokenizer, ending):
    """All rows are counted; what is held out is what the hash of a document says, whatever its lane."""
    given = config(tmp_path, "a", dataset=shards(tmp_path / "hub", ending), validation_tokens=10**9)
    corpus = prepare(given, tokenizer)
    train, held = documents(corpus.train, tokenizer), documents(corpus.validation, tokenizer)
    assert sorted(train + held) == sorted(DOCS) and len(held) > 1
    split = HashSplit(0, 0.01)
    lane0 = [d for i in (0,) for d in DOCS[CUTS[i] : CUTS[i + 1]]]
    forced = min(document_hash(d, 0) for d in lane0)
    assert all(split.is_held(document_hash(d, 0), forced) for d in held)
    assert not any(split.is_held(document_hash(d, 0), forced) for d in train)
    read = corpus.manifest["read"]
    assert (read["rows"], read["rows_empty"], read["documents_blank"]) == (700 + 18, 12, 6)
    small = prepare(config(tmp_path, "a", dataset=given.dataset, max_tokens=3000), tokenizer)
    assert 3000 < len(small.train) < 3100


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("own_validation", [False, True])
def test_a_stopped_preparation_goes_on(tmp_path, tokenizer, stored, ending, own_validation, caplog):
    """Same tokens, bit for bit; no piece is made twice; nothing stays behind."""
    hub = shards(tmp_path / "hub", ending)
    given = dict(dataset=hub, max_tokens=30_000)
    if own_validation:
        shards(tmp_path / "hub", ending, "validation", DOCS[650:] + sentences(32, 60, words=20), (0, 20, 110))
        given |= dict(validation_split="validation")
    whole = prepare(config(tmp_path, "a", **given), tokenizer)
    pieces = len(stored.made)
    assert pieces > 12
    stored.made.clear()
    for limit in (1, 6, 11):
        stored.limit = limit
        with pytest.raises(Killed):
            prepare(config(tmp_path, "b", **given), tokenizer)
    stored.limit = None
    with caplog.at_level(logging.INFO):
        again = prepare(config(tmp_path, "b", **given), tokenizer)
    assert "pieces of tokens that were made before" in caplog.text
    assert again.fingerprint == whole.fingerprint and again.manifest["read"] == whole.manifest["read"]
    counts = Counter(job[1:] for job in stored.made)
    assert max(counts.values()) == 1 and abs(len(counts) - pieces) <= 4  # some are made that turn out not to be needed
    if own_validation:
        assert whole.manifest["read"]["copies"] > 0
    assert not list((tmp_path / "b").glob("*.pieces")) and not list((tmp_path / "b").glob("*.part"))


@pytest.mark.parametrize("ending", [".jsonl.zst", ".parquet"])
def test_two_at_once_share_the_shards(tmp_path, tokenizer, monkeypatch, stored, ending):
    """Each file is read by one of the two, and the tokens are those that one alone makes."""
    hub = shards(tmp_path / "hub", ending)
    whole = prepare(config(tmp_path, "a", dataset=hub, max_tokens=30_000), tokenizer)
    stored.made.clear()
    read, readers = Reading.read, {}

    def recorded(self, *rest):
        readers.setdefault((id(self.lock), self.lock.lock_file), set()).add(threading.current_thread().name)
        time.sleep(0.01)
        return read(self, *rest)

    monkeypatch.setattr(Reading, "read", recorded)
    monkeypatch.setattr("bottleneck.data.stream_pieces.POLL_SECONDS", 0.001)  # else one is done before the other looks
    found, start = {}, threading.Barrier(2)

    def work(name: str) -> None:
        start.wait()
        found[name] = prepare(config(tmp_path, "b", dataset=hub, max_tokens=30_000), tokenizer)

    threads = [threading.Thread(target=work, args=(n,), name=n) for n in ("first", "second")]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 2 and {c.fingerprint for c in found.values()} == {whole.fingerprint}
    assert max(Counter(job[1:] for job in stored.made).values()) == 1
    lanes = Counter(name for _, name in readers)
    assert len(lanes) == 6 and max(lanes.values()) == 1  # a lane was opened once: its file is read by one thread
    assert set.union(*readers.values()) == {"first", "second"} and all(len(who) == 1 for who in readers.values())
    assert [c.seconds is None for c in found.values()].count(False) == 1  # one joined the pieces


def test_rows_joined_to_documents_go_on_in_the_middle(tmp_path, tokenizer, stored):
    """A document whose rows are in several pieces is not cut by a stop."""
    lines = [row for i, d in enumerate(DOCS) for row in (f" = {i} = ", *(d.split(" ", 4)))]
    hub = shards(tmp_path / "hub", ".jsonl", docs=lines, cuts=(0, 2000, 4200))
    given = dict(dataset=hub, document_start="^ = [^=]+ = $")
    whole = prepare(config(tmp_path, "a", **given), tokenizer)
    stored.made.clear()
    stored.limit = 7
    with pytest.raises(Killed):
        prepare(config(tmp_path, "b", **given), tokenizer)
    stored.limit = None
    assert prepare(config(tmp_path, "b", **given), tokenizer).fingerprint == whole.fingerprint
    assert whole.manifest["read"]["documents"] == 701  # one was cut by the end of the first shard


def test_pieces_of_other_files_are_not_used(tmp_path, tokenizer, stored):
    """A data set that changed in between is read from its start."""
    given = config(tmp_path, "b", dataset=shards(tmp_path / "hub", ".parquet"))
    stored.limit = 9
    with pytest.raises(Killed):
        prepare(given, tokenizer)
    stored.limit = None
    (folder,) = (tmp_path / "b").glob("*.pieces")
    (folder / "identity.json").write_text(json.dumps("another"))
    for path in folder.glob("*.npz"):
        path.write_bytes(b"of other files")
    assert prepare(given, tokenizer).manifest["read"]["rows"] == 718


@pytest.mark.parametrize(
    "docs, words",
    [
        ([], "no document in the text"),
        (["one text alone"], "single document"),
        (["one text alone"] * 5, "single document"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_too_few_documents(tmp_path, tokenizer, docs, words, ending):
    hub = shards(tmp_path / "hub", ending, docs=docs, cuts=(0, 1, len(docs)))
    with pytest.raises(UserError, match=words):
        prepare(config(tmp_path, "a", dataset=hub), tokenizer)


def test_a_document_a_shard(tmp_path, tokenizer):
    """The first lane has one document, and that is held out."""
    hub = shards(tmp_path / "hub", ".parquet", docs=DOCS[:5], cuts=range(6))
    corpus = prepare(config(tmp_path, "a", dataset=hub), tokenizer)
    assert documents(corpus.validation, tokenizer) == DOCS[:1] and documents(corpus.train, tokenizer) == DOCS[1:5]


def test_a_damaged_shard_is_one_line_and_can_be_repaired(tmp_path, tokenizer):
    hub = shards(tmp_path / "hub", ".jsonl")
    path = tmp_path / "hub/train-00002-of-00006.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"text": 7}\n')
    with pytest.raises(UserError, match="train-00002-of-00006.jsonl: line 5: data.text_field=text holds a number"):
        prepare(config(tmp_path, "a", dataset=hub), tokenizer)
    skipped = prepare(config(tmp_path, "a", dataset=hub, bad_rows="skip"), tokenizer)
    assert skipped.manifest["read"]["rows_bad"] == 1
    path.write_text(whole)
    assert prepare(config(tmp_path, "a", dataset=hub), tokenizer).fingerprint == skipped.fingerprint


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed(tmp_path, toy_backbone, tokenizer, monkeypatch):
    """SIGKILL of one of two processes that make a text: the other one takes its lanes over."""
    hub = shards(tmp_path / "hub", ".jsonl.gz", docs=DOCS * 15, cuts=[k * 15 for k in CUTS])
    code = """
import sys
from bottleneck.data import stream_pieces
from bottleneck.data.prepare import main

stream_pieces.LEAST_CHARS = stream_pieces.MOST_CHARS = 20000
sys.exit(main(sys.argv[1:]))
"""
    keys = ["data=c4", "data.subset=null", "data.validation_split=null", f"data.dataset={hub}", "tokens=10000000",
            f"backbone.path={toy_backbone}", f"data.cache_dir={tmp_path / 'b'}"]  # fmt: skip
    pair = [
        subprocess.Popen([sys.executable, "-c", code, *keys], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    while len(list(tmp_path.glob("b/*.pieces/*.npz"))) < 10 and pair[0].poll() is None:
        time.sleep(0.01)
    pair[0].send_signal(signal.SIGKILL)
    two = read_manifest(Path(pair[1].communicate(timeout=200)[0].splitlines()[0]))
    assert pair[0].wait() == -signal.SIGKILL
    monkeypatch.setattr(stream_pieces, "LEAST_CHARS", 20000)
    monkeypatch.setattr(stream_pieces, "MOST_CHARS", 20000)
    cfg = DataConfig(dataset=hub, max_tokens=10_000_000, cache_dir=str(tmp_path / "a"))
    one = prepare(cfg, tokenizer).manifest
    assert all(one[key] == two[key] for key in ("train", "validation", "read"))

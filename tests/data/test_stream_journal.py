"""A Hub stream whose preparation is stopped goes on at the next row. Local Parquet shards go through the same code."""

from __future__ import annotations

import json
import logging

import pandas as pd
import pytest

from bottleneck.backbone.model import load_tokenizer
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.data import stream_journal
from bottleneck.data.encode import Writer
from bottleneck.data.prepare import prepare
from conftest import sentences

DOCS = sentences(31, 700, words=20)


@pytest.fixture(scope="module")
def tokenizer(toy_backbone):
    return load_tokenizer(BackboneConfig(path=str(toy_backbone)))


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "hub").mkdir()
    for i in range(3):
        frame = pd.DataFrame({"text": [*DOCS[i::3], "", " "], "x": i})
        frame.to_parquet(tmp_path / f"hub/train-{i:05d}-of-00003.parquet", row_group_size=50)
    return tmp_path / "hub"


class Killed(BaseException):
    pass


def stopped(monkeypatch, documents: int):
    """Preparations end at one document, as by SIGKILL: nothing is cleaned up by this."""
    add = Writer.add

    def counted(self, text):
        stopped.seen += 1
        if stopped.seen > documents:
            raise Killed
        add(self, text)

    stopped.seen = 0
    monkeypatch.setattr(Writer, "add", counted)


@pytest.mark.parametrize("saved", [0.0, 1e9])
def test_a_stopped_preparation_goes_on(tmp_path, tokenizer, shards, monkeypatch, caplog, saved):
    """Same tokens, bit for bit; rows that were saved are not read from the stream again; nothing stays behind."""
    cfg = dict(dataset=str(shards), block_size=16, validation_tokens=600)
    whole = prepare(DataConfig(**cfg, cache_dir=str(tmp_path / "a")), tokenizer)
    monkeypatch.setattr(stream_journal, "SAVE_SECONDS", saved)
    for at in (300, 450):
        with monkeypatch.context() as m, pytest.raises(Killed):
            stopped(m, at)
            prepare(DataConfig(**cfg, cache_dir=str(tmp_path / "b")), tokenizer)
    (rows,) = (tmp_path / "b").glob("*.rows")
    with open(rows / "train.rows", "ab") as f:
        f.write(b"torn off in the middle of a write")
    with caplog.at_level(logging.INFO):
        again = prepare(DataConfig(**cfg, cache_dir=str(tmp_path / "b")), tokenizer)
    assert again.fingerprint == whole.fingerprint and again.manifest["read"] == whole.manifest["read"]
    kept = [int(r.args[0].replace(",", "")) for r in caplog.records if "going on after" in r.message]
    assert kept == ([] if saved else kept) and (saved or 450 <= kept[0] <= 450 + 4 * stream_journal.ROWS)
    assert not list((tmp_path / "b").glob("*.rows")) and not list((tmp_path / "b").glob("*.part"))


def test_rows_of_other_files_are_not_used(tmp_path, tokenizer, shards, monkeypatch):
    """A data set that changed in between is read from its start."""
    cfg = DataConfig(dataset=str(shards), block_size=16, validation_tokens=600, cache_dir=str(tmp_path / "b"))
    monkeypatch.setattr(stream_journal, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as m, pytest.raises(Killed):
        stopped(m, 300)
        prepare(cfg, tokenizer)
    (rows,) = (tmp_path / "b").glob("*.rows")
    state = json.loads((rows / "train.json").read_text())
    (rows / "train.json").write_text(json.dumps(state | {"identity": "another"}))
    (rows / "train.rows").write_bytes(b"\0" * (rows / "train.rows").stat().st_size)
    assert prepare(cfg, tokenizer).manifest["read"]["rows"] == 706

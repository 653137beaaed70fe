"""Folders that mosaicml-streaming 0.13 and litdata 0.2.76 wrote (tests/support/indexed_folders.py), read in place."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import zstandard

from bottleneck.backbone.model import load_tokenizer
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.core.errors import UserError
from bottleneck.data.module import StepBatches
from bottleneck.data.prepare import prepare
from conftest import ROOT
from support.indexed_folders import documents, rows
from support.token_writers import megatron

FOLDERS = ROOT / "tests/assets/indexed"


@pytest.fixture(scope="module")
def tokenizer(toy_backbone):
    return load_tokenizer(BackboneConfig(path=str(toy_backbone)))


def config(tokens, **kw) -> DataConfig:
    return DataConfig(
        tokens=str(tokens), **{"block_size": 16, "validation_fraction": 0.3, "validation_tokens": 60, **kw}
    )


@pytest.mark.parametrize("name", ["documents", "bytes", "litdata"])
@pytest.mark.parametrize("order", ["shuffled", "chunks", "source"])
def test_documents_have_the_batches_of_the_same_ids(tmp_path, tokenizer, name, order):
    """Several shards; arrays of any length, plain bytes, columns beside the ids."""
    held = dict(validation_files=str(megatron(tmp_path / "v", documents()[:3])), order=order)
    ours, theirs = (prepare(config(t, **held), tokenizer)
                    for t in (FOLDERS / name, megatron(tmp_path / "m", documents())))  # fmt: skip
    stream = np.concatenate([[0], *(np.append(d, 0) for d in documents())])
    assert np.array_equal(ours.stream[: len(stream)], stream) and ours.fingerprint == theirs.fingerprint
    a, b = (StepBatches(c, 16, 4, 12, 3, None) for c in (ours, theirs))
    assert all(torch.equal(a[k], b[k]) for k in range(12))


def test_rows_are_taken_as_they_are(tokenizer):
    corpus = prepare(config(FOLDERS / "rows", packing="rows", order="source"), tokenizer)
    seen = StepBatches(corpus, 16, 4, 9, 3, None)
    assert np.array_equal(torch.cat([seen[k] for k in range(9)]).numpy(), rows()[:36])


def test_a_shard_that_was_decompressed_is_read(tmp_path, tokenizer):
    """As the refusal of compressed shards says."""
    shutil.copytree(FOLDERS / "compressed", tmp_path / "x")
    packed = tmp_path / "x/shard.00000.mds.zstd"
    (tmp_path / "x/shard.00000.mds").write_bytes(
        zstandard.ZstdDecompressor().decompressobj().decompress(packed.read_bytes())
    )
    held = str(megatron(tmp_path / "v", documents()[:3]))
    found = prepare(config(tmp_path / "x", validation_files=held), tokenizer).train
    assert found[: len(found)].tolist() == [0, *[i for d in documents()[:2] for i in [*d.tolist(), 0]]]


def cut(folder):
    path = next(p for p in sorted(folder.iterdir()) if p.suffix in (".mds", ".bin"))
    path.write_bytes(path.read_bytes()[:-4])


def change(**what):
    def damage(folder):
        content = json.loads((folder / "index.json").read_text())
        (content["config"] if "config" in content else content["shards"][0]).update(what)
        (folder / "index.json").write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("documents", cut, "shard.00000.mds: has .* bytes, index.json says"),
        ("litdata", cut, "chunk-0-0.bin: has .* ids, index.json says .*; it was truncated"),
        ("litdata", lambda f: (f / "chunk-0-2.bin").unlink(), "index.json: chunk-0-2.bin is missing"),
        ("rows", lambda f: (f / "shard.00000.mds").unlink(), "index.json: shard.00000.mds is missing"),
        ("compressed", lambda f: None, r"is missing, only its compressed form \(zstd\) is there; decompress it to"),
        ("litdata", change(compression="zstd"), r"its chunks are compressed \(zstd\)"),
        ("litdata", change(item_loader="PyTreeLoader"), "made for litdata's PyTreeLoader"),
        ("litdata", change(data_format=["no_header_tensor:0"]), "holds no_header_tensor:0; ids are whole numbers"),
        (
            "rows",
            change(column_names=["x", "y"]),
            "data.ids_field=input_ids: no such column in .*; columns there: x, y",
        ),
        ("rows", change(column_encodings=["str"]), "data.ids_field=input_ids: holds str"),
        ("rows", change(column_sizes=[30]), "its samples have other sizes than it says"),
        ("rows", lambda f: (f / "index.json").write_text("{"), "index.json: not JSON, or truncated"),
        ("rows", lambda f: (f / "index.json").write_text("{}"), "neither an index of litdata nor of MosaicML MDS"),
        (
            "rows",
            lambda f: (f / "index.json").write_text('{"shards": [{}]}'),
            "index.json: cannot be read as mds|format",
        ),
    ],
)
def test_damaged_folders_are_one_line(tmp_path, tokenizer, name, damage, words):
    shutil.copytree(FOLDERS / name, tmp_path / "x")
    damage(tmp_path / "x")
    with pytest.raises(UserError, match=words) as caught:
        prepare(config(tmp_path / "x"), tokenizer)
    assert "\n" not in str(caught.value)

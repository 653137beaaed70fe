"""Text as users have it: their own splits, stale copies, mixed columns, damaged files; every document is counted."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zstandard
from filelock import FileLock

from bottleneck.backbone.model import load_tokenizer
from bottleneck.config.checks import check_config
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.core.errors import UserError
from bottleneck.data import prepare as prepare_module
from bottleneck.data.held_out import FIRST_DOCUMENTS
from bottleneck.data.local_files import expand, split_of_folder
from bottleneck.data.prepare import prepare
from bottleneck.data.readers import RowReader
from bottleneck.data.sources import Source
from conftest import composed, sentences

DOCS = sentences(11, 60, words=20)
COMPRESS = {".zst": zstandard.compress, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.fixture(scope="module")
def tokenizer(toy_backbone):
    return load_tokenizer(BackboneConfig(path=str(toy_backbone)))


def config(tmp_path, **kw) -> DataConfig:
    return DataConfig(**{"cache_dir": str(tmp_path / "cache"), "block_size": 16, "validation_fraction": 0.2, **kw})


def jsonl(path: Path, docs) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    return str(path)


def documents(stream: np.ndarray, tokenizer) -> list[str]:
    cuts = np.flatnonzero(stream == tokenizer.eos_token_id)
    return [tokenizer.decode(stream[a + 1 : b]) for a, b in zip(cuts[:-1], cuts[1:])]


def texts(tmp_path, **kw) -> list[str]:
    return list(Source(config(tmp_path, **kw)).train())


# ---------------------------------------------------------------- the user's own split
@pytest.mark.parametrize(
    "names, train, validation",
    [
        (["train/0.jsonl", "validation/0.jsonl"], [0], [1]),
        (["train/a.txt", "valid/a.txt", "b.txt"], [0], [1]),
        (["training.jsonl", "dev.jsonl", "notes.txt"], [0], [1]),
        (["my_train_file.jsonl", "my-val-1.jsonl"], [0], [1]),
        (["Train/a.jsonl", "Val/a.jsonl"], [0], [1]),
        (["train0.parquet", "train1.parquet", "test.parquet"], [0, 1], [2]),  # test stands in for validation
        (["train.jsonl", "validation.jsonl", "test.jsonl"], [0], [1]),  # and is ignored if there is validation text
        (["a/train/x.txt", "b/train/x.txt", "a/eval/x.txt"], [0, 1], [2]),
        (["data/train-00000-of-00002.parquet", "data/validation-00000-of-00001.parquet", "dev.txt"], [0], [1]),
        (["train/a.txt", "validation.txt"], [0], [1]),  # a convention that finds no validation text defers to the next
        (["corpus.jsonl", "validation.jsonl"], [0], [1]),
        (["a.txt", "contest.txt", "restrain.txt", "devices.txt"], [0, 1, 2, 3], []),  # no separators: not split names
        (["train/validation_notes.txt", "validation/train_notes.txt"], [0], [1]),  # folders decide
    ],
)
def test_names_of_folders_and_files_split_the_text(names, train, validation):
    split = split_of_folder(names)
    assert split.train == [names[i] for i in train] and split.validation == [names[i] for i in validation]
    assert sorted(split.train + split.validation + split.others) == sorted(names)


def test_the_names_that_datasets_splits_by_are_ours():
    """Fails when `datasets` changes its convention."""
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    from bottleneck.data.local_files import SEPARATOR, SPLIT_WORDS

    assert {str(k): sorted(v) for k, v in SPLIT_KEYWORDS.items()} == {k: sorted(v) for k, v in SPLIT_WORDS.items()}
    assert f"[{NON_WORDS_CHARS}]" == SEPARATOR


@pytest.mark.parametrize("held", ["validation", "test", "valid", "dev", "val"])
@pytest.mark.parametrize("layout", ["{}/0.jsonl", "{}.jsonl", "data/{}-00000-of-00001.jsonl"])
def test_held_out_documents_of_a_folder_are_not_trained_on(tmp_path, tokenizer, caplog, held, layout):
    """Regression: train/ and validation/ were mixed and split at random."""
    root = tmp_path / "text"
    jsonl(root / layout.format("train"), DOCS[:40])
    jsonl(root / layout.format(held), DOCS[40:])
    with caplog.at_level(logging.INFO):
        corpus = prepare(config(tmp_path, files=str(root)), tokenizer)
    assert documents(corpus.train, tokenizer) == DOCS[:40] and documents(corpus.validation, tokenizer) == DOCS[40:]
    said = next(r.getMessage() for r in caplog.records if "is split by the names" in r.getMessage())
    assert layout.format("train").split("/")[0] in said and "validation: " in said and "glob" in said
    everything = prepare(config(tmp_path, files=str(root / "**/*.jsonl")), tokenizer)  # a glob overrides
    assert len(documents(everything.train, tokenizer)) + len(documents(everything.validation, tokenizer)) == len(DOCS)
    assert set(documents(everything.train, tokenizer)) & set(DOCS[40:])


def test_a_split_of_a_folder_in_a_list_and_beside_validation_files(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    jsonl(a / "train/0.jsonl", DOCS[:10])
    jsonl(a / "dev/0.jsonl", DOCS[10:20])
    plain, own = jsonl(b / "x.jsonl", DOCS[20:30]), jsonl(tmp_path / "own.jsonl", DOCS[30:])
    source = Source(config(tmp_path, files=[str(a), str(b)]))
    assert list(source.train()) == DOCS[:10] + DOCS[20:30] and list(source.validation()) == DOCS[10:20]
    source = Source(config(tmp_path, files=str(a), validation_files=own))
    assert list(source.train()) == DOCS[:10] and list(source.validation()) == DOCS[30:]
    source = Source(config(tmp_path, files=plain, validation_files=str(a)))
    assert list(source.train()) == DOCS[20:30] and list(source.validation()) == DOCS[10:20]
    with pytest.raises(UserError, match="only validation files there.*data.validation_files names them all"):
        Source(config(tmp_path, files=str(a / "dev"), validation_files=str(a / "dev")))
    jsonl(tmp_path / "c/dev/0.jsonl", DOCS)
    with pytest.raises(UserError, match="only validation files there.*a glob takes them as they are"):
        Source(config(tmp_path, files=str(tmp_path / "c")))


README = """---
license: mit
configs:
{}
---
# Text
"""
DECLARED = [
    "- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n  - split: test\n    path: b*.jsonl",
    "- config_name: x\n  data_files: {train: [a.jsonl], validation: b.jsonl, extra: c.jsonl}",
    "- config_name: sft\n  data_files:\n  - {split: train_sft, path: ./a.jsonl}\n  - {split: test_sft, path: b.jsonl}",
    "- config_name: other\n  data_files: c.jsonl\n"
    "- config_name: chosen\n  default: true\n  data_files: {train: a.jsonl, test: b.jsonl}",
]


@pytest.mark.parametrize("configs", DECLARED)
def test_splits_that_a_readme_declares(tmp_path, caplog, configs):
    """Regression: files whose names say nothing were mixed, whatever the README.md declares, as on the Hub."""
    for name, part in (("a", DOCS[:20]), ("b", DOCS[20:30]), ("c", DOCS[30:])):
        jsonl(tmp_path / f"t/{name}.jsonl", part)
    (tmp_path / "t/README.md").write_text(README.format(configs))
    with caplog.at_level(logging.INFO):
        source = Source(config(tmp_path, files=str(tmp_path / "t")))
    assert list(source.train()) == DOCS[:20] and list(source.validation()) == DOCS[20:30]
    assert "is split by the README.md: training: a.jsonl (1 file); validation: b.jsonl (1 file)" in caplog.text
    assert list(Source(config(tmp_path, files=str(tmp_path / "t/*.jsonl"))).train()) == DOCS


@pytest.mark.parametrize("header", ["configs: 7", "configs:\n- 3\n- data_files: [1, {split: train}]", "a: [", "x"])
def test_a_readme_that_declares_nothing(tmp_path, header):
    jsonl(tmp_path / "t/train.jsonl", DOCS[:20])
    jsonl(tmp_path / "t/dev.jsonl", DOCS[20:])
    (tmp_path / "t/README.md").write_text(f"---\n{header}\n---\n")
    source = Source(config(tmp_path, files=str(tmp_path / "t")))
    assert list(source.train()) == DOCS[:20] and list(source.validation()) == DOCS[20:]


def test_a_folder_of_save_to_disk(tmp_path):
    """A DatasetDict in Arrow files; other .arrow files in its folders are caches of `datasets`."""
    import datasets

    parts = {"train": DOCS[:20], "test": DOCS[20:]}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in parts.items()}).save_to_disk(
        tmp_path / "t"
    )
    (file,) = (tmp_path / "t/train").glob("*.arrow")
    shutil.copy(file, file.with_name("cache-0.arrow"))
    source = Source(config(tmp_path, files=str(tmp_path / "t")))
    assert list(source.train()) == DOCS[:20] and list(source.validation()) == DOCS[20:]
    assert list(Source(config(tmp_path, files=str(file))).train()) == DOCS[:20]
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="train/data-00000-of-00001.arrow: cannot be read as arrow"):
        list(Source(config(tmp_path, files=str(tmp_path / "t"))).train())


# ---------------------------------------------------------------- stale copies
def test_a_link_to_the_validation_text_is_not_training_text(tmp_path):
    """Regression: of a folder and a link to it, the first in alphabetical order counted."""
    jsonl(tmp_path / "t/train/0.jsonl", DOCS[:20])
    jsonl(tmp_path / "t/validation/0.jsonl", DOCS[20:])
    (tmp_path / "t/latest").symlink_to("validation")
    (tmp_path / "t/train/all").symlink_to(tmp_path / "t")
    (tmp_path / "t/train/more").symlink_to("../validation")
    source = Source(config(tmp_path, files=str(tmp_path / "t")))
    assert list(source.train()) == DOCS[:20] and list(source.validation()) == DOCS[20:]
    (tmp_path / "t/.store").mkdir()  # the folder itself is hidden, a link to it is not
    shutil.move(tmp_path / "t/train/0.jsonl", tmp_path / "t/.store/0.jsonl")
    (tmp_path / "t/train/stored").symlink_to("../.store")
    source = Source(config(tmp_path, files=str(tmp_path / "t")))
    assert list(source.train()) == DOCS[:20] and list(source.validation()) == DOCS[20:]


def test_hidden_files_and_folders_are_no_text(tmp_path, caplog):
    kept = jsonl(tmp_path / "t/a.jsonl", DOCS[:20])
    for stale in (
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        ".git/x.txt",
        "__pycache__/b.jsonl",
        "in/.hidden/c.jsonl",
        "__MACOSX/._a.jsonl",
    ):
        jsonl(tmp_path / "t" / stale, DOCS[20:])
    for stale in (".hidden.jsonl", "~$a.jsonl", "a.jsonl~", "#a.jsonl#", ".a.jsonl.swp", "a.jsonl.bak", "in/._a.jsonl"):
        jsonl(tmp_path / "t" / stale, DOCS)
    with caplog.at_level(logging.INFO):
        assert expand("data.files", str(tmp_path / "t")) == [kept]
    assert "1 files in hidden folders .ipynb_checkpoints are left out" in caplog.text
    assert "3 files with hidden names are left out" in caplog.text
    assert "3 files of other kinds are not read: .bak, .jsonl#, .jsonl~" in caplog.text
    assert expand("data.files", str(tmp_path / "t/**/*.jsonl")) == [kept]
    assert len(expand("data.files", str(tmp_path / "t/.ipynb_checkpoints/*"))) == 1  # named, so wanted


def test_files_of_a_split_that_are_not_read_are_named(tmp_path, caplog):
    """`validation.csv` beside `train.jsonl` was passed over in silence, and the validation text drawn from training."""
    jsonl(tmp_path / "train.jsonl", DOCS[:20])
    (tmp_path / "validation.csv").write_text("text\nA document.\n")
    (tmp_path / "README.md").write_text("About the text.")
    with caplog.at_level(logging.INFO):
        expand("data.files", str(tmp_path))
    assert "1 files of other kinds are not read: .csv" in caplog.text


def test_linked_folders_are_followed_once(tmp_path):
    jsonl(tmp_path / "elsewhere/b.jsonl", DOCS[:2])
    jsonl(tmp_path / "t/a.jsonl", DOCS[2:4])
    (tmp_path / "t/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "t/loop").symlink_to(tmp_path / "t")
    (tmp_path / "t/nowhere.jsonl").symlink_to(tmp_path / "missing.jsonl")
    assert texts(tmp_path, files=str(tmp_path / "t")) == DOCS[2:4] + DOCS[:2]


def test_copies_of_validation_documents_are_counted(tmp_path, tokenizer, caplog):
    jsonl(tmp_path / "t/train.jsonl", DOCS[:30] + DOCS[50:55] + DOCS[50:55])
    jsonl(tmp_path / "t/validation.jsonl", DOCS[50:])
    with caplog.at_level(logging.INFO):
        corpus = prepare(config(tmp_path, files=str(tmp_path / "t")), tokenizer)
    assert documents(corpus.train, tokenizer) == DOCS[:30] and corpus.manifest["read"]["copies"] == 10
    assert "10 copies of validation documents" in caplog.text


def test_one_validation_file_is_cut_as_the_training_files_are(tmp_path, tokenizer, caplog):
    """Regression: it alone was cut at empty lines, so that its copy among the training files was not found."""
    for name, text in {"a": "one two\n\nthree", "b": "four\n\nfive six", "c": "seven"}.items():
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / f"{name}.txt").write_text(text)
    shutil.copy(tmp_path / "t/b.txt", tmp_path / "held.txt")
    held = str(tmp_path / "held.txt")
    with caplog.at_level(logging.INFO):
        corpus = prepare(config(tmp_path, files=str(tmp_path / "t"), validation_files=held), tokenizer)
    assert corpus.manifest["read"]["copies"] == 1
    assert len(documents(corpus.train, tokenizer)) == 2 and len(documents(corpus.validation, tokenizer)) == 1
    assert "in the validation text a document is a file" in caplog.text
    with pytest.raises(UserError, match="its 2 documents are copies of validation documents"):  # paragraphs of one file
        prepare(config(tmp_path, files=held, validation_files=str(tmp_path / "t")), tokenizer)


@pytest.mark.parametrize("own_split", [True, False])
def test_copies_that_differ_in_white_space_only(tmp_path, tokenizer, own_split):
    """The same documents saved by another editor: with a mark, Windows' line breaks, blanks at ends of lines."""
    kept = [d.replace(" ", "\n", 1) for d in DOCS]
    others = ["\ufeff{}", "{}\n", "{}  \n\n", " {}"]
    copies = [d.replace("\n", end, 1) for d, end in zip(kept[50:], ["\r\n", " \n", "\t \n", "\r"] * 3)]
    copies += [other.format(d) for d, other in zip(kept[50:], others)]
    if own_split:
        jsonl(tmp_path / "t/train.jsonl", kept[:30] + copies)
        jsonl(tmp_path / "t/validation.jsonl", kept[50:])
    else:
        jsonl(tmp_path / "t/a.jsonl", kept + copies)
    corpus = prepare(config(tmp_path, files=str(tmp_path / "t"), validation_fraction=0.3), tokenizer)
    train, held = (
        {d.split()[0:9].__str__() for d in documents(p, tokenizer)} for p in (corpus.train, corpus.validation)
    )
    assert train and held and not train & held
    if own_split:
        assert corpus.manifest["read"]["copies"] == len(copies)


# ---------------------------------------------------------------- columns and values
def test_only_the_text_column_matters(tmp_path):
    """Other columns may be missing, differ between files, or change their type within one."""
    rows = [{"text": DOCS[0], "meta": 1}, {"text": DOCS[1], "meta": {"a": [1]}}, {"text": DOCS[2], "meta": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    jsonl(tmp_path / "b.jsonl", DOCS[3:5])
    pd.DataFrame({"text": DOCS[5:7], "n": [1, 2]}).to_parquet(tmp_path / "c.parquet")
    pd.DataFrame({"text": DOCS[7:9], "n": ["x", "y"]}).to_parquet(tmp_path / "d.parquet")
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.parquet", "d.parquet")]
    assert texts(tmp_path, files=files) == DOCS[:9]


@pytest.mark.parametrize(
    "value, kind", [(7, "a number"), ([1], "a list"), ({"a": 1}, "an object"), (True, "a boolean")]
)
def test_a_text_that_is_no_string(tmp_path, tokenizer, value, kind):
    """Regression: one such value made `datasets` rewrite every document as JSON text. It is refused, or left out."""
    rows = [json.dumps({"text": d}) for d in DOCS]
    rows[37] = json.dumps({"text": value})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(UserError, match=f"a.jsonl: line 38: data.text_field=text holds {kind}, not text: "):
        prepare(config(tmp_path, files=str(path)), tokenizer)
    corpus = prepare(config(tmp_path, files=str(path), bad_rows="skip"), tokenizer)
    kept = documents(corpus.train, tokenizer) + documents(corpus.validation, tokenizer)
    assert sorted(kept) == sorted(DOCS[:37] + DOCS[38:]) and corpus.manifest["read"]["rows_bad"] == 1


def test_a_json_dataset_goes_through_the_same_reader(tmp_path):
    """data.dataset=FOLDER stands for a JSON dataset of the Hub: mixed columns are read, a number as text is refused."""
    rows = [{"text": d, "meta": i if i % 2 else str(i)} for i, d in enumerate(DOCS)]
    (tmp_path / "h").mkdir()
    path = tmp_path / "h/train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = DataConfig(dataset=str(tmp_path / "h"))
    assert list(Source(cfg).train()) == DOCS
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"text": 3}]))
    with pytest.raises(UserError, match="line 61: data.text_field=text holds a number"):
        list(Source(cfg).train())


@pytest.mark.parametrize("streaming", [True, False])
def test_a_parquet_dataset_reads_the_text_column_alone(tmp_path, streaming):
    """data.dataset=FOLDER stands for Parquet shards of the Hub, whose other columns have different types."""
    (tmp_path / "p").mkdir()
    pd.DataFrame({"text": DOCS[:9], "id": range(9)}).to_parquet(tmp_path / "p/train-00000-of-00002.parquet")
    pd.DataFrame({"text": DOCS[9:], "id": ["x"] * 51}).to_parquet(tmp_path / "p/train-00001-of-00002.parquet")
    cfg = {"dataset": str(tmp_path / "p"), "streaming": streaming}
    assert list(Source(DataConfig(**cfg)).train()) == DOCS
    with pytest.raises(UserError, match="data.dataset=.*body") as caught:
        list(Source(DataConfig(**cfg, text_field="body")).train())
    assert "\n" not in str(caught.value)


def test_the_true_line_of_bad_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 20_000 + '{"text": "cut off\n' + '{"text": "fine"}\n')
    with pytest.raises(UserError, match="a.jsonl: cannot be read as json: line 20001 is not JSON"):
        texts(tmp_path, files=str(path))
    assert len(texts(tmp_path, files=str(path), bad_rows="skip")) == 20_001


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '[\n  {\n "text": "a"\n },\n {"text": "b"}\n]',
        '{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n',
        '["a", "b"]',
        '{"text": "a"} {"text": "b"}',
        '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}\r\n{"text": null}\n{"other": 1}\n{"text": ""}',
    ],
)
def test_json_in_its_usual_shapes(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert texts(tmp_path, files=str(tmp_path / "a.json")) == ["a", "b"]


def test_a_mark_at_the_start_of_a_text_file_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfPara one\n\nPara two")
    assert texts(tmp_path, files=str(tmp_path / "a.txt")) == ["Para one", "Para two"]
    (tmp_path / "b.txt").write_bytes("ab".encode("utf-16"))
    with pytest.raises(UserError, match="b.txt: is UTF-16; convert it"):
        texts(tmp_path, files=str(tmp_path / "b.txt"))
    (tmp_path / "c.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(UserError, match="c.txt: line 2 is not UTF-8"):
        texts(tmp_path, files=str(tmp_path / "c.txt"))


def test_one_document_is_reported_without_braces(tmp_path, tokenizer):
    """Regression: the message printed the code of an f-string."""
    (tmp_path / "t.txt").write_text("one\n \ntwo")
    with pytest.raises(UserError, match="text is a single document.*data.text_unit=line") as caught:
        prepare(config(tmp_path, files=str(tmp_path / "t.txt")), tokenizer)
    assert "{" not in str(caught.value)


# ---------------------------------------------------------------- counting
@pytest.mark.parametrize("count", [FIRST_DOCUMENTS - 1, FIRST_DOCUMENTS, FIRST_DOCUMENTS + 1, 300])
def test_no_document_is_lost(tmp_path, tokenizer, count):
    """Regression: document 201 was dropped, since zip(stream, range(200)) takes one more than it returns."""
    docs = [f"document number {i} of the text" for i in range(count)]
    corpus = prepare(config(tmp_path, files=jsonl(tmp_path / "a.jsonl", docs)), tokenizer)
    kept = documents(corpus.train, tokenizer) + documents(corpus.validation, tokenizer)
    assert sorted(kept) == sorted(docs)
    assert sum(corpus.manifest[p]["documents"] for p in ("train", "validation")) == count


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 300}, {"validation_tokens": 40}, {"max_tokens": 1}])
@pytest.mark.parametrize("held", [False, True])
def test_documents_in_are_documents_out_and_left_out(tmp_path, tokenizer, limits, held):
    rows = [{"text": d} for d in DOCS] + [{"text": ""}, {"text": None}, {"text": "  \n"}, {"text": 5}, {"other": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    extra = {"validation_files": jsonl(tmp_path / "v.jsonl", [*DOCS[:9], "alone"])} if held else {}
    cfg = config(tmp_path, files=str(tmp_path / "a.jsonl"), bad_rows="skip", **limits, **extra)
    corpus = prepare(cfg, tokenizer)
    m, read = corpus.manifest, corpus.manifest["read"]
    assert read["rows"] == read["rows_empty"] + read["rows_bad"] + read["documents"] + read["documents_blank"]
    written = m["train"]["documents"] + m["validation"]["documents"]
    assert read["documents"] == written + read["copies"] + read["beyond_limits"]
    for part in ("train", "validation"):
        assert m[part]["documents"] == len(documents(getattr(corpus, part), tokenizer))
    if not limits:
        assert (read["rows_empty"], read["rows_bad"], read["documents_blank"]) == (3, 1, 1)
        assert read["copies"] == (9 if held else 0) and read["beyond_limits"] == 0


# ---------------------------------------------------------------- damaged files, disks, memory
@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_a_compressed_file_that_ends_early_is_reported(tmp_path, ending, kind):
    """zstandard's reader accepts a truncated file; a cut at the end of a line looked like a shorter corpus."""
    raw = "".join(json.dumps({"text": d}) + "\n" for d in DOCS * 20).encode()
    path = tmp_path / f"a{kind}{ending}"
    whole = COMPRESS[ending](raw)
    path.write_bytes(whole)
    assert len(texts(tmp_path, files=str(path), text_unit="line")) == len(DOCS) * 20
    for cut in (len(whole) - 1, len(whole) // 2, 5, 0):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"a{kind}{ending}: the {ending} file ends early"):
            texts(tmp_path, files=str(path), text_unit="line")
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match=rf"a{kind}{ending}: cannot be "):
        texts(tmp_path, files=str(path), text_unit="line")


def test_zstd_files_of_several_and_skippable_frames(tmp_path):
    raw = "".join(d + "\n" for d in DOCS).encode()
    skippable = struct.pack("<II", 0x184D2A50, 7) + b"ignored"
    content = zstandard.compress(raw[:700]) + skippable + zstandard.compress(raw[700:])
    (tmp_path / "a.txt.zst").write_bytes(content)
    assert texts(tmp_path, files=str(tmp_path / "a.txt.zst"), text_unit="line") == DOCS
    (tmp_path / "a.txt.zst").write_bytes(content[:-3])
    with pytest.raises(UserError, match="ends early"):
        texts(tmp_path, files=str(tmp_path / "a.txt.zst"), text_unit="line")


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_damaged_second_frame_is_reported(tmp_path, ending):
    """bz2 and lzma of the standard library drop it, and all after it, without a word."""
    lines = [json.dumps({"text": d}).encode() + b"\n" for d in DOCS]
    first, second = (COMPRESS[ending](b"".join(half)) for half in (lines[:30], lines[30:]))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(first + second)
    assert texts(tmp_path, files=str(path)) == DOCS
    path.write_bytes(first + b"??" + second[2:])
    with pytest.raises(UserError, match=f"a.jsonl{ending}: cannot be"):
        texts(tmp_path, files=str(path))


def test_padding_between_xz_streams_is_no_damage(tmp_path):
    first, second = (lzma.compress(json.dumps({"text": d}).encode() + b"\n") for d in DOCS[:2])
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(first + b"\0" * 8 + second + b"\0" * 4)
    assert texts(tmp_path, files=str(path)) == DOCS[:2]


def test_training_text_of_nothing_but_validation_documents_says_so(tmp_path, tokenizer):
    jsonl(tmp_path / "t/train.jsonl", DOCS[:9])
    jsonl(tmp_path / "t/validation.jsonl", DOCS)
    with pytest.raises(UserError, match="no train documents in t; its 9 documents are copies of validation documents"):
        prepare(config(tmp_path, files=str(tmp_path / "t")), tokenizer)


def test_a_shared_cache_is_read_without_its_lock(tmp_path, tokenizer, monkeypatch):
    """Somebody else prepared it; the lock file and the folder cannot be written here."""
    cfg = config(tmp_path, files=jsonl(tmp_path / "a.jsonl", DOCS))
    first = prepare(cfg, tokenizer)

    def denied(self, *args, **kw):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", denied)
    monkeypatch.setattr(Path, "mkdir", denied)
    assert prepare(cfg, tokenizer).fingerprint == first.fingerprint
    (first.folder / "train.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match="data.cache_dir=.*cannot write prepared tokens there: .*Permission denied"):
        prepare(cfg, tokenizer)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tokenizer, capfd):
    cfg = config(tmp_path, files=jsonl(tmp_path / "a.jsonl", DOCS * 50))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # writing more raises OSError, as a full disk does
    try:
        with pytest.raises(UserError, match="data.cache_dir=.*cannot write prepared tokens there"):
            prepare(cfg, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([".lock"], [])
    assert "Exception ignored" not in capfd.readouterr().err


def test_memory_that_runs_out_is_one_line(tmp_path, tokenizer, monkeypatch):
    def broken(texts):
        raise MemoryError

    monkeypatch.setattr(prepare_module, "encoder", lambda *_: broken)
    with pytest.raises(UserError, match="memory ran out while a.jsonl was prepared"):
        prepare(config(tmp_path, files=jsonl(tmp_path / "a.jsonl", DOCS)), tokenizer)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([".lock"], [])


@pytest.mark.parametrize("name", ["é ( [1] # =.jsonl", "**.jsonl", "a\nb.jsonl", "~x.jsonl", b"caf\xe9.jsonl"])
def test_file_names_of_every_kind(tmp_path, tokenizer, monkeypatch, name):
    """Names that look like globs, and names that are not UTF-8, whose label in curves must be storable."""
    name = os.fsdecode(name)
    monkeypatch.chdir(tmp_path)
    Path(jsonl(Path("plain"), DOCS)).rename(name)
    corpus = prepare(config(tmp_path, files=name), tokenizer)
    assert len(documents(corpus.train, tokenizer)) + len(documents(corpus.validation, tokenizer)) == len(DOCS)
    corpus.name.encode("utf-8")
    Path(name).write_bytes(b"{broken")
    with pytest.raises(UserError, match="not JSON") as caught:
        texts(tmp_path, files=name)
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize("key", ["data.files", "data.validation_files", "data.dataset", "data.prepared"])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_value_is_refused(tmp_path, tokenizer, key, value):
    """Regression: an unset shell variable trained on every text below the current folder."""
    kw = {"files": jsonl(tmp_path / "a.jsonl", DOCS)} if key == "data.validation_files" else {}
    with pytest.raises(UserError, match=f"{key}: is empty"):
        prepare(config(tmp_path, **kw, **{key.removeprefix("data."): value}), tokenizer)


def test_bad_rows_is_checked():
    with pytest.raises(UserError, match="data.bad_rows=drop: must be one of error, skip"):
        check_config(composed(["data.bad_rows=drop"]))


def test_the_cache_key_follows_how_text_is_read(tmp_path):
    """Caches of folders that are split differently now, or lost a document, must not be reused."""
    cfg = config(tmp_path, files=jsonl(tmp_path / "a.jsonl", DOCS))
    about = Source(cfg).describe()
    assert about["reading"] == 3 and "bad_rows" not in about
    assert Source(config(tmp_path, files=cfg.files, bad_rows="skip")).describe()["bad_rows"] == "skip"
    assert Source(DataConfig(dataset="a/b", validation_split="test")).describe()["reading"] == 3


# ---------------------------------------------------------------- fuzz
def broken_files(rng: np.random.Generator, folder: Path) -> None:
    """A few files of random kinds, some of them damaged."""
    pieces = [
        '{"text": "',
        '"}',
        "\n",
        "\n\n",
        "a word ",
        "é",
        "\\ud800",
        "\\u00e9",
        "7",
        "null",
        "[",
        "]",
        "{",
        "}",
        ",",
    ]
    pieces += ['"text": ', "\r\n", "\x00", "\ufeff", " ", '{"text": "fine one"}\n', '{"text": "fine two", "n": 1}\n']
    for i in range(int(rng.integers(1, 4))):
        kind = rng.choice([".txt", ".md", ".jsonl", ".json", ".parquet"])
        raw = "".join(rng.choice(pieces, int(rng.integers(0, 60)))).encode()
        if kind in (".json", ".jsonl") and rng.random() < 0.7:
            values = [str(rng.integers(9)) * int(rng.integers(9)), None, 3, {"a": 1}, "two words", " "]
            picked = [
                values[int(rng.integers(6))] if rng.random() < 0.3 else f"doc {rng.integers(50)}" for _ in range(20)
            ]
            raw = "".join(json.dumps({"text": v} if rng.random() < 0.95 else [v]) + "\n" for v in picked).encode()
        if kind == ".parquet":
            pd.DataFrame({"text": [f"doc {rng.integers(50)}" for _ in range(9)]}).to_parquet(folder / "p")
            raw = (folder / "p").read_bytes()
            (folder / "p").unlink()
        ending = rng.choice(["", "", *COMPRESS])
        raw = COMPRESS[ending](raw) if ending else raw
        if rng.random() < 0.3:  # damage
            raw = bytearray(raw)
            for _ in range(int(rng.integers(1, 4))):
                if raw:
                    raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
            raw = bytes(raw[: int(rng.integers(len(raw) + 1))] if rng.random() < 0.5 else raw)
        (folder / f"{rng.choice(['x', 'train', 'dev', 'test_'])}{i}{kind}{ending}").write_bytes(raw)


@pytest.mark.slow
def test_fuzz_of_texts_neither_crashes_nor_loses(tmp_path, tokenizer):
    """2,000 folders of odd and damaged files: a corpus whose sums agree, or one line; nothing half-written stays."""
    rng, outcomes = np.random.default_rng(0), {"prepared": 0, "refused": 0}
    for case in range(2000):
        folder = tmp_path / str(case)
        folder.mkdir()
        broken_files(rng, folder)
        skip = "skip" if rng.random() < 0.5 else "error"
        unit = str(rng.choice(["auto", "file", "paragraph", "line"]))
        cfg = config(tmp_path, files=str(folder), bad_rows=skip, text_unit=unit, cache_dir=str(folder / ".cache"))
        try:
            corpus = prepare(cfg, tokenizer)
        except UserError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error)
            left = [p.suffix for p in (folder / ".cache").iterdir()] if (folder / ".cache").exists() else []
            assert left in ([".lock"], [])
            continue
        outcomes["prepared"] += 1
        m, read = corpus.manifest, corpus.manifest["read"]
        assert read["documents"] == sum(m[p]["documents"] for p in ("train", "validation")) + read["copies"]
        assert read["rows"] == read["rows_empty"] + read["rows_bad"] + read["documents"] + read["documents_blank"]
        train = set(documents(corpus.train, tokenizer))
        assert not train & set(documents(corpus.validation, tokenizer)) - {""}
    assert min(outcomes.values()) > 300, outcomes


def test_row_reader_counts_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n{"text": 4}\nbroken\n{"text": "\\ud800"}\n')
    reader = RowReader(skip_bad=True)
    assert list(reader.texts(str(path))) == ["a"]
    assert (reader.counts.rows, reader.counts.empty, reader.counts.bad) == (5, 1, 3)

"""Prepared tokens: equal to tokenise-and-join, long documents, folders made elsewhere, the command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bottleneck.backbone.model import load_tokenizer
from bottleneck.config.checks import check_config
from bottleneck.config.schema import BackboneConfig, DataConfig
from bottleneck.core.errors import UserError
from bottleneck.data import encode as encode_module
from bottleneck.data import prepare as prepare_module
from bottleneck.data.encode import encoder, pieces
from bottleneck.data.prepare import document_hash, prepare
from conftest import ROOT, composed, sentences

DOCS = [
    *sentences(7, 150, words=60),
    "naïve – 東京\n\n\tcode = {1: 2}   \n",
    "x" * 3000,
    "<|endoftext|> in a text",
    " led by a space",
]


@pytest.fixture(scope="module")
def tokenizer(toy_backbone):
    return load_tokenizer(BackboneConfig(path=str(toy_backbone)))


def jsonl(path, docs) -> str:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    return str(path)


def simple(docs, tokenizer, limit=None) -> list[int]:
    """The ids by the tokenizer's own call, one document after the other."""
    ids = [tokenizer.eos_token_id]
    for d in docs:
        if limit is not None and len(ids) > limit:
            break
        ids += [*tokenizer(d, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return ids


@pytest.mark.parametrize("which", ["toy", "tiny"])
@pytest.mark.parametrize("batch, few_cores", [(300, 0), (300, 1 << 20), (1 << 18, 0), (1 << 18, 1 << 20)])
@pytest.mark.parametrize("limits", [{}, {"max_tokens": 3000, "validation_tokens": 500}, {"max_tokens": 1}])
def test_the_tokens_are_those_of_tokenise_and_join(tmp_path, monkeypatch, tokenizer, which, batch, few_cores, limits):
    """Same ids, order, split and counts for any batches: held-out documents first, each stream up to its limit."""
    if which == "tiny":
        tokenizer = load_tokenizer(BackboneConfig(path=str(ROOT / "data/backbones/tiny")))
    monkeypatch.setattr(encode_module, "CORE_CHARS", batch)
    monkeypatch.setattr(encode_module, "LONG_CHARS", 1000)
    monkeypatch.setattr(encode_module, "FEW_CORES", few_cores)  # words looked up, or the tokenizer alone
    cfg = DataConfig(
        files=jsonl(tmp_path / "a.jsonl", DOCS),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.2,
        seed=3,
        **limits,
    )
    corpus = prepare(cfg, tokenizer)
    hashes = {d: document_hash(d, 3) for d in DOCS}
    held = [d for d in DOCS if hashes[d] < 0.2 * 2**64 or hashes[d] == min(hashes.values())]
    train = [d for d in DOCS if d not in held]
    assert corpus.train.tolist() == simple(train, tokenizer, limits.get("max_tokens"))
    assert corpus.validation.tolist() == simple(held, tokenizer, cfg.validation_tokens)
    about = corpus.manifest["validation"]
    kept = held if not limits.get("validation_tokens") else held[: about["documents"]]
    assert about["bytes"] == sum(len(d.encode()) for d in kept) and about["tokens"] == len(corpus.validation)
    assert corpus.seconds > 0 and prepare(cfg, tokenizer).seconds is None


def joined_words(kind: str) -> Tokenizer:
    """Tokenizers that do not treat words separately: one puts a mark before every text, one joins words."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "led":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("?", "removed")
    tokenizer.train_from_iterator(sentences(2, 30), trainers.BpeTrainer(vocab_size=600, show_progress=False))
    return tokenizer


@pytest.mark.parametrize("kind", ["toy", "tiny", "led", "joining"])
def test_a_long_document_is_cut_only_where_that_changes_no_id(tokenizer, kind):
    """Joined, the pieces of a long document have its ids.

    Where a tokenizer puts a space before every text, the space at the cut is dropped; joined words forbid some cuts.
    """
    if kind in ("led", "joining"):
        own = joined_words(kind)
        encode = lambda texts: [np.array(e.ids) for e in own.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        encode = encoder(
            tokenizer if kind == "toy" else load_tokenizer(BackboneConfig(path=str(ROOT / "data/backbones/tiny")))
        )
    for joint in ("\n", " ", "\n\n  ", ". "):
        text = joint.join(sentences(3, 80))
        parts = list(pieces(text, encode, 2000))
        assert "".join(parts) == text if kind != "led" else "".join(parts).replace(" ", "") == text.replace(" ", "")
        assert np.array_equal(np.concatenate(encode(parts)), encode([text])[0])
        assert len(parts) > 10 and max(map(len, parts)) <= 4000
    assert list(pieces("x" * 9000, encode, 2000)) == ["x" * 9000]


def test_a_failure_in_the_background_is_raised_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def broken(texts):
        raise ZeroDivisionError("in a thread")

    monkeypatch.setattr(prepare_module, "encoder", lambda *_: broken)
    cfg = DataConfig(files=jsonl(tmp_path / "a.jsonl", DOCS), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ZeroDivisionError):
        prepare(cfg, tokenizer)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([".lock"], [])


@pytest.fixture
def folder(tmp_path, tokenizer):
    """Prepared tokens, copied to another place."""
    made = prepare(DataConfig(files=jsonl(tmp_path / "a.jsonl", DOCS), cache_dir=str(tmp_path / "cache")), tokenizer)
    return shutil.copytree(made.folder, tmp_path / "elsewhere")


def test_a_prepared_folder_is_opened_wherever_it_is(tmp_path, tokenizer, folder):
    first = prepare(DataConfig(files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache")), tokenizer)
    again = prepare(DataConfig(prepared=str(folder), cache_dir=str(tmp_path / "unused")), tokenizer)
    assert (again.name, again.fingerprint, again.folder) == ("a.jsonl", first.fingerprint, folder)
    assert np.array_equal(again.train, first.train) and not (tmp_path / "unused").exists()
    assert prepare(DataConfig(prepared=str(folder), name="mine"), tokenizer).name == "mine"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-2]), r"damaged \(train.bin: size\)"),
        (
            lambda f: (f / "validation.bin").write_bytes(bytes((f / "validation.bin").stat().st_size)),
            r"validation.bin: checksum",
        ),
        (lambda f: (f / "validation.bin").unlink(), "damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "damaged"),
        (lambda f: change(f, format=99), "format 99, this version reads 1"),
        (lambda f: change(f, tokenizer="0" * 16), "its tokenizer .0000000000000000. is not the backbone's"),
        (lambda f: shutil.rmtree(f), "not a folder of prepared tokens"),
    ],
)
def test_a_prepared_folder_that_does_not_fit_is_one_line(tokenizer, folder, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        prepare(DataConfig(prepared=str(folder)), tokenizer)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"data.prepared={folder}")


def change(folder, **values) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.prepared=x"], "files and prepared are given"),
        (["data=pile", "data.prepared=x"], "dataset and prepared are given"),
        (
            ["data=prepared", "data.prepared=x", "data.validation_files=y"],
            "data.validation_files: was decided when data.prepared=x was made",
        ),
        (["data=prepared", "data.prepared=x", "data.max_tokens=5"], "data.max_tokens: was decided"),
        (["data=prepared"], "or data.prepared .folder of prepared tokens."),
    ],
)
def test_a_prepared_folder_is_the_only_source(overrides, words):
    with pytest.raises(UserError, match=words):
        check_config(composed(overrides))


def test_a_run_is_the_same_from_files_and_from_a_prepared_folder(run, toy, tmp_path, capsys):
    """The command prepares and prints the folder; a run on a copy of it has the curve of the run on the files."""
    few = ["ranks=[2]", "tokens=1024"]
    prepares = [o for o in toy if "cache_dir" not in o] + [f"data.cache_dir={tmp_path / 'login'}"]
    assert prepare_module.main(prepares) == 0
    place, told = capsys.readouterr().out.splitlines()
    assert "training tokens" in told and "tokens/s" in told
    assert prepare_module.main(prepares) == 0
    assert capsys.readouterr().out.splitlines() == [place, told.split(";")[0] + "; already there"]
    copied = shutil.copytree(place, tmp_path / "copy")
    first = run(*few, run_dir=tmp_path / "a").curve
    again = run(*few, "data=prepared", f"data.prepared={copied}", "data.files=null", run_dir=tmp_path / "b").curve
    assert first["data"] == again["data"] == "toy.jsonl" and first["data_hash"] == again["data_hash"]
    assert first["heads"] == again["heads"]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["backbone=gpt5"], "backbone=gpt5: no such choice"),
        (["data=local", "data.files=nothing.txt"], "data.files=nothing.txt: no such file"),
        (["data.fles=x"], "did you mean data.files?"),
        (["data=prepared", "data.prepared=nowhere"], "data.prepared=nowhere: not a folder of prepared tokens"),
    ],
)
def test_the_command_reports_bad_input_in_one_line(capsys, overrides, words):
    assert prepare_module.main(overrides) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines

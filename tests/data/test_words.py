"""Looking words up gives the tokenizer's own ids: random texts of awkward characters, several kinds of tokenizer."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from bottleneck.data import words
from bottleneck.data.words import WordEncoder, cutter
from conftest import ROOT

# letters, numbers, contractions, all white space, combining marks, characters that become ASCII under NFC
ALPHABET = [
    *"aB's1 2 \n\t.,('_<",
    "'s",
    "'t",
    "'re",
    "don't",
    " the",
    "123",
    "  ",
    "   ",
    "\r\n",
    "<|endoftext|>",
    "\x00",
    "\x1f",
    "\x7f",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
    "é",
    "e\u0301",
    "\u0301",
    "\u0327",
    "\u0338",
    "\u212a",
    "\u037e",
    "\u1fef",
    "東",
    "\u0660",
    "²",
    "½",
    "İ",
]


def variant(digits: bool | None, blanks: bool, nfc: bool) -> Tokenizer:
    """The embedded tokenizer with Digits, added tokens of white space, and NFC, which other tokenizers have."""
    tokenizer = Tokenizer.from_file(str(ROOT / "data/backbones/tiny/tokenizer.json"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        level if digits is None else pre_tokenizers.Sequence([pre_tokenizers.Digits(digits), level])
    )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    if blanks:
        tokenizer.add_tokens(
            [AddedToken(" " * n, normalized=nfc) for n in (2, 3, 5, 7)] + [AddedToken("\t\t", normalized=False)]
        )
    return tokenizer


@pytest.mark.parametrize("digits", [None, True, False])
@pytest.mark.parametrize("blanks", [False, True])
@pytest.mark.parametrize("nfc", [False, True])
def test_words_looked_up_are_the_tokenizers_ids(digits, blanks, nfc):
    tokenizer = variant(digits, blanks, nfc)
    rng = random.Random(0)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 14))) for _ in range(6000)]
    texts += ["".join(rng.choices(ALPHABET, k=60)) for _ in range(200)]
    cut = cutter(tokenizer)
    assert all("".join(cut.findall(t)) == t for t in texts)
    whole = lambda batch: [e.ids for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
    found = WordEncoder(tokenizer, cut, whole, np.dtype("uint16"))(texts)
    wrong = [t for t, ids, own in zip(texts, whole(texts), found) if ids != own.tolist()]
    assert wrong == []


def test_english_falls_apart_into_words():
    assert cutter(variant(None, False, False)).findall("It's 12 o'clock,  naïve one") == [
        "It",
        "'s",
        " 12",
        " o",
        "'",
        "clock",
        ",",
        " ",
        " naïve",
        " one",
    ]


def test_words_are_forgotten_and_asked_for_once(monkeypatch):
    tokenizer, asked = variant(None, False, False), []

    def whole(batch):
        asked.extend(batch)
        return [e.ids for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]

    encode = WordEncoder(tokenizer, cutter(tokenizer), whole, np.dtype("uint16"))
    first = encode(["one two two", " two one"])
    assert sorted(asked) == [" one", " two", "one"]
    assert np.array_equal(encode(["one two two"])[0], first[0]) and len(asked) == 3
    monkeypatch.setattr(words, "MOST_CHARS", 5)
    assert np.array_equal(encode(["one"])[0], first[0][:1]) and list(encode.known) == ["one"] and asked[-1] == "one"


def test_other_tokenizers_are_left_whole():
    plain = variant(None, False, False)
    assert cutter(plain) is not None
    for change in (
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(
            t,
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        ),
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t.model, "dropout", 0.1),
        lambda t: t.enable_truncation(8),
        lambda t: t.add_tokens([AddedToken(" ", normalized=False)]),
        lambda t: (setattr(t, "normalizer", normalizers.NFC()), t.add_tokens([AddedToken("é", normalized=True)])),
    ):
        other = variant(None, False, False)
        change(other)
        assert cutter(other) is None

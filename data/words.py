"""Tokenising by words: if a tokenizer treats words separately, each distinct word is tokenised once and looked up.

GPT-2's byte-level pre-tokenizer (GPT-2, Pythia, OPT, SmolLM2, the embedded backbone) matches
`'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+` from left to right
and tokenises each match separately. This module finds the same matches between ASCII characters. Text that touches
another character goes to the tokenizer itself, up to the next place where every match ends in any context: between
visible ASCII and ASCII white space.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any, Callable, Optional

import numpy as np

S, V, O = r"[\t-\r ]", r"[!-~]", r"[^\t-\r -~]"  # ASCII white space, visible ASCII, everything else
SHORT = "'(?:s|t|re|ve|m|ll|d)"
NOTHING = {"type": "Sequence", "normalizers": []}  # no normalizer, as Transformers 5.17 stores it
MOST_CHARS = 1 << 24  # characters of the cached words; beyond this the cache is cleared


def parts(digits: bool, blanks: bool) -> re.Pattern:
    """The expression whose matches are the words of a text.

    Args:
        digits: the tokenizer splits numbers off first, so no white space belongs to them.
        blanks: the tokenizer has added tokens of white space, which take precedence; so white space is not cut.
    """
    if blanks:
        space = [rf"{S}{{2,}}+{V}*+(?!{O})", rf"[\t-\r](?={V}|\Z)", rf" (?=\Z{'|[0-9]' if digits else ''})"]
    else:  # all white space at the end, or before a number that is split off; elsewhere all but the last character
        space = [rf"(?={S}++(?!{O}))(?:{S}++(?=\Z{'|[0-9]' if digits else ''})|{S}+(?={S})|[\t-\r])"]
    words = [
        rf"{SHORT}(?!{O})",
        rf" ?[A-Za-z]++(?!{O})",
        rf"{'' if digits else ' ?'}[0-9]++(?!{O})",
        rf"(?!{SHORT}{O}) ?[!-/:-@\[-`{{-~]++(?!{O})",
    ]
    rest = rf"{S}*+{V}*+{O}[\s\S]*?(?:(?<={V})(?={S})|\Z)"
    return re.compile("|".join([*words, *space, rest]))


def cutter(backend: Any) -> Optional[re.Pattern]:
    """`parts` for a `tokenizers.Tokenizer`, or None if it is not of the kind described above."""
    about = json.loads(backend.to_str())
    steps = about["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [s.get("type") for s in steps]
    if kinds not in (["ByteLevel"], ["Digits", "ByteLevel"]) or about["model"].get("dropout"):
        return None
    level = steps[-1]
    if (
        not level.get("use_regex", True)
        or level.get("add_prefix_space", True)
        or about["truncation"]
        or about["padding"]
    ):
        return None
    # NFC leaves ASCII unchanged unless a combining character follows; the two are not cut apart
    if about["normalizer"] not in (None, NOTHING, {"type": "NFC"}):
        return None
    for t in about["added_tokens"]:
        # a single space takes precedence over words; a normalised token may appear in a text as other characters
        normalized = t.get("normalized") and about["normalizer"] and not t["content"].isascii()
        if t["content"] == " " or normalized:
            return None
    return parts(len(kinds) == 2, any(t["content"].isspace() for t in about["added_tokens"]))


class WordEncoder:
    """A function from texts to arrays of ids, equal to those of `whole`. It is thread-safe.

    Args:
        backend: the `tokenizers.Tokenizer`.
        cut: its `cutter`.
        whole: texts to lists of ids, by the tokenizer itself.
        dtype: of the ids.
    """

    def __init__(self, backend: Any, cut: re.Pattern, whole: Callable[[list[str]], list[list[int]]], dtype: np.dtype):
        self.cut, self.whole, self.dtype = cut, whole, dtype
        # Added tokens take precedence over words. A text is left whole if it holds one that could be cut, or one that
        # also consumes the text around it.
        added = backend.get_added_tokens_decoder().values()
        self.special = [t.content for t in added if not t.content.isspace() or t.lstrip or t.rstrip or t.single_word]
        self.known: dict[str, bytes] = {}
        self.chars = 0

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        cut = [[t] if any(s in t for s in self.special) else self.cut.findall(t) for t in texts]
        if self.chars > MOST_CHARS:
            self.known, self.chars = {}, 0  # a new dictionary, because another thread may still read the old one
        known = self.known
        new = list(set(chain.from_iterable(cut)).difference(known))
        if new:
            for word, ids in zip(new, self.whole(new)):
                known[word] = np.array(ids, self.dtype).tobytes()
            self.chars += sum(map(len, new))
        return [np.frombuffer(b"".join(map(known.__getitem__, words)), self.dtype) for words in cut]

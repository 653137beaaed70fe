"""Choose the shipped sample: a few MB of licence-clean running prose that pretraining never sees.

It consists of whole documents (files) of packages whose text is in the public domain or under a permissive licence,
taken in the order of a hash of their names, up to a quota for each package. One in six of the shorter ones is for
validation. A document is dropped, from the sample and from pretraining, if a notable share of its 8-word shingles
occurs in the pretraining text or, for validation, in the training text of the sample. `data.recipes.debian` runs this
while it builds the corpus.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from bottleneck.data.recipes.debian_text import WORD, Row, stop_share

# package: thousands of characters at most, licence of its text, regex of the paths taken
SOURCES = {
    "r-cran-janeaustenr": (950, "public domain", r"Rdata\.rdb#"),
    "sqlite3-doc": (420, "public domain", ""),
    "postgresql-doc-15": (420, "PostgreSQL License", ""),
    "python3.11-doc": (420, "PSF-2.0", "/(library|tutorial|howto|reference|faq|using|extending|whatsnew)/"),
    "rust-doc": (
        420,
        "MIT OR Apache-2.0",
        "/html/(book|reference|nomicon|cargo|rustdoc|unstable-book|rust-by-example)/",
    ),
    "nova-doc": (160, "Apache-2.0", ""),
    "cinder-doc": (160, "Apache-2.0", ""),
    "neutron-doc": (160, "Apache-2.0", ""),
    "keystone-doc": (140, "Apache-2.0", ""),
    "ironic-doc": (160, "Apache-2.0", ""),
    "swift-doc": (140, "Apache-2.0", ""),
    "apache2-doc": (240, "Apache-2.0", ""),
    "python-django-doc": (300, "BSD-3-Clause", ""),
    "python-sklearn-doc": (240, "BSD-3-Clause", ""),
    "python-scipy-doc": (140, "BSD-3-Clause", ""),
    "python-dask-doc": (100, "BSD-3-Clause", ""),
    "sphinx-doc": (100, "BSD-2-Clause", ""),
    "python-sqlalchemy-doc": (200, "MIT", ""),
    "freebsd-manpages": (240, "BSD-2-Clause AND BSD-4-Clause", ""),
    "llvm-15-doc": (240, "Apache-2.0 WITH LLVM-exception", ""),
    "libboost1.81-doc": (240, "BSL-1.0", ""),
}
SHARED = 0.10  # most that a document may share of its shingles
MIX = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str) -> np.ndarray:
    """64-bit hashes of the 8-word shingles of a text, letters only, in order."""
    ids = np.fromiter(map(hash, WORD.findall(text.lower())), np.int64).astype(np.uint64)
    total = np.zeros(max(0, len(ids) - 7), np.uint64)
    for k in range(8):
        total = (total ^ ids[k : len(total) + k]) * MIX
    return total


def notice(text: str) -> str:
    """A Debian copyright file; of a very long one the main stanza and the licences."""
    stanzas = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(x for x in stanzas if len(text) < 100_000 or x.startswith(("Files: *\n", "License:")))


class Sample:
    """The candidates among all documents (`rows`), of which `chosen` keeps those that share little with other text."""

    def __init__(self, rows: list[Row]):
        def order(row: Row) -> str:
            return hashlib.sha256(f"sample:{row['source']}:{row['path']}".encode()).hexdigest()

        left = {s: [q * 900, q * 120] for s, (q, _, _) in SOURCES.items()}
        self.rows: list[Row] = []
        for row in sorted((r for r in rows if r["source"] in SOURCES), key=order):
            size, source = len(row["text"]), row["source"]
            if not re.search(SOURCES[source][2], row["path"]) or not self.prose(row["text"]):
                continue
            if (size > 70_000 and source != "r-cran-janeaustenr") or size < 2_500:
                continue
            split = "validation" if int(order(row)[:8], 16) % 6 == 0 and size < 25_000 else "train"
            if (split == "validation" and size > left[source][1]) or size > left[source][0]:
                continue
            left[source][0] -= size
            left[source][1] -= size if split == "validation" else 0
            self.rows.append(dict(row, split=split))
        self.keys = {(r["source"], r["path"]) for r in self.rows}
        self.own = [np.unique(shingles(r["text"])) for r in self.rows]
        self.all = np.unique(np.concatenate(self.own))
        self.met = np.zeros(len(self.all), bool)

    @staticmethod
    def prose(text: str) -> bool:
        """Running text: many stop words, mostly letters, few very short lines."""
        words, lines = WORD.findall(text.lower()), [x for x in text.split("\n") if x.strip()]
        letters = sum(map(len, words)) / len(text)
        return stop_share(words) > 0.31 and letters > 0.70 and len(text) / max(1, len(lines)) > 55

    def meet(self, text: str) -> None:
        """Mark the shingles that the candidates share with a document of the pretraining text."""
        found = shingles(text)
        at = np.minimum(np.searchsorted(self.all, found), len(self.all) - 1)
        self.met[at[self.all[at] == found]] = True

    def shared(self, own: np.ndarray, with_: np.ndarray) -> float:
        """The share of `own` shingles that occur in `with_`."""
        return float(np.isin(own, with_, assume_unique=True).mean()) if len(own) else 1.0

    def chosen(self) -> dict[str, list[Row]]:
        """The documents of each split that share few shingles with other text."""
        met = self.all[self.met]
        train = [(r, o) for r, o in zip(self.rows, self.own) if r["split"] == "train" and self.shared(o, met) <= SHARED]
        seen = np.unique(np.concatenate([o for _, o in train] + [met]))
        rest = [r for r, o in zip(self.rows, self.own) if r["split"] == "validation" and self.shared(o, seen) <= SHARED]
        return {"train": [r for r, _ in train], "validation": rest}

    def summary(self) -> dict[str, Any]:
        """Documents and characters of each split."""
        out: dict[str, Any] = {}
        for split, rows in self.chosen().items():
            out[split] = {"documents": len(rows), "characters": sum(len(r["text"]) for r in rows)}
        return dict(out, candidates=len(self.rows))

    def write(self, folder: Path, copyrights: dict[str, str]) -> None:
        """Write both splits, and the copyright file of every package used, because the licences ask to keep it."""
        folder.mkdir(parents=True, exist_ok=True)
        used = sorted({r["source"] for rows in self.chosen().values() for r in rows})
        (folder / "NOTICES.txt").write_text(
            "".join(f"{'=' * 20} {n}\n\n{notice(copyrights.get(n, ''))}\n\n" for n in used), encoding="utf-8"
        )
        for split, rows in self.chosen().items():
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as f:
                for r in rows:
                    f.write(json.dumps({k: r[k] for k in ("text", "source", "path")}, ensure_ascii=False) + "\n")

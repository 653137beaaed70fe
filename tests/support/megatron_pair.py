"""Train the same heads on a text and on a Megatron pair of its tokens; compare the heads bit for bit.

python tests/support/megatron_pair.py --tokens 200e6 --folder FOLDER        exit code 1 if anything differs

The pair is made without the code under test: by the `tokenizers` package and a writer made from Megatron's layout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import composed, heads_of  # noqa: E402
from support.token_writers import megatron  # noqa: E402

BATCH = 2000  # documents tokenised at once
TOKENS_A_WORD = 2.0  # about, of the invented words


def documents(count: int, seed: int):
    """Documents of 20 to 800 invented words, frequent and rare ones."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    lexicon = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(5_000)]
    for _ in range(count):
        picked = (len(lexicon) * rng.random(int(rng.integers(20, 800))) ** 3).astype(int)
        yield " ".join([lexicon[i] for i in picked.tolist()]) + "."


def build(folder: Path, tokens: float, tokenizer_file: Path) -> dict[str, int]:
    """Write train and validation text as jsonl, and Megatron pairs of their tokens. Returns the ids of each."""
    from tokenizers import Tokenizer

    tokenizer, counts = Tokenizer.from_file(str(tokenizer_file)), {}
    for seed, (part, wanted) in enumerate((("train", tokens), ("validation", 60_000))):
        ids: list[np.ndarray] = []
        total = 0
        with open(folder / f"{part}.jsonl", "w") as f:
            stream = documents(int(wanted / 410 / TOKENS_A_WORD * 4), seed)
            while total < wanted and (batch := list(itertools.islice(stream, BATCH if wanted > 1e6 else 50))):
                f.writelines(json.dumps({"text": d}) + "\n" for d in batch)
                found = tokenizer.encode_batch(batch, add_special_tokens=False)
                ids += [np.array(e.ids, np.uint16) for e in found]
                total += sum(len(e.ids) for e in found)
        megatron(folder / part, ids)
        counts[part] = total
    return counts


def compare(folder: Path, tokens: float, overrides: list[str], tokenizer_file: Path) -> dict[str, object]:
    """Build both and train on both. Returns what was found; `same` is whether heads, losses and identity agree."""
    from train import train

    start = time.perf_counter()
    found: dict[str, object] = {"ids": build(folder, tokens, tokenizer_file)}
    found["seconds to build"] = round(time.perf_counter() - start)
    sources = {
        "text": ["data=local", *(f"data.{k}={folder / v}.jsonl" for k, v in
                 (("files", "train"), ("validation_files", "validation"))), f"data.cache_dir={folder / 'cache'}"],
        "pair": ["data=tokens", *(f"data.{k}={folder / v}.bin" for k, v in
                 (("tokens", "train"), ("validation_files", "validation")))],
    }  # fmt: skip
    curves, heads = [], []
    for name, own in sources.items():
        start = time.perf_counter()
        curves.append(train(composed([*overrides, *own, "trainer=cpu"]), folder / name).curve)
        heads.append(heads_of(folder / name))
        found[f"seconds on {name}"] = round(time.perf_counter() - start)
    bits = all(np.array_equal(heads[0][k][m], heads[1][k][m]) for k in heads[0] for m in ("A", "B"))
    agree = [curves[0][k] == curves[1][k] for k in ("heads", "reference", "data_hash", "validation_tokens")]
    return found | {"heads": len(heads[0]), "same": bits and all(agree) and heads[0].keys() == heads[1].keys()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=200e6, help="training tokens of the pair (default: 200e6)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the runs")
    args = parser.parse_args()
    overrides = ["ranks=[8,64]", "tokens=131072", *args.overrides]
    tokenizer = Path(composed(overrides).backbone.path) / "tokenizer.json"
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        found = compare(Path(name), args.tokens, overrides, tokenizer)
    print(json.dumps(found))
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main())

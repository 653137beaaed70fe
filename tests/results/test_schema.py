"""Damaged files: every damage to curve.json and metrics.csv is one line in curve, race and report."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any, Callable

import pytest

from bottleneck.core.errors import UserError
from bottleneck.core.extensions import metrics
from bottleneck.results import curve, schema
from bottleneck.results import tokens_to_equal_loss as race
from conftest import ROOT
from support.curves import commands, save, whole


def _band_tokens(c: dict[str, Any]) -> None:
    for row in (c["reference"], *c["heads"]):
        row["bands"][0]["tokens"] = 9


# in place, or a new content that is returned
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another object": (lambda c: [c], "not an object"),
    "a newer schema": (lambda c: c | {"schema": 2}, "schema 2, this version reads 1"),
    "schema true": (lambda c: c | {"schema": True}, "schema True"),
    "no recipe": (lambda c: {k: v for k, v in c.items() if k != "recipe"}, "it lacks recipe"),
    "no heads": (lambda c: c | {"heads": []}, "not a non-empty list"),
    "heads an object": (lambda c: c | {"heads": {"8": c["heads"][0]}}, "its heads is"),
    "head a number": (lambda c: c["heads"].append(3), "a head is not an object"),
    "head twice": (lambda c: c["heads"].append(dict(c["heads"][0])), "duplicate head of rank 8, lr 0.1, seed 0"),
    "no loss": (lambda c: c["heads"][0].__delitem__("loss"), "a head lacks loss"),
    "loss text": (lambda c: c["heads"][0].update(loss="2.5"), "loss is 2.5, not a number or null"),
    "loss true": (lambda c: c["heads"][0].update(loss=True), "loss is True"),
    "loss NaN": (lambda c: c["heads"][0].update(loss=math.nan), "loss is nan"),
    "loss negative": (lambda c: c["heads"][0].update(loss=-2.5), "loss is -2.5"),
    "loss changed": (lambda c: c["heads"][0].update(loss=2.4), "which is not exp(loss)"),
    "loss null": (lambda c: c["heads"][0].update(loss=None), "has loss None and perplexity"),
    "perplexity infinite": (lambda c: c["heads"][0].update(perplexity=math.inf), "perplexity is inf"),
    "perplexity null": (lambda c: c["heads"][0].update(perplexity=None), "has loss 2.5 and perplexity None"),
    "bits changed": (lambda c: c["heads"][0].update(bits_per_byte=0.5), "another ratio than its reference"),
    "rank changed": (lambda c: c["heads"][0].update(rank=9), "has 1312 parameters, not rank"),
    "rank a fraction": (lambda c: c["heads"][0].update(rank=8.5), "rank is 8.5, not a whole number above 0"),
    "rank huge": (lambda c: c["heads"][0].update(rank=10**30), "rank is 1000000000000000000"),
    "rank beyond d": (lambda c: c["heads"][2].update(rank=128, parameters=128 * 164), "more than hidden_size = 64"),
    "rate zero": (lambda c: c["heads"][0].update(lr=0), "lr is 0, not a number above 0"),
    "seed text": (lambda c: c["heads"][0].update(seed="0"), "seed is 0, not a whole number"),
    "status unknown": (lambda c: c["heads"][0].update(status="fine"), "status is fine, not ok or diverged"),
    "agreement above one": (lambda c: c["heads"][0].update(top1_agreement=1.5), "not a share from 0 to 1"),
    "KL text": (lambda c: c["heads"][0].update(kl="small"), "kl is small"),
    "band lost": (lambda c: c["heads"][0]["bands"].__delitem__(1), "are not those of its reference"),
    "band changed": (lambda c: c["heads"][0]["bands"][0].update(loss=1.0), "the loss is 2.5"),
    "band tokens": (_band_tokens, "309 tokens"),
    "group lost": (lambda c: c["heads"][0]["group_losses"].__delitem__(0), "11 group_losses, its reference 12"),
    "group changed": (lambda c: c["heads"][0]["group_losses"].__setitem__(0, 9.0), "the loss is 2.5"),
    "group tokens": (lambda c: c["reference"]["group_tokens"].__setitem__(0, 0), "a list of whole numbers above 0"),
    "reference a list": (lambda c: c | {"reference": [2.0]}, "its reference is [2.0], not an object"),
    "reference without numbers": (lambda c: c | {"reference": {}}, "its reference lacks numbers"),
    "hidden size null": (lambda c: c | {"hidden_size": None}, "hidden_size is None"),
    "tokens negative": (lambda c: c | {"tokens": -1}, "tokens is -1"),
    "name a number": (lambda c: c | {"backbone": 3}, "backbone is 3, not a string"),
    "recipe infinite": (lambda c: c["recipe"].update(eps=math.inf), "holds inf"),
    "versions text": (lambda c: c | {"versions": "2"}, "versions is 2, not an object"),
    "curves of junk": (lambda c: {"schema": 1, "curves": [c, 3]}, "not an object"),
    "curves of another schema": (lambda c: {"schema": 3, "curves": [c]}, "schema 3"),
    "KL huge": (lambda c: c["heads"][0].update(kl=10**400), "kl is 1000"),
    "cut off": (lambda c: json.dumps(c).encode()[:700], "not a curve of bottleneck"),
    "empty": (lambda c: b"", "not a curve of bottleneck"),
    "not UTF-8": (lambda c: b'{"schema": "\xff"}', "not a curve of bottleneck"),
    "zeros": (lambda c: b"\0" * 4096, "not a curve of bottleneck"),
    "nested without end": (lambda c: b"[" * 100_000, "not a curve of bottleneck"),
    "a key twice": (
        lambda c: json.dumps(c).replace('"seed": 0', '"seed": 0, "seed": 1', 1).encode(),
        "duplicate key 'seed'",
    ),
    "a number of 5,000 digits": (
        lambda c: json.dumps(c).replace("1312", "9" * 5000, 1).encode(),
        "not a curve of bottl",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_curve_is_one_line(tmp_path, capsys, name):
    damage, words = DAMAGE[name]
    content = whole()
    damaged = damage(content)
    run = save(tmp_path / "run", content if damaged is None else damaged)
    good = save(tmp_path / "good", whole())
    for command, call in commands(run, good, tmp_path / "out").items():
        assert call() == 2, command
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and len(error) < 500, (command, error)
    assert not (tmp_path / "out").exists()


def test_a_whole_curve_is_accepted(tmp_path):
    """The undamaged curve is accepted, also without any one of its optional keys."""
    assert schema.fault(whole()) is None
    for key in [f.name for f in schema.CURVE if not f.required]:
        assert schema.fault({k: v for k, v in whole().items() if k != key}) is None, key
    for field in (*schema.HEAD, *schema.metric_fields()):
        c = whole()
        if not field.required and field.name != "bands":
            for h in c["heads"]:
                h.pop(field.name, None)
            assert schema.fault(c) is None, field.name
    c = whole() | {"a key of tomorrow": {"x": [None]}}
    assert schema.fault(c) is None


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace("1000", "1e3"), "invalid literal for int"),
        (lambda text: text.replace("3.5", "three"), "could not convert"),
        (lambda text: "\0" + text, "no losses along training"),
        (lambda text: text.split("\n", 1)[1], "no losses along training"),
        (lambda text: "", "no losses along training"),
        (lambda text: "\n".join(text.splitlines()[:-1]), "r64_lr1e-1_s0 after 0 tokens"),
        (lambda text: text.replace(",2.1", ",2.05"), "curve.json has 2.1 after 1000"),
        (lambda text: text.replace(",2.1", ",nan"), "ends with loss nan"),
        (lambda text: text + "9,1000,val/loss,r8_lr1e-1_s0,2.7\n", "has losses 2.5 and 2.7 after 1000 tokens"),
        (lambda text: text + '9,1000,val/loss,"r8', "no losses along training"),
    ],
)
def test_damaged_metrics_are_one_line(tmp_path, capsys, change, words):
    """A metrics.csv of another run, or a truncated one, would give wrong numbers."""
    good, run = save(tmp_path / "good", whole()), save(tmp_path / "run", whole())
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(change(text))
    assert race.main([str(good), str(run), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and not (tmp_path / "out").exists()
    (run / "metrics.csv").write_bytes(text.encode("utf-16"))
    assert race.main([str(run), str(good), "--out", str(tmp_path / "out")]) == 2


def test_the_documented_format_is_the_one_that_is_checked():
    """docs/curve_format.md is generated; every key of a whole curve is in it, and every metric."""
    text = (ROOT / "docs" / "curve_format.md").read_text()
    assert text == schema.markdown(), "python -m bottleneck.results.schema > docs/curve_format.md"
    c = whole()
    for row in (c, c["reference"], *c["heads"], *c["knee"]):
        assert all(f"| `{key}` |" in text for key in row), set(row)
    assert all(f"| `{m.name}` |" in text for m in metrics())


JUNK: tuple[Any, ...] = (
    None,
    True,
    "",
    "x",
    -1,
    0,
    1,
    2**63,
    10**400,
    0.5,
    -0.5,
    1e308,
    math.nan,
    math.inf,
    [],
    {},
    [[]],
    {"a": {}},
    "\ud800",
    "$x$",
    "<b>",
)
# keys that are only for people, or that are computed anew: any value of their kind is accepted
FREE = {"backbone", "backbone_hash", "data", "data_hash", "recipe", "versions", "tokens", "schema"} | {
    "best", "knee", "trained_reference", "metrics", "init", "seed", "lr", "initial_loss", "status", "kind", "options",
    "kl", "top1_agreement", "top5_agreement", "acceptance", "loss_interval", "perplexity_interval", "excess_interval",
    "group_losses", "bands",
}  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in inner for p in places(v, (*path, key)))]


def damaged(rng: random.Random, c: dict[str, Any]) -> tuple[Any, tuple]:
    """One random change of a copy of a curve, and where it is."""
    c = copy.deepcopy(c)
    path = rng.choice([p for p in places(c) if p])
    parent = c
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    kind = rng.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(old, (int, float)) and not isinstance(old, bool):
        parent[key] = rng.choice([old * 10, old + 1, -old, old / 2, old * (1 + 1e-3), str(old)])
    elif kind == 2 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice(parent)))
    elif kind == 3 and isinstance(parent, dict):
        other = rng.choice(list(parent))
        parent[key], parent[other] = parent[other], old
        return c, (*path, other)
    else:
        parent[key] = rng.choice(JUNK)
    return c, path


def numbers(c: dict[str, Any]) -> dict[tuple, Any]:
    """What a reader takes from a curve: the loss of every rank, and what it is compared with."""
    found = {("own",): c["reference"]["loss"], ("d",): c["hidden_size"], ("V",): c["vocab_size"]}
    return found | {("rank", h["rank"]): (h["loss"], h["perplexity"]) for h in c["heads"]}


def check_fuzz(seed: int, cases: int, tmp_path: Path, capsys: Any) -> dict[int, int]:
    """Random damage: a refusal in one line, or the same numbers. Pictures are drawn for a part of what is accepted."""
    rng, base = random.Random(seed), whole()
    good, want = save(tmp_path / "good", base), numbers(base)
    codes = {0: 0, 2: 0}
    for case in range(cases):
        content, path = damaged(rng, base)
        try:
            raw = json.dumps(content).encode()
        except ValueError:  # a whole number beyond Python's limit on digits
            raw = json.dumps(base).replace("1312", "9" * 5000, 1).encode()
        if case % 7 == 0:  # and damage to bytes
            place = rng.randrange(len(raw))
            raw = rng.choice([raw[:place], raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]])
        run = save(tmp_path / "run", raw)
        try:
            curves = curve.merge(curve.read([run]))
        except UserError as error:
            codes[2] += 1
            assert "\n" not in str(error) and len(str(error)) < 600, (seed, case, path)
            continue
        codes[0] += 1
        free = any(key in FREE for key in path) or case % 7 == 0
        lost = len(path) == 2 and path[0] == "heads"  # one head more or less is another curve, and a valid one
        for c in curves:
            found = numbers(c)
            if lost:
                assert {k: v for k, v in found.items() if k in want} == {k: v for k, v in want.items() if k in found}
            elif not free and set(path) != {"vocab_size", "hidden_size"}:  # exchanged, they give the same r (V + d)
                assert found == want, (seed, case, path)
        if case % 20 == 0:
            for name, call in commands(run, good, tmp_path / "out").items():
                code = call()
                error = capsys.readouterr().err
                assert code in (0, 2) and error.count("\n") == (code == 2), (seed, case, path, name, error)
    return codes


def test_random_damage(tmp_path, capsys):
    codes = check_fuzz(0, 150, tmp_path, capsys)
    assert codes[2] > 50, codes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_more_random_damage(tmp_path, capsys, seed):
    codes = check_fuzz(seed, 500, tmp_path, capsys)
    assert codes[2] > 200, codes

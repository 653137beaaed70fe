"""The format of curve.json: its keys, what their values must be, and the checks on reading.

docs/curve_format.md is generated from this module: `python -m bottleneck.results.schema > docs/curve_format.md`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

from bottleneck.core.extensions import metrics

SCHEMA = 1
FINITE = sys.float_info.max
LARGEST = 2**53  # whole numbers beyond it are not exact in JSON readers
OVERFLOWS = 700  # nats: from here on a perplexity is null
# Two heads are comparable, and share a line of the picture, if all of these are equal.
IDENTITY = ("backbone_hash", "data_hash", "tokens", "recipe")
NUMBERS = ("loss", "perplexity", "bits_per_byte")


class Kind(NamedTuple):
    """What a value must be."""

    fits: Callable[[Any], bool]
    words: str


class Field(NamedTuple):
    """A key of an object in curve.json."""

    name: str
    kind: Kind
    meaning: str
    required: bool = True


def _number(x: Any) -> bool:
    # compared, not converted: whole numbers may be too large for a float
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -FINITE <= x <= FINITE


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < LARGEST


def _numbers(x: Any) -> bool:
    return isinstance(x, list) and all(v is None or _number(v) for v in x)


def _interval(x: Any) -> bool:
    return x is None or (isinstance(x, list) and len(x) == 2 and _numbers(x))


def _bands(x: Any) -> bool:
    return isinstance(x, list) and all(
        isinstance(b, dict)
        and isinstance(b.get("band"), str)
        and _whole(b.get("tokens"))
        and "loss" in b
        and (b["loss"] is None or _loss(b["loss"]))
        for b in x
    )


def _domains(x: Any) -> bool:
    return isinstance(x, list) and all(
        isinstance(d, dict)
        and isinstance(d.get("domain"), str)
        and _whole(d.get("tokens"))
        and all(n in d and (d[n] is None or _loss(d[n])) for n in NUMBERS)
        for d in x
    )


def _loss(x: Any) -> bool:
    return _number(x) and x >= -1e-3  # a mean of float32 losses near 0 may round below it


COUNT = Kind(lambda x: _whole(x) and x > 0, "a whole number above 0")
WHOLE = Kind(_whole, "a whole number")
RATE = Kind(lambda x: _number(x) and x > 0, "a number above 0")
LOSS = Kind(lambda x: x is None or _loss(x), "a number or null")
NUMBER = Kind(lambda x: x is None or _number(x), "a number or null")
SHARE = Kind(lambda x: x is None or (_number(x) and -1e-3 <= x <= 1 + 1e-3), "a share from 0 to 1, or null")
TEXT = Kind(lambda x: isinstance(x, str), "a string")
STATUS = Kind(lambda x: x in ("ok", "diverged"), "ok or diverged")
FLAG = Kind(lambda x: isinstance(x, bool), "true or false")
OBJECT = Kind(lambda x: isinstance(x, dict), "an object")
HEADS = Kind(lambda x: isinstance(x, list) and bool(x), "a non-empty list")
BANDS = Kind(_bands, "a list of bands")
DOMAINS = Kind(_domains, "a list of domains")
COUNTS = Kind(lambda x: isinstance(x, list) and all(_whole(v) and v > 0 for v in x), "a list of whole numbers above 0")
LOSSES = Kind(_numbers, "a list of numbers or nulls")
INTERVAL = Kind(_interval, "[low, high] or null")
OBJECTS = Kind(lambda x: isinstance(x, list) and all(isinstance(v, dict) for v in x), "a list of objects")
TRAINED = Kind(lambda x: x is None or isinstance(x, dict), "an object or null")
VERSION = Kind(lambda x: _whole(x), "a whole number")

CURVE = (
    Field("schema", VERSION, f"version of this format: {SCHEMA}"),
    Field("backbone", TEXT, "name of the backbone"),
    Field("backbone_hash", TEXT, "identity of the backbone's weights"),
    Field("hidden_size", COUNT, "d, width of the hidden states"),
    Field("vocab_size", COUNT, "V, rows of the head"),
    Field("tokens", WHOLE, "training tokens that each head has seen"),
    Field("data", TEXT, "name of the text"),
    Field("data_hash", TEXT, "identity of training and validation tokens"),
    Field("validation_tokens", COUNT, "number of tokens in the mean of every loss", False),
    Field("recipe", OBJECT, "settings that results depend on; some are left out if they have their default"),
    Field("reference", OBJECT, "the original head, see below"),
    Field("target", OBJECT, "the target of head.teacher=model:PATH, with which metrics compare, see below", False),
    Field("heads", HEADS, "one object for each trained head, see below"),
    Field(
        "trained_reference",
        TRAINED,
        "numbers of the best trained matrix (kinds low_rank, full) of rank r = d; null without one",
        False,
    ),
    Field("knee", OBJECTS, "smallest ranks that are good enough, see below", False),
    Field("metrics", OBJECTS, "declarations of metrics of plugins: name, title, unit, …", False),
    Field("versions", OBJECT, "package versions, commit, system and device of the run", False),
)
MEASURED = (
    Field("loss", LOSS, "cross-entropy in nats a token, mean over the validation tokens; null if not finite"),
    Field("perplexity", NUMBER, f"exp(loss); null from {OVERFLOWS} nats on"),
    Field("bits_per_byte", LOSS, "loss · tokens / (ln 2 · bytes of the validation text)"),
)
DETAILS = (
    Field("bands", BANDS, "loss by frequency of the target token: a list of {band, tokens, loss}", False),
    Field(
        "domains",
        DOMAINS,
        "numbers by text of data.mix: a list of {domain, tokens, loss, perplexity, bits_per_byte}",
        False,
    ),
    Field("group_losses", LOSSES, "mean losses of consecutive stretches of the validation text, to 7 decimals", False),
    Field("loss_interval", INTERVAL, "95 % confidence interval of the loss over validation text", False),
    Field("perplexity_interval", INTERVAL, "95 % confidence interval of the perplexity", False),
)
REFERENCE = (*MEASURED, *DETAILS, Field("group_tokens", COUNTS, "tokens of each stretch in group_losses", False))
HEAD = (
    Field("rank", COUNT, "r of W = A B"),
    Field("lr", RATE, "peak learning rate"),
    Field("seed", WHOLE, "seed of the random start"),
    Field("init", TEXT, "how the head started: head.init"),
    Field("parameters", COUNT, "parameters of the head: r (V + d) for W = A B"),
    *MEASURED,
    Field("initial_loss", LOSS, "validation loss before the first step; null if not finite"),
    Field("status", STATUS, "diverged: a gradient was not finite, or the loss is above 1.5 · max(initial loss, log V)"),
    Field("best", FLAG, "lowest validation loss of its start, kind, options and rank"),
    Field("kind", TEXT, "head.kind, if it is not low_rank", False),
    Field("options", OBJECT, "options of its kind that differ from their defaults", False),
    Field("bytes_per_token", COUNT, "bytes read to decode one token alone, 16 bits; if absent: 2 · parameters", False),
    Field("flops_per_token", COUNT, "FLOPs of the products for one token; if absent: 2 · parameters", False),
    Field("step_ms", RATE, "milliseconds of a training step of the head alone, median; only if measured", False),
    Field(
        "decode_ms", RATE, "milliseconds of the head for one decoded token, batch 1, median; only if measured", False
    ),
    Field("timing", OBJECT, "what step_ms and decode_ms were measured on: device, tokens, dtype, versions", False),
    *DETAILS,
    Field("excess_interval", INTERVAL, "95 % interval of loss minus the original head's loss, paired by token", False),
)
TARGET = (
    Field("name", TEXT, "name of the target"),
    Field("hash", TEXT, "identity of the target's weights"),
    Field("loss", LOSS, "cross-entropy of the target in nats a token"),
    Field("original", OBJECT, "metrics of the backbone's original head, compared with the target"),
)
KNEE = (
    Field("init", TEXT, "start of the heads, with kind and options if that is not low_rank"),
    Field("percent", RATE, "x: the loss may exceed the original head's by x %"),
    Field("rank", NUMBER, "smallest rank that is good enough, interpolated in log2 r; null: none of the trained ranks"),
    Field("low", NUMBER, "smallest over seeds; null with one seed"),
    Field("high", NUMBER, "largest over seeds; null with one seed"),
    Field("mean", NUMBER, "mean over seeds; null with one seed"),
    Field("seeds", COUNT, "seeds that were trained"),
    Field("reached", WHOLE, "seeds that have a good enough rank"),
    Field("interval", INTERVAL, "95 % confidence interval of `rank`; null as upper end: above all trained", False),
)


def metric_fields() -> tuple[Field, ...]:
    """Keys of heads that the registered metrics give."""
    kinds = {"share": SHARE}
    return tuple(
        Field(m.name, kinds.get(m.scale, NUMBER), f"{m.summary}; {m.better} is better", False) for m in metrics()
    )


def head_columns() -> tuple[str, ...]:
    """Columns of curve.csv that every head has, in order."""
    return tuple(f.name for f in HEAD if f.required)


def identity(c: dict[str, Any]) -> list[Any]:
    """What the heads of one curve have in common; a target belongs to it, since metrics compare with it."""
    return [*(c[k] for k in IDENTITY), (c.get("target") or {}).get("hash")]


def head_identity(h: dict[str, Any]) -> tuple:
    """The keys that identify a head within its curve."""
    return (h["init"], h.get("kind", "low_rank"), _options(h), h["rank"], h["lr"], h["seed"])


def series(h: dict[str, Any]) -> str:
    """Name of the line that a head belongs to: its start, and its kind if that is not W = A B."""
    kind = h.get("kind", "low_rank")
    return h["init"] if kind == "low_rank" and not h.get("options") else f"{h['init']}, {kind}{_options(h)}"


def _options(h: dict[str, Any]) -> str:
    return "".join(f" {k}={v}" for k, v in sorted(h.get("options", {}).items()))


def fault(c: Any) -> Optional[str]:
    """What is wrong with a parsed curve.json, or None."""
    if not isinstance(c, dict):
        return "not an object"
    if "schema" in c and (c["schema"] != SCHEMA or isinstance(c["schema"], bool)):
        return f"schema {str(c['schema'])[:40]}, this version reads {SCHEMA}"
    lacking = sorted({f.name for f in CURVE if f.required} - c.keys())
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    return next(_faults(c), None)


def _faults(c: dict[str, Any]) -> Iterator[str]:
    yield from _wrong_kinds(c, CURVE, "its")
    reference = c["reference"]
    if set(NUMBERS) - reference.keys():
        yield "its reference lacks numbers"
    yield from _wrong_kinds(reference, REFERENCE, "its reference's")
    yield from _wrong_numbers(reference, reference, "its reference")
    if "target" in c:
        missing = [f.name for f in TARGET if f.name not in c["target"]]
        if missing:
            yield f"its target lacks {', '.join(missing)}"
        yield from _wrong_kinds(c["target"], TARGET, "its target's")
    known = (*HEAD, *metric_fields())
    seen: set[tuple] = set()
    for h in c["heads"]:
        if not isinstance(h, dict):
            yield "a head is not an object"
        missing = [f.name for f in HEAD if f.required and f.name not in h]
        if missing:
            yield f"a head lacks {', '.join(missing)}"
        yield from _wrong_kinds(h, known, "a head's")
        yield from _wrong_head(h, c)
        if head_identity(h) in seen:
            yield f"duplicate head of rank {h['rank']}, lr {h['lr']}, seed {h['seed']}"
        seen.add(head_identity(h))
    yield from _not_json(c)


def _wrong_kinds(row: dict[str, Any], fields: tuple[Field, ...], whose: str) -> Iterator[str]:
    for field in fields:
        if field.name in row and not field.kind.fits(row[field.name]):
            yield f"{whose} {field.name} is {str(row[field.name])[:40]}, not {field.kind.words}"


def _wrong_numbers(row: dict[str, Any], reference: dict[str, Any], whose: str) -> Iterator[str]:
    """Numbers that contradict each other: one of them has been damaged."""
    loss, perplexity, bits = (row[n] for n in NUMBERS)
    if loss is None or perplexity is None:
        if (perplexity is not None) or (loss is not None and loss < OVERFLOWS):
            yield f"{whose} has loss {loss} and perplexity {perplexity}"
    elif perplexity <= 0 or abs(math.log(perplexity) - loss) > 1e-6 * max(1, loss):
        yield f"{whose} has loss {loss} and perplexity {perplexity}, which is not exp(loss)"
    if (bits is None) != (loss is None):
        yield f"{whose} has loss {loss} and bits_per_byte {bits}"
    base = reference["loss"], reference["bits_per_byte"]
    if loss and bits is not None and base[0] and base[1] and abs(bits / loss * base[0] / base[1] - 1) > 1e-6:
        yield f"{whose} has loss {loss} and bits_per_byte {bits}, another ratio than its reference"


def _wrong_head(h: dict[str, Any], c: dict[str, Any]) -> Iterator[str]:
    whose, reference = f"its head of rank {h['rank']}", c["reference"]
    yield from _wrong_numbers(h, reference, whose)
    if h["status"] == "ok" and h["loss"] is None:
        yield f"{whose} is ok but has no loss"
    if h.get("kind", "low_rank") == "low_rank":
        d, V = c["hidden_size"], c["vocab_size"]
        if h["rank"] > d:
            yield f"{whose} has more than hidden_size = {d} ranks"
        if h["parameters"] != h["rank"] * (V + d):
            yield f"{whose} has {h['parameters']} parameters, not rank · (vocab_size + hidden_size)"
    bands = [[(b["band"], b["tokens"]) for b in row.get("bands", [])] for row in (h, reference)]
    if (h.get("kl") is not None or bands[0]) and bands[0] != bands[1]:
        yield f"the bands of {whose} are not those of its reference"
    domains = [[(d["domain"], d["tokens"]) for d in row.get("domains", [])] for row in (h, reference)]
    if domains[0] != domains[1]:
        yield f"the domains of {whose} are not those of its reference"
    for row, name in ((h, whose), (reference, "its reference")):
        yield from _wrong_parts(
            row, [(d["tokens"], d["loss"]) for d in row.get("domains", [])], c, f"the domains of {name}"
        )
        parts = [(b["tokens"], b["loss"]) for b in row.get("bands", []) if b["tokens"]]
        yield from _wrong_parts(row, parts, c, f"the bands of {name}")
        if "group_losses" in row:
            tokens = reference.get("group_tokens", [])
            if len(tokens) != len(row["group_losses"]):
                yield f"{name} has {len(row['group_losses'])} group_losses, its reference {len(tokens)} group_tokens"
            yield from _wrong_parts(row, list(zip(tokens, row["group_losses"])), c, f"the group_losses of {name}")


def _wrong_parts(row: dict[str, Any], parts: list[tuple[int, Any]], c: dict[str, Any], whose: str) -> Iterator[str]:
    """Finds losses of parts of the text that do not add up to the whole."""
    total = sum(tokens for tokens, _ in parts)
    if parts and "validation_tokens" in c and total != c["validation_tokens"]:
        yield f"{whose} have {total} tokens, validation_tokens is {c['validation_tokens']}"
    if parts and row["loss"] is not None and all(x is not None for _, x in parts):
        mean = sum(tokens * x for tokens, x in parts) / total
        if abs(mean - row["loss"]) > 0.02 * max(1, abs(row["loss"])):  # 16-bit runs round differently
            yield f"{whose} have mean {mean:.6g}, the loss is {row['loss']:.6g}"


def _not_json(value: Any, where: str = "it") -> Iterator[str]:
    """Finds numbers anywhere that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where} holds {value}"
    elif isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_json(inner, f"{where}, {str(key)[:40]}" if where != "it" else f"its {str(key)[:40]}")


def parse(text: str) -> Any:
    """Parsed JSON. Raises ValueError for a duplicate key, and for too deeply nested values."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            doubled = next(k for i, (k, _) in enumerate(pairs) if k in {p[0] for p in pairs[:i]})
            raise ValueError(f"duplicate key {doubled[:40]!r} in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def printable(value: Any) -> Any:
    """A value with bytes of file names that are not UTF-8, which Python keeps as lone surrogates, written as \\xNN."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if _odd(value) else value
    if isinstance(value, dict):
        return {printable(k): printable(v) for k, v in value.items()}
    return [printable(v) for v in value] if isinstance(value, list) else value


def _odd(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def markdown() -> str:
    """docs/curve_format.md."""
    tables = (
        ("A curve", CURVE),
        ("`reference`: the original head", REFERENCE),
        ("`target`: the model that heads draft for", TARGET),
        ("A head", (*HEAD, *metric_fields())),
        ("A row of `knee`", KNEE),
    )
    parts = [INTRODUCTION.strip()]
    for title, fields in tables:
        rows = [f"| `{f.name}` | {f.kind.words} | {'yes' if f.required else 'no'} | {f.meaning} |" for f in fields]
        parts.append(
            "\n".join([f"## {title}", "", "| key | value | required | meaning |", "| --- | --- | --- | --- |", *rows])
        )
    return "\n\n".join([*parts, CHECKS.strip()]) + "\n"


INTRODUCTION = f"""
# The format of curve.json

<!-- Generated by `python -m bottleneck.results.schema`; a test compares. -->

A run writes its result as `curve.json`, version {SCHEMA} of this format. `python -m bottleneck.curve` writes the same
object if all runs are comparable, and `{{"schema": {SCHEMA}, "curves": [curve, …]}}` otherwise. Readers
accept unknown keys. Files of earlier versions of bottleneck lack some keys that are not required.
"""
CHECKS = """
## Checks on reading

A file is refused with one line if a value is not what the tables require, a key is duplicated, or its numbers
contradict each other: perplexity is not exp(loss), bits_per_byte has another ratio to the loss than in
`reference`, `parameters` is not r (V + d) for W = A B, losses of bands, domains or groups do not add up to the loss
within 2 %, their tokens do not add up to `validation_tokens`, or a head is duplicated. `best`, `knee`,
`trained_reference` and the intervals are computed anew.
"""

if __name__ == "__main__":
    print(markdown(), end="")

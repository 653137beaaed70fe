"""Losses along training from a CSV, instead of running models."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, Optional

from bottleneck.core.errors import UserError, check

# lowest and highest value that a CSV may hold: others are mistakes, and the scaling law would overflow
LIMITS = {"parameters": (1, 1e15), "step": (0, 1e15), "loss": (1e-9, 1e6), "tokens": (0, 1e18), "stderr": (0, 1e6)}
WHOLE = ("parameters", "step")
ALIASES = {
    "params": "parameters",
    "n": "parameters",
    "t": "tokens",
    "train_tokens": "tokens",
    "std_err": "stderr",
    "se": "stderr",
}
Numbers = dict[str, Optional[float]]


def read_losses(file: Path, tokens_per_step: int) -> list[dict[str, Any]]:
    """Losses from a CSV with the columns model, parameters, step (or tokens), loss, and optionally stderr.

    Returns: for each model `model`, `parameters` and `checkpoints`, with rising steps.
    Raises: UserError naming the file and line for missing columns, values that are not numbers or outside `LIMITS`,
        and steps that do not rise.
    """
    check(file.is_file(), f"study.losses={file}: no such file")
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"study.losses={file}: cannot be read as CSV: {error}") from error
    check(bool(rows), f"study.losses={file}: no rows")
    names = {ALIASES.get(str(k).strip().lower(), str(k).strip().lower()): k for k in rows[0]}
    when = "step" if "step" in names or "tokens" not in names else "tokens"
    needed = ("model", "parameters", when, "loss")
    absent = ", ".join(k for k in needed if k not in names)
    check(not absent, f"study.losses={file}: lacks the column {absent}; it has {', '.join(map(str, rows[0]))}")
    models: dict[str, dict[str, Any]] = {}
    for line, row in enumerate(rows, 2):
        where = f"study.losses={file}: line {line}"
        numbers = _numbers(row, names, needed, where)
        if "step" not in names and numbers["tokens"] is not None:
            numbers["step"] = float(round(numbers["tokens"] / tokens_per_step))
        _check_limits(numbers, where)
        name = (row[names["model"]] or "").strip()
        check(bool(name), f"{where}: has no model")
        _append(models, name, numbers, tokens_per_step=tokens_per_step, where=where)
    return list(models.values())


def _numbers(row: dict[str, Any], names: dict[str, Any], needed: tuple[str, ...], where: str) -> Numbers:
    numbers: Numbers = {}
    for key in LIMITS:
        text = (row.get(names[key]) or "").strip() if key in names else ""
        try:
            numbers[key] = float(text) if text or key in needed else None
        except ValueError:
            raise UserError(f"{where}: {key} is {text!r}, not a number") from None
    return numbers


def _check_limits(numbers: Numbers, where: str) -> None:
    for key, number in numbers.items():
        low, high = LIMITS[key]
        fits = number is None or (low <= number <= high and (key not in WHOLE or number % 1 == 0))
        kind = "a whole number " if key in WHOLE else ""
        check(fits, f"{where}: {key} is {number}, must be {kind}from {low:g} to {high:g}")


def _append(
    models: dict[str, dict[str, Any]], name: str, numbers: Numbers, *, tokens_per_step: int, where: str
) -> None:
    """Add one checkpoint to its model."""
    parameters, step, given = numbers["parameters"], numbers["step"], numbers["tokens"]
    assert parameters is not None and step is not None
    entry = models.setdefault(name, {"model": name, "parameters": int(parameters), "checkpoints": []})
    differs = f"{name} has {parameters:.0f} parameters here and {entry['parameters']} before"
    check(entry["parameters"] == parameters, f"{where}: {differs}")
    last = entry["checkpoints"][-1] if entry["checkpoints"] else {"step": -1, "tokens": 0}
    rises = f"step {step:.0f} of {name} comes after step {last['step']}; steps must rise, each once"
    check(step > last["step"], f"{where}: {rises}")
    tokens = given if given is not None else int(step) * tokens_per_step
    most = LIMITS["tokens"][1]
    product = f"step {step:.0f} x study.tokens_per_step={tokens_per_step} tokens, must be at most {most:g}"
    check(tokens <= most, f"{where}: {product}")
    falls = f"{tokens:g} tokens of {name} come after {last['tokens']:g}; tokens must not fall"
    check(tokens >= last["tokens"], f"{where}: {falls}")
    entry["checkpoints"].append(
        {"step": int(step), "tokens": tokens, "loss": numbers["loss"], "stderr": numbers["stderr"]}
    )

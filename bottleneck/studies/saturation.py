"""Fig. 1a and 1b: the loss along training, where it turns, and how far above the scaling law the small models end.

Dims: N sequences, T tokens predicted per sequence.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import UserError, check
from bottleneck.data.module import IGNORE
from bottleneck.evaluation.sums import full_head_loss
from bottleneck.losses.chunked import chunk_rows
from bottleneck.results.picture import as_text
from bottleneck.studies.config import Saturation, StudyConfig
from bottleneck.studies.output import Parts, Steps, canvas, save, write
from bottleneck.studies.scaling import Law, fit_law
from bottleneck.studies.series import check_same_shapes, checkpoints, device_of, say_memory, visit
from bottleneck.studies.statistics import best_of_many, block_mean, scatter
from bottleneck.studies.text import StudyText, study_text

log = logging.getLogger(__name__)
COLUMNS = ("model", "parameters", "step", "tokens", "loss", "stderr", "law", "gap")
# of what a CSV says, lowest and highest: beyond that it is a slip, and the law would overflow
LIMITS = {"parameters": (1, 1e15), "step": (0, 1e15), "loss": (1e-9, 1e6), "tokens": (0, 1e18), "stderr": (0, 1e6)}
WHOLE = ("parameters", "step")
NEGLIGIBLE = 1e-3  # share of the loss that A / N^α must have at the least, or the fit says nothing about sizes
ALIASES = {
    "params": "parameters",
    "n": "parameters",
    "t": "tokens",
    "train_tokens": "tokens",
    "std_err": "stderr",
    "se": "stderr",
}


def verdict(
    steps: list[Optional[int]], losses: list[float], difference_error: Optional[float], margin: float, level: float
) -> dict[str, Any]:
    """Whether a model saturates: the last loss is above the lowest by more than noise, and by more than `margin` of it.

    Noise has two parts: what the text does, `difference_error`, the standard error of the difference of the two losses; and what
    training does from one checkpoint to the next, taken from the series itself (`statistics.scatter`, twice, since two
    checkpoints are compared). The chance that noise explains the rise counts every checkpoint that could have been the lowest.
    Where neither is known `margin` decides alone, and the verdict says so.

    Returns: best and final step and loss, `rise` in nats, `error` of the rise and `chance` (None where neither part of the noise
        is known), `saturates` (None for a single checkpoint), `from_step` and the sentence `verdict`.
    """
    low = min(range(len(losses)), key=losses.__getitem__)
    rise = losses[-1] - losses[low]
    noise = math.sqrt(2) * scatter(losses)
    error = chance = None
    if difference_error is not None or noise > 0:
        error = math.hypot(difference_error or 0.0, noise)
        chance = best_of_many(rise / error if error else (math.inf if rise else 0.0), len(losses) - 1)
    said = "does not saturate"
    saturates: Optional[bool] = False
    if len(losses) < 2:
        saturates, said = None, "cannot be said of a single checkpoint"
    elif rise > margin * losses[low] and chance is None:
        saturates, said = True, f"saturates from step {steps[low]} (by study.margin alone: no errors are known)"
    elif rise > margin * losses[low] and chance < level:
        saturates, said = True, f"saturates from step {steps[low]}"
    return {
        "best": {"step": steps[low], "loss": losses[low]},
        "final": {"step": steps[-1], "loss": losses[-1]},
        "rise": rise,
        "error": error,
        "chance": chance,
        "saturates": saturates,
        "from_step": steps[low] if saturates else None,
        "verdict": said,
    }


def read_losses(file: Path, tokens_per_step: int) -> list[dict[str, Any]]:
    """Losses from a CSV with columns model, parameters, step (or tokens), loss and perhaps stderr: models in order, steps rising.

    Raises: UserError naming the file and line for missing columns, what is no number or out of `LIMITS`, and steps out of order.
    """
    check(file.is_file(), f"study.losses={file}: no such file")
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"study.losses={file}: cannot be read as CSV: {error}") from error
    check(bool(rows), f"study.losses={file}: no rows")
    names = {ALIASES.get(str(k).strip().lower(), str(k).strip().lower()): k for k in rows[0]}
    needed = (
        ("model", "parameters", "step", "loss")
        if "step" in names or "tokens" not in names
        else ("model", "parameters", "tokens", "loss")
    )
    absent = [k for k in needed if k not in names]
    check(
        not absent, f"study.losses={file}: lacks the column {', '.join(absent)}; it has {', '.join(map(str, rows[0]))}"
    )
    models: dict[str, dict[str, Any]] = {}
    for line, row in enumerate(rows, 2):
        numbers: dict[str, Optional[float]] = {}
        for key in ("parameters", "step", "loss", "tokens", "stderr"):
            text = (row.get(names[key]) or "").strip() if key in names else ""
            try:
                numbers[key] = float(text) if text or key in needed else None
            except ValueError:
                raise UserError(f"study.losses={file}: line {line}: {key} is {text!r}, not a number") from None
        if "step" not in names and numbers["tokens"] is not None:
            numbers["step"] = float(round(numbers["tokens"] / tokens_per_step))
        for key, number in numbers.items():
            low, high = LIMITS[key]
            fits = number is None or (low <= number <= high and (key not in WHOLE or number % 1 == 0))
            check(
                fits,
                f"study.losses={file}: line {line}: {key} is {number}, must be {'a whole number ' if key in WHOLE else ''}from {low:g} to {high:g}",
            )
        name = (row[names["model"]] or "").strip()
        check(bool(name), f"study.losses={file}: line {line}: has no model")
        entry = models.setdefault(name, {"model": name, "parameters": int(numbers["parameters"]), "checkpoints": []})
        check(
            entry["parameters"] == numbers["parameters"],
            f"study.losses={file}: line {line}: {name} has {numbers['parameters']:.0f} parameters here and {entry['parameters']} before",
        )
        before, seen = (
            (entry["checkpoints"][-1]["step"], entry["checkpoints"][-1]["tokens"]) if entry["checkpoints"] else (-1, 0)
        )
        check(
            numbers["step"] > before,
            f"study.losses={file}: line {line}: step {numbers['step']:.0f} of {name} comes after step {before}; steps must rise, each once",
        )
        tokens = numbers["tokens"] if numbers["tokens"] is not None else int(numbers["step"]) * tokens_per_step
        check(
            tokens <= LIMITS["tokens"][1],
            f"study.losses={file}: line {line}: step {numbers['step']:.0f} x study.tokens_per_step={tokens_per_step} tokens, must be at most {LIMITS['tokens'][1]:g}",
        )
        check(
            tokens >= seen,
            f"study.losses={file}: line {line}: {tokens:g} tokens of {name} come after {seen:g}; tokens must not fall",
        )
        entry["checkpoints"].append(
            {"step": int(numbers["step"]), "tokens": tokens, "loss": numbers["loss"], "stderr": numbers["stderr"]}
        )
    return list(models.values())


@torch.no_grad()
def block_losses(backbone: Backbone, text: StudyText, micro_batch: int, steps: Steps) -> dict[str, Any]:
    """Summed loss in nats (`sums`) and number of predicted tokens (`counts`) of every block of the text, by the backbone's own
    head; and the model's `parameters`, tied ones once."""
    device = backbone.lm_head.weight.device
    sums, counts = [], []
    for inputs, targets in text.batches(micro_batch):
        h_NTD = backbone(inputs.to(device))
        for h, y in zip(h_NTD, targets.to(device)):
            sums.append(full_head_loss(h, backbone.head, y, IGNORE).item())
            counts.append(int((y != IGNORE).sum()))
        steps.at(len(sums) / len(text))
    return {"parameters": sum(p.numel() for p in backbone.parameters()), "sums": sums, "counts": counts}


def measure(c: StudyConfig, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run every checkpoint on the same tokens. Returns: models as `read_losses` gives them, with sums by block; what was measured on."""
    s: Saturation = c.study
    series = checkpoints(c)
    shapes = check_same_shapes(series)
    device = device_of(c)
    text = study_text(c, series)
    width, vocabulary = max(shapes.values(), key=lambda shape: shape[1])
    rows = chunk_rows(vocabulary, device.type)
    say_memory(series, device, 4 * (c.trainer.micro_batch_size * text.block * 24 * width + 3 * rows * vocabulary))
    parts = Parts(folder, s.name, {**text.identity, "dtype": c.backbone.dtype})
    models: dict[str, dict[str, Any]] = {}
    with Steps(len(series), c.trainer.progress) as steps:
        for cp in series:
            steps.begin(cp.label)
            part = parts.get(cp.key)
            kept = part is not None
            if part is None:
                part = visit(
                    cp, device, shapes, lambda backbone: block_losses(backbone, text, c.trainer.micro_batch_size, steps)
                )
                check(
                    all(map(math.isfinite, part["sums"])),
                    f"{cp.where}: its loss is not a number; are its weights whole?",
                )
                part = parts.put(cp.key, part)
            loss, error = block_mean(part["sums"], part["counts"])
            entry = models.setdefault(
                cp.model, {"model": cp.model, "parameters": part["parameters"], "checkpoints": []}
            )
            entry["checkpoints"].append(
                {
                    "step": cp.step,
                    "tokens": (cp.step or 0) * s.tokens_per_step,
                    "loss": loss,
                    "stderr": error,
                    "sums": part["sums"],
                    "counts": part["counts"],
                }
            )
            steps.end(f"loss {loss:.4f} ± {error:.4f}", kept)
    return list(models.values()), {"data": text.corpus.name, "tokens": text.tokens, "block_size": text.block}


def difference_error(model: dict[str, Any]) -> Optional[float]:
    """Standard error of (final − lowest loss): from the differences by block, which are on the same tokens; without blocks from the
    two standard errors as if they were on different ones, which is rather too much. None where neither is there."""
    points = model["checkpoints"]
    low, last = min(points, key=lambda p: p["loss"]), points[-1]
    if low is last:
        return None
    if "sums" in low:
        error = block_mean([a - b for a, b in zip(last["sums"], low["sums"])], low["counts"])[1]
    else:
        error = (
            math.nan if low["stderr"] is None or last["stderr"] is None else math.hypot(low["stderr"], last["stderr"])
        )
    return error if math.isfinite(error) else None


def fit(models: list[dict[str, Any]], fit_from: Optional[float], skip: float) -> tuple[Optional[Law], list[str]]:
    """The law through the larger models' checkpoints past their warm-up, and these models' names; None with fewer than two sizes."""
    large = [m for m in models if fit_from is None or m["parameters"] >= fit_from]
    points = [
        (m["parameters"], p["tokens"], p["loss"])
        for m in large
        for p in m["checkpoints"]
        if p["tokens"] > skip * m["checkpoints"][-1]["tokens"]
    ]
    names = [m["model"] for m in large]
    if len({n for n, _, _ in points}) < 2:
        limit = "" if fit_from is None else f" of {fit_from:.3g} parameters and more (study.fit_from)"
        log.info("no scaling law: it needs two sizes of models%s, there are %d", limit, len({n for n, _, _ in points}))
        return None, []
    law = fit_law(*zip(*points))
    n, t = (math.exp(sum(math.log(p[i]) for p in points) / len(points)) for i in range(2))
    if law(n, t) - law.floor(t) < NEGLIGIBLE * law(n, t):
        log.warning(
            "no scaling law: its fixed part, B / T^β + E = %.3f after %.3g tokens, is not below these losses; it is Hoffmann et al. 2022's, for text and tokenizers like The Pile's",
            law.floor(t),
            t,
        )
        return None, []
    return law, names


def conclude(models: list[dict[str, Any]], s: Saturation) -> dict[str, Any]:
    """Law, verdicts and gaps. Gap: loss / law − 1, at the same parameters and tokens (Godey et al. 2024, Fig. 1b)."""
    law, names = fit(models, s.fit_from, s.skip)
    out = []
    for m in models:
        points = [{k: v for k, v in p.items() if k not in ("sums", "counts")} for p in m["checkpoints"]]
        for p in points:
            p["law"] = law(m["parameters"], p["tokens"]) if law and p["tokens"] > 0 else None
            p["gap"] = p["loss"] / p["law"] - 1 if p["law"] else None
        said = verdict([p["step"] for p in points], [p["loss"] for p in points], difference_error(m), s.margin, s.level)
        for which in ("best", "final"):
            said[which] = next(
                p for p in points if p["step"] == said[which]["step"]
            )  # a model without steps has one point
        out.append(
            {
                "model": m["model"],
                "parameters": m["parameters"],
                "fitted": m["model"] in names,
                **said,
                "gap_best": said["best"]["gap"],
                "gap_final": said["final"]["gap"],
                "checkpoints": points,
            }
        )
    return {"fit": law and {**law.as_dict(), "models": names}, "models": out}


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Left, Fig. 1a: loss along training, lowest marked. Right, Fig. 1b: best and final against size, with the law."""
    figure, (left, right) = canvas(2)
    models = content["models"]
    single = all(len(m["checkpoints"]) == 1 for m in models)
    for i, m in enumerate(models):
        points = [p for p in m["checkpoints"] if p["tokens"] > 0] or m["checkpoints"]
        x, y = [p["tokens"] for p in points], [p["loss"] for p in points]
        left.plot(
            x,
            y,
            "o-" if len(points) < 40 else "-",
            color=f"C{i % 10}",
            ms=2.5,
            lw=1.2,
            label=as_text(f"{m['model']}: {m['verdict']}"),
        )
        if all(p["stderr"] is not None for p in points):
            left.fill_between(
                x,
                [p["loss"] - (p["stderr"] or 0) for p in points],
                [p["loss"] + (p["stderr"] or 0) for p in points],
                color=f"C{i % 10}",
                alpha=0.15,
                lw=0,
            )
        left.plot([m["best"]["tokens"]], [m["best"]["loss"]], "*", color=f"C{i % 10}", ms=9)
        right.plot([m["parameters"]], [m["final"]["loss"]], "x", color=f"C{i % 10}", ms=7)
        right.plot([m["parameters"]], [m["best"]["loss"]], "*", color=f"C{i % 10}", ms=9, label=as_text(m["model"]))
    if not single:
        left.set_xscale("log")
        # the first steps are far above everything that is of interest
        shown = [
            p["loss"] for m in models for p in m["checkpoints"] if p["tokens"] >= 0.02 * m["checkpoints"][-1]["tokens"]
        ]
        low, high = min(shown), max(shown)
        left.set_ylim(low - 0.06 * (high - low) - 0.01, high + 0.15 * (high - low) + 0.01)
        left.set_xlim(left=min(max(1, 0.005 * m["checkpoints"][-1]["tokens"]) for m in models))
    left.set_xlabel("training tokens")
    left.set_ylabel("loss, nats a token (band: standard error)")
    # many names would lie across the curves
    left.legend(
        fontsize=7,
        frameon=False,
        **({"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2} if len(models) > 6 else {}),
    )
    if content["fit"]:
        f = content["fit"]
        law = Law(f["A"], f["alpha"], 0.0, 0, 0.0)
        sizes = [m["parameters"] for m in models]
        xs = [min(sizes) * (max(sizes) / min(sizes)) ** (k / 60) for k in range(61)]
        last = max(m["final"]["tokens"] for m in models)
        right.plot(
            xs,
            [law(x, last) for x in xs],
            "--",
            color="0.3",
            lw=1,
            label=f"law at {last:.3g} tokens: A = {f['A']:.4g}, α = {f['alpha']:.3f}",
        )
    right.set_xscale("log")
    right.set_xlabel("parameters (star: best checkpoint, cross: final)")
    right.set_ylabel("loss, nats a token")
    right.legend(fontsize=7, frameon=False)
    save(figure, file)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The study. Returns: the content of saturation.json."""
    s: Saturation = c.study
    if s.losses is not None:
        models, about = read_losses(Path(s.losses).expanduser(), s.tokens_per_step), {"losses": s.losses}
    else:
        models, about = measure(c, folder)
    content = {**about, **conclude(models, s)}
    for m in content["models"]:
        gap = (
            ""
            if m["gap_final"] is None
            else f"; {100 * m['gap_final']:+.1f} % from the law at the end, {100 * m['gap_best']:+.1f} % at its best"
        )
        lowest = f"lowest {m['best']['loss']:.4f}" + (
            "" if m["best"]["step"] is None else f" at step {m['best']['step']}"
        )
        log.info("%s: %s (%s, final %.4f)%s", m["model"], m["verdict"], lowest, m["final"]["loss"], gap)
    if content["fit"]:
        log.info(
            "law: A = %.4g, alpha = %.4f from %s",
            content["fit"]["A"],
            content["fit"]["alpha"],
            ", ".join(content["fit"]["models"]),
        )
    rows = [
        (m["model"], m["parameters"], p["step"], p["tokens"], p["loss"], p["stderr"], p["law"], p["gap"])
        for m in content["models"]
        for p in m["checkpoints"]
    ]
    return write(folder, s.name, content, COLUMNS, rows, lambda file: draw(content, file))

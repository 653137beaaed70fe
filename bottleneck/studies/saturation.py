"""Fig. 1a and 1b: the loss along training, where it turns, and how far above the scaling law the small models end."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Optional

from bottleneck.config.declare import key
from bottleneck.config.numbers import as_count, as_rate
from bottleneck.core.errors import check
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.results.picture import as_text, colours_for
from bottleneck.studies.formulas.statistics import best_of_many, block_mean, correction, scatter
from bottleneck.studies.shared.config import CheckpointKeys, StudyConfig, check_checkpoints, check_share
from bottleneck.studies.shared.figures import SIZES, STUDY, Figure, pythia, visit_hours
from bottleneck.studies.shared.losses_csv import read_losses
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

if TYPE_CHECKING:
    from bottleneck.studies.formulas.scaling import Law

log = logging.getLogger(__name__)
COLUMNS = ("model", "parameters", "step", "tokens", "loss", "stderr", "law", "gap")
NEGLIGIBLE = 1e-3  # share of the loss that A / N^α must have at least; below it the fit says nothing about sizes


@dataclass(frozen=True)
class Saturation(CheckpointKeys):
    """Fig. 1a and 1b: loss along training, scaling law, verdict."""

    losses: Optional[str] = key(
        None, "CSV with columns model, parameters, step or tokens, loss (stderr), instead of running models."
    )
    tokens_per_step: int = key(
        2_097_152, "Tokens of one training step: T = step x this; the default is Pythia's.", read=Any
    )
    fit_from: Optional[float] = key(
        4e8, "Fit the law to models with at least so many parameters; null: to all.", read=Any
    )
    skip: float = key(
        0.02, "Share of each model's training that the fit leaves out: the warm-up, which the law excludes."
    )
    margin: float = key(
        0.001, "Smallest rise of the loss above its lowest that counts as saturation, as a share of the loss."
    )
    level: float = key(
        0.05, "Accepted chance of calling noise a saturation, over all checkpoints that could have been lowest."
    )


def check_keys(keys: Any) -> None:
    """Convert and check the keys of `Saturation`."""
    check_checkpoints(keys)
    keys.tokens_per_step = as_count("study.tokens_per_step", keys.tokens_per_step)
    keys.fit_from = None if keys.fit_from is None else as_rate("study.fit_from", keys.fit_from)
    check(0 <= keys.margin < math.inf, f"study.margin={keys.margin}: must be at least 0")
    check(0 <= keys.skip < 1, f"study.skip={keys.skip}: must be at least 0 and below 1")
    check_share("study.level", keys.level)


def verdict(
    steps: list[Optional[int]], losses: list[float], difference_error: Optional[float], margin: float, level: float
) -> dict[str, Any]:
    """Whether a model saturates: the last loss is above the lowest by more than noise, and by more than `margin` of it.

    The noise has two parts. That of the text is `difference_error`, the standard error of the difference of the two
    losses. That of training, from one checkpoint to the next, is estimated from the series itself
    (`statistics.scatter`, times √2 since two checkpoints are compared) and corrected (`statistics.correction`), so
    that a flat series is called saturated with a chance of at most `level`, also if it is short or its noise has
    heavy tails or is correlated. `chance` counts every checkpoint that could have been the lowest. The price: of
    turns that rise by 8 deviations of Gaussian noise half are found, by 16 deviations 89 % (11 checkpoints) to 99 %
    (40). Without an error and with a series too short to estimate one there is no verdict on a rise.

    Returns: best and final step and loss, `rise` in nats, `error` of the rise and `chance` (None if the noise is
        unknown), `saturates` (None without a verdict), `from_step` and the sentence `verdict`.
    """
    low = min(range(len(losses)), key=losses.__getitem__)
    rise = losses[-1] - losses[low]
    noise = math.sqrt(2) * scatter(losses)
    error = chance = None
    if noise > 0:
        noise *= correction(len(losses), level, len(losses) - 1)
    if difference_error is not None or noise > 0:
        error = math.hypot(difference_error or 0.0, noise)
        chance = best_of_many(rise / error if error else (math.inf if rise else 0.0), len(losses) - 1)
    said = "does not saturate"
    saturates: Optional[bool] = False
    if len(losses) < 2:
        saturates, said = None, "no verdict on a single checkpoint"
    elif rise > margin * losses[low] and chance is None:
        few = f"{len(losses)} checkpoints without standard errors are too few"
        saturates, said = None, f"no verdict: rises by {100 * rise / losses[low]:.1f} %, but {few}"
    elif rise > margin * losses[low] and chance is not None and chance < level:
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


def difference_error(model: dict[str, Any]) -> Optional[float]:
    """Standard error of (final − lowest loss); None if it is unknown.

    From the differences by block if these are known, which are paired, since both losses are on the same tokens.
    Otherwise from the two standard errors as if the tokens were different, which overestimates it.
    """
    points = model["checkpoints"]
    low, last = min(points, key=lambda p: p["loss"]), points[-1]
    if low is last:
        return None
    if "sums" in low:
        error = block_mean([a - b for a, b in zip(last["sums"], low["sums"])], low["counts"])[1]
    elif low["stderr"] is None or last["stderr"] is None:
        return None
    else:
        error = math.hypot(low["stderr"], last["stderr"])
    return error if math.isfinite(error) else None


def fit(models: list[dict[str, Any]], fit_from: Optional[float], skip: float) -> tuple[Optional[Law], list[str]]:
    """Fit the law to the larger models' checkpoints after their warm-up.

    Returns: the law, or None for fewer than two sizes; the names of the models it was fitted to.
    """
    from bottleneck.studies.formulas.scaling import fit_law  # here, so that --help loads no torch

    large = [m for m in models if fit_from is None or m["parameters"] >= fit_from]
    points = [
        (m["parameters"], p["tokens"], p["loss"])
        for m in large
        for p in m["checkpoints"]
        if p["tokens"] > skip * m["checkpoints"][-1]["tokens"]
    ]
    names = [m["model"] for m in large]
    sizes = len({n for n, _, _ in points})
    if sizes < 2:
        limit = "" if fit_from is None else f" of {fit_from:.3g} parameters and more (study.fit_from)"
        log.info("no scaling law: it needs two sizes of models%s, there are %d", limit, sizes)
        return None, []
    law = fit_law(*zip(*points))
    n, t = (math.exp(sum(math.log(p[i]) for p in points) / len(points)) for i in range(2))
    if law(n, t) - law.floor(t) < NEGLIGIBLE * law(n, t):
        log.warning(
            "no scaling law: its fixed part, B / T^β + E = %.3f after %.3g tokens, is not below these losses; "
            "Hoffmann et al. 2022 fitted it to text and tokenizers like The Pile's",
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
        for which in ("best", "final"):  # a model without steps has a single point
            said[which] = next(p for p in points if p["step"] == said[which]["step"])
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
    """Left, Fig. 1a: loss along training, the lowest marked.

    Right, Fig. 1b: best and final loss against size, with the law.
    """
    figure, (left, right) = canvas(2)
    models = content["models"]
    for m, colour in zip(models, colours_for(len(models))):
        _along(left, m, colour)
        right.plot([m["parameters"]], [m["final"]["loss"]], "x", color=colour, ms=7)
        right.plot([m["parameters"]], [m["best"]["loss"]], "*", color=colour, ms=9, label=as_text(m["model"]))
    if any(len(m["checkpoints"]) > 1 for m in models):
        _limits(left, models)
    left.set_xlabel("training tokens")
    left.set_ylabel("loss, nats a token (band: standard error)")
    # many names would cover the curves
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2} if len(models) > 6 else {}
    left.legend(fontsize=7, frameon=False, **below)
    if content["fit"]:
        _law(right, models, content["fit"])
    right.set_xscale("log")
    right.set_xlabel("parameters (star: best checkpoint, cross: final)")
    right.set_ylabel("loss, nats a token")
    right.legend(fontsize=7, frameon=False)
    save(figure, file)


def _along(axes: Any, m: dict[str, Any], colour: str) -> None:
    points = [p for p in m["checkpoints"] if p["tokens"] > 0] or m["checkpoints"]
    x, y = [p["tokens"] for p in points], [p["loss"] for p in points]
    style = "o-" if len(points) < 40 else "-"
    axes.plot(x, y, style, color=colour, ms=2.5, lw=1.2, label=as_text(f"{m['model']}: {m['verdict']}"))
    if all(p["stderr"] is not None for p in points):
        low, high = ([p["loss"] + sign * (p["stderr"] or 0) for p in points] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.plot([m["best"]["tokens"]], [m["best"]["loss"]], "*", color=colour, ms=9)


def _limits(axes: Any, models: list[dict[str, Any]]) -> None:
    """Limits without the first steps, whose losses are far above the rest."""
    axes.set_xscale("log")
    ends = {m["model"]: m["checkpoints"][-1]["tokens"] for m in models}
    shown = [p["loss"] for m in models for p in m["checkpoints"] if p["tokens"] >= 0.02 * ends[m["model"]]]
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.06 * (high - low) - 0.01, high + 0.15 * (high - low) + 0.01)
    axes.set_xlim(left=min(max(1, 0.005 * end) for end in ends.values()))


def _law(axes: Any, models: list[dict[str, Any]], f: dict[str, Any]) -> None:
    from bottleneck.studies.formulas.scaling import Law

    law = Law(f["A"], f["alpha"], 0.0, 0, 0.0)
    sizes = [m["parameters"] for m in models]
    xs = [min(sizes) * (max(sizes) / min(sizes)) ** (k / 60) for k in range(61)]
    last = max(m["final"]["tokens"] for m in models)
    label = f"law at {last:.3g} tokens: A = {f['A']:.4g}, α = {f['alpha']:.3f}"
    axes.plot(xs, [law(x, last) for x in xs], "--", color="0.3", lw=1, label=label)


def run(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """Run the study. Returns: the content of saturation.json."""
    s: Saturation = c.study
    if s.losses is not None:
        models, about = read_losses(Path(s.losses).expanduser(), s.tokens_per_step), {"losses": s.losses}
    else:
        from bottleneck.studies.measure.saturation import measure  # here, so that --help loads no torch

        models, about = measure(c, folder)
    content = {**about, **conclude(models, s)}
    for m in content["models"]:
        gaps = "" if m["gap_final"] is None else _gaps(m)
        at = "" if m["best"]["step"] is None else f" at step {m['best']['step']}"
        lowest = f"lowest {m['best']['loss']:.4f}{at}"
        log.info("%s: %s (%s, final %.4f)%s", m["model"], m["verdict"], lowest, m["final"]["loss"], gaps)
    if content["fit"]:
        f = content["fit"]
        log.info("law: A = %.4g, alpha = %.4f from %s", f["A"], f["alpha"], ", ".join(f["models"]))
    rows = [
        (m["model"], m["parameters"], p["step"], p["tokens"], p["loss"], p["stderr"], p["law"], p["gap"])
        for m in content["models"]
        for p in m["checkpoints"]
    ]
    return write(folder, s.name, content, columns=COLUMNS, rows=rows, draw=lambda file: draw(content, file))


def _gaps(m: dict[str, Any]) -> str:
    best = "–" if m["gap_best"] is None else f"{100 * m['gap_best']:+.1f} %"
    return f"; {100 * m['gap_final']:+.1f} % from the law at the end, {best} at its best"


STUDIES.register(
    Study(
        name="saturation",
        summary="loss along training, the scaling law with A and alpha fitted, from which step it saturates",
        figure="Fig. 1a, 1b",
        schema=Saturation,
        check=check_keys,
        run=run,
        commands=(
            Figure(
                1,
                "Fig. 1a, 1b",
                "loss of every checkpoint; the scaling law",
                (
                    f"{STUDY} study=saturation data=pile study.steps=pythia {pythia(SIZES)} "
                    "hydra.run.dir=paper/saturation",
                ),
                visit_hours(tuple(SIZES)),
            ),
        ),
    )
)

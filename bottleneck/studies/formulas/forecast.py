"""The law by which `study=forecast` extends two short runs to a budget, and its intervals.

A head of n = r (V + d) parameters that is fitted on T tokens ends above the best head of its rank by an excess that
falls as a power of T: n / 2T nats for a regular maximum-likelihood estimate, more slowly for a head, whose rows of rare
tokens see few of the T tokens. With a floor F of its rank, L(T) = F + c T^-β. From the loss L₂ after T₂ tokens on, and
with the slope s = β c T₂^-β there, in nats for each factor e of tokens,

    L(T) = L₂ − s (1 − (T / T₂)^-β) / β        s = a (L₁ − L₂) + b₀ + b₁ log(r / d)

If both short runs, of T₁ and T₂ tokens, lay on the power law, s would be in proportion to L₁ − L₂. They start from
`refined`, whose loss labels lower little at first, so the slope has two terms more. a, b₀, b₁ and β are fitted on
stored runs of other backbones and texts. The interval is the quantile of the errors that the law makes on backbones
that it was not fitted on, relative to the drop and `NOISE`.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from bottleneck.core.errors import check

STEP_TOKENS = 8_192  # of an optimizer step
SHORT = (60 * STEP_TOKENS, 240 * STEP_TOKENS)  # T₁, T₂
BLOCK = 512  # tokens of a sequence in the stored runs
COVERAGE = 0.9
WIDE = 32  # ranks from here on count for the widths that are reported
NOISE = 0.05  # nats: the error of a forecast does not vanish with the drop (which rate was best, the text's order)
CURVES = Path(__file__).with_name("forecast_curves.csv")
COLUMNS = (
    "backbone",
    "hidden_size",
    "vocab_size",
    "text",
    "block_size",
    "original",
    "rank",
    "tokens",
    "lr",
    "loss",
    "device",
    "commit",
)


@dataclass(frozen=True)
class Curve:
    """The losses of one rank on one backbone and text, each the best of the rates tried.

    Attributes:
        losses: tokens -> nats a token; 0 tokens: the start, `refined`.
    """

    backbone: str
    text: str
    hidden_size: int
    vocab_size: int
    rank: int
    losses: dict[int, float]

    @property
    def gain(self) -> float:
        """L₁ − L₂, at least 0."""
        return max(0.0, self.losses[SHORT[0]] - self.losses[SHORT[1]])

    @property
    def budgets(self) -> list[int]:
        """Budgets beyond the short runs."""
        return sorted(t for t in self.losses if t > SHORT[1])


def read(file: Path = CURVES) -> list[Curve]:
    """The stored curves. Args: file: CSV with the columns `COLUMNS`. Raises: UserError if there is none."""
    check(
        file.is_file(), f"{file.name}: no stored curves; python -m bottleneck.benchmark forecast RUN… --to writes them"
    )
    with open(file, newline="", encoding="utf-8") as f:
        return curves_of(csv.DictReader(f))


def curves_of(rows: Iterable[dict[str, Any]]) -> list[Curve]:
    """Curves from rows of `COLUMNS`; of several rates at a budget the best counts."""
    found: dict[tuple[str, str, int, int, int], dict[int, float]] = {}
    for row in rows:
        name = (row["backbone"], row["text"], int(row["hidden_size"]), int(row["vocab_size"]), int(row["rank"]))
        losses, tokens = found.setdefault(name, {}), int(row["tokens"])
        if row["loss"] not in (None, ""):  # diverged; a CSV has an empty field
            losses[tokens] = min(losses.get(tokens, math.inf), float(row["loss"]))
    whole = {name: losses for name, losses in found.items() if all(t in losses for t in (0, *SHORT))}
    return [Curve(b, x, d, V, r, losses) for (b, x, d, V, r), losses in whole.items()]


Points = Sequence[tuple[Curve, int]]  # a curve and a budget that was measured


@dataclass(frozen=True)
class Range:
    """What a law was fitted on: the lowest and highest of each number.

    Attributes:
        budgets: (hidden size, largest budget) of each hidden size.
    """

    hidden_size: tuple[int, int]
    vocab_size: tuple[int, int]
    rank: tuple[int, int]
    budgets: tuple[tuple[int, int], ...]

    def outside(self, curve: Curve, block_size: int) -> list[str]:
        """Why a head is outside, one reason each; empty if it is not."""
        names = {"hidden_size": "hidden size", "vocab_size": "vocabulary", "rank": "rank"}
        found = [(word, getattr(curve, name), getattr(self, name)) for name, word in names.items()]
        reasons = [f"{w} {x:,}, fitted on {lo:,} to {hi:,}" for w, x, (lo, hi) in found if not lo <= x <= hi]
        before, first, second = (curve.losses[t] for t in (0, *SHORT))
        if second >= min(before, first):
            reasons.append("a longer short run no better than the start or the shorter one (no stored one is)")
        if block_size != BLOCK:
            reasons.append(f"blocks of {block_size} tokens, fitted on blocks of {BLOCK}")
        return reasons

    def outside_budget(self, tokens: int, hidden_size: int) -> list[str]:
        """The reason why a budget is outside, if it is: larger than at that hidden size and above."""
        wide = [(d, most) for d, most in self.budgets if d >= hidden_size] or [max(self.budgets)]
        most = max(most for _, most in wide)
        where = f" at hidden sizes from {min(d for d, _ in wide)} on" if len(wide) < len(self.budgets) else ""
        return [f"budget {tokens:,} tokens, fitted up to {most:,}{where}"] if tokens > most else []


def range_of(data: Points) -> Range:
    """The range of the points."""
    curves = [c for c, _ in data]

    def both(numbers: Iterable[int]) -> tuple[int, int]:
        found = list(numbers)
        return min(found), max(found)

    d, V, r = (both(getattr(c, name) for c in curves) for name in ("hidden_size", "vocab_size", "rank"))
    sizes = sorted({c.hidden_size for c in curves})
    return Range(d, V, r, tuple((size, max(t for c, t in data if c.hidden_size == size)) for size in sizes))


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        a: slope at T₂ for each nat of L₁ − L₂.
        b: (b₀, b₁) of the slope, nats.
        beta: exponent.
        error: quantile of the relative error of the drop, of which `COVERAGE` are smaller.
    """

    a: float
    b: tuple[float, float]
    beta: float
    error: float

    def forecast(self, curve: Curve, tokens: int) -> tuple[float, float]:
        """Loss after a budget beyond the short runs and the half-width of its interval, nats."""
        drop = float(_drops((self.a, *self.b, self.beta), [(curve, tokens)])[0])
        return curve.losses[SHORT[1]] - drop, self.error * (drop + NOISE)


def _drops(law: Sequence[float], data: Points) -> np.ndarray:
    """L₂ − L(T) of points, by the law of (a, b₀, b₁, β)."""
    a, b0, b1, beta = law
    r, d, gain = (np.array([getattr(c, n) for c, _ in data], float) for n in ("rank", "hidden_size", "gain"))
    slope = np.maximum(a * gain + b0 + b1 * np.log(r / d), 0.0)
    e_folds = np.log(np.array([t for _, t in data], float) / SHORT[1])
    return slope * -np.expm1(-beta * e_folds) / beta


def _measured(data: Points) -> np.ndarray:
    return np.array([c.losses[SHORT[1]] - c.losses[t] for c, t in data])


def points(curves: Sequence[Curve]) -> list[tuple[Curve, int]]:
    """All measured budgets beyond the short runs."""
    return [(c, t) for c in curves for t in c.budgets]


def relative_errors(law: Sequence[float], data: Points) -> np.ndarray:
    """Errors of the drop as a share of the forecast drop and `NOISE`. Args: law: (a, b₀, b₁, β)."""
    drops = _drops(law, data)
    return (_measured(data) - drops) / (drops + NOISE)


def fit_law(data: Points) -> tuple[float, float, float, float]:
    """a, b₀, b₁, β by robust least squares on errors relative to the measured drop and `NOISE`."""
    true = _measured(data)

    def residuals(law: np.ndarray) -> np.ndarray:
        return (true - _drops(law.tolist(), data)) / (np.maximum(true, 0.0) + NOISE)

    bounds = ([0.0, -np.inf, -np.inf, 1e-3], [np.inf, np.inf, np.inf, 10.0])
    a, b0, b1, beta = least_squares(residuals, [0.6, 0.005, 0.0, 0.3], bounds=bounds, loss="soft_l1", f_scale=0.3).x
    return float(a), float(b0), float(b1), float(beta)


Group = Callable[[Curve], Any]
GROUPS: dict[str, Group] = {
    "rank": lambda c: round(math.log2(c.rank)),
    "backbone": lambda c: c.backbone,
    "text": lambda c: c.text,
}


def conformal(errors: np.ndarray, coverage: float = COVERAGE) -> float:
    """The conformal quantile of absolute errors: a new one is below it with probability `coverage`, if exchangeable.

    Of fewer than 1 / (1 - coverage) - 1 errors it is the largest, which covers less.
    """
    ordered = np.sort(np.abs(errors))
    return float(ordered[min(len(ordered) - 1, math.ceil((len(ordered) + 1) * coverage) - 1)])


def left_out(data: Points, group: Group) -> list[tuple[Points, Points]]:
    """(the rest, the points of one group) for each group."""
    names = dict.fromkeys(group(c) for c, _ in data)
    return [([p for p in data if group(p[0]) != n], [p for p in data if group(p[0]) == n]) for n in names]


def fit(data: Points) -> Law:
    """The law fitted on all points; its error is that on backbones left out in turn, or texts of a single backbone."""
    check(len(data) > 0, "forecast: no measured budgets to fit the law on")
    by_backbone = left_out(data, GROUPS["backbone"])
    splits = by_backbone if len(by_backbone) > 1 else left_out(data, GROUPS["text"])
    a, b0, b1, beta = fitted = fit_law(data)
    if len(splits) == 1:
        return Law(a, (b0, b1), beta, conformal(relative_errors(fitted, data)))
    errors = np.concatenate([relative_errors(fit_law(rest), held) for rest, held in splits])
    return Law(a, (b0, b1), beta, conformal(errors))


@dataclass(frozen=True)
class Forecasted:
    """A measured loss beside its forecast by a law that did not see its group. `error`, `half_width`: nats."""

    group: Any
    curve: Curve
    tokens: int
    error: float
    half_width: float


def leave_one_out(data: Points, name: str) -> list[Forecasted]:
    """Fit law and interval without one rank, backbone or text in turn, and forecast it; empty for a single group."""
    splits, group = left_out(data, GROUPS[name]), GROUPS[name]
    found = []
    for rest, held in splits if len(splits) > 1 else ():
        law = fit(rest)
        for c, t in held:
            loss, half = law.forecast(c, t)
            found.append(Forecasted(group(c), c, t, c.losses[t] - loss, half))
    return found


@dataclass(frozen=True)
class Check:
    """How forecasts with one group left out fared.

    Attributes:
        coverage: share of measured losses within their intervals.
        half_width, widest: median and largest half-width at ranks of `WIDE` and above, nats; NaN without such ranks.
        rms: root mean square error of the loss, nats.
    """

    left_out: str
    groups: int
    points: int
    coverage: float
    half_width: float
    widest: float
    rms: float


def summary(name: str, found: Sequence[Forecasted]) -> Check:
    """The figures of `leave_one_out`."""
    errors = np.array([f.error for f in found])
    inside = np.abs(errors) <= np.array([f.half_width for f in found])
    widths = [f.half_width for f in found if f.curve.rank >= WIDE] or [math.nan]
    groups, rms = len({f.group for f in found}), float(np.sqrt(np.mean(errors**2)))
    return Check(name, groups, len(found), float(inside.mean()), float(np.median(widths)), max(widths), rms)


@dataclass(frozen=True)
class Stored:
    """The law of the stored runs, with its range and how it fared on ranks, backbones and texts left out."""

    law: Law
    range: Range
    checks: tuple[Check, ...]

    @property
    def statement(self) -> str:
        """What the intervals were checked on, in one sentence."""
        if not self.checks:
            return f"Intervals of {COVERAGE:.0%}, not checked: the stored runs have one rank, backbone and text."
        said = [
            f"{c.left_out}s in turn ({c.groups}): {c.coverage:.0%} inside, half-width {c.half_width:.3f}"
            for c in self.checks
        ]
        return (
            f"Intervals of {COVERAGE:.0%}, checked on {self.checks[0].points} measured losses by leaving out "
            f"{'; '.join(said)} (median at ranks of 32 and above, nats)."
        )


@functools.cache
def stored(file: Path = CURVES) -> Stored:
    """Fit the law on the stored curves, and check it by leaving out ranks, backbones and texts."""
    data = points(read(file))
    found = {name: leave_one_out(data, name) for name in GROUPS}
    return Stored(fit(data), range_of(data), tuple(summary(name, held) for name, held in found.items() if held))

"""What can be added to the project by one file: starts, head kinds, objectives, losses, metrics and studies.

Each kind of extension has a dataclass with the fields that a declared object must fill, and a registry of the declared
objects. Config checks, help, plots and docs read the registries, so no module keeps a list of names. Rooms above `core`
declare their objects; a registry imports the folder of its built-in objects on first use. Heavy types appear in
annotations only.

Dims: n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from bottleneck.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Start:
    """How heads begin: `head.init=NAME`.

    Attributes:
        make: (`heads.starting.StartInputs`) -> function from a head's key to its factors (A [V, R], B [R, D]).
        closed_form: computed without randomness, so heads of different seeds start equal.
        nested: the factors of rank r are the first r columns of A and rows of B of every higher rank.
        reads_hidden: it reads the hidden states of the calibration tokens, which are then kept until it is done.
        lr_ref, gamma: defaults of `optim.lr_ref` and `optim.gamma` for heads that start so.
        options: the `head.*` keys it reads besides `calibration_tokens`, with their defaults.
    """

    name: str
    summary: str
    make: Callable[..., Any]
    closed_form: bool
    nested: bool = False
    reads_hidden: bool = False
    lr_ref: float = 8e-3
    gamma: float = 0.6
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadKind:
    """A parametrisation of the head: `head.kind=NAME`.

    Attributes:
        build: (vocab_size, rank, hidden_size, **options) -> `heads.head.Head`, an nn.Module.
        options: its own options (`head.options.*`), with their defaults.
        impls: values of `head.loss_impl` that can train it; None: any.
        refuses: (**options) -> why these values are impossible; None if they are possible. Values that are not of the
            default's type are refused before.
        full_rank: it exists at r = d only; `ranks` is then d.
        coordinates: it can be trained in other coordinates of h (`head.whiten`, `optim.lr_ratio`).
    """

    name: str
    summary: str
    build: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    refuses: Optional[Callable[..., Optional[str]]] = None
    impls: Optional[tuple[str, ...]] = ("auto", "chunked")
    full_rank: bool = False
    coordinates: bool = False


@dataclass(frozen=True)
class Objective:
    """What heads are trained on: `head.objective=NAME`.

    Attributes:
        loss: (logits [n, V], targets [n], log_teacher [n, V] or None, options) -> loss [n] in nats; plain PyTorch on
            float32 or float64 logits, which defines the objective. Without `fast` it is also what runs, its gradient by
            autograd.
        teacher: it compares with a head that teaches; log_teacher then holds that head's log-probabilities at the
            option `temperature` (1 where the objective has none).
        options: the `head.*` keys it reads besides `teacher`, with their defaults.
        impls: values of `head.loss_impl` that can compute it; None: any.
        fast: (options) -> fields of `losses.distill.Distillation` with which `losses.distill.steps` computes the same
            loss faster.
        refuses: (**options) -> why these values are impossible, or None; see `HeadKind`.
    """

    name: str
    summary: str
    loss: Callable[..., Tensor]
    teacher: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    impls: Optional[tuple[str, ...]] = ("auto", "chunked", "fused")
    fast: Optional[Callable[[Mapping[str, Any]], Mapping[str, Any]]] = None
    refuses: Optional[Callable[..., Optional[str]]] = None


@dataclass(frozen=True)
class Loss:
    """An implementation of the cross-entropy of a low-rank head: `head.loss_impl=NAME`.

    Attributes:
        step: (z [N, R'], A [V, R'], y [N], dA [V, R] or None, scale, memory) -> loss [N] and d loss / d z [N, R'], see
            `losses.linear.logit_step`.
        padded_rank: R' for a rank R; the columns beyond R are zeros.
        most_tokens: tokens of one call for a padded rank; more are split.
        refuses: (device type, dtype or None where it is not known yet) -> why it cannot run there, or None.
    """

    name: str
    summary: str
    step: Callable[..., Any]
    padded_rank: Callable[[int], int] = lambda rank: rank
    most_tokens: Callable[[int], int] = lambda rank: 2**31
    refuses: Callable[[str, Any], Optional[str]] = lambda device, dtype: None


@dataclass(frozen=True)
class Predictions:
    """What one head predicts at n tokens.

    Attributes:
        log_p_nV: log-probabilities [n, V], float32, nats.
        targets_n: the tokens that follow, int64 [n].
    """

    log_p_nV: Tensor
    targets_n: Tensor

    @functools.cached_property
    def p_nV(self) -> Tensor:
        """Probabilities [n, V]; those of the original head serve all heads."""
        return self.log_p_nV.exp()

    @functools.cached_property
    def top_nK(self) -> Tensor:
        """The five most likely tokens [n, 5] (all of a smaller vocabulary), the most likely first."""
        from bottleneck.core.most_likely import most_likely

        return most_likely(self.log_p_nV, min(5, self.log_p_nV.shape[1]))


@dataclass(frozen=True)
class Metric:
    """A number of every head in curve.json: a mean over validation tokens of what `measure` gives.

    Heads are compared with the original head, or with the target where there is one (`head.teacher=model:PATH`).

    The table, curve.csv, details.png, report.html, W&B and docs/curve_format.md read this declaration.

    Attributes:
        name: key in curve.json and column of curve.csv.
        summary: one line that says what it is.
        measure: (original head's or target's Predictions, head's Predictions) -> value of each token [n], float32.
        along: (values [N, T] of N blocks of T tokens, whether each is a validation token [N, T]) -> sum and number of
            what the mean is taken over, as 0-dimensional float64 tensors, for metrics of consecutive tokens. None: the
            mean over tokens.
        title: short name, for columns and legends.
        unit: of the axis. Metrics of the same unit and scale share a panel of the pictures.
        better: which direction is better.
        form: Python format of the value in the table.
        scale: of the axis in pictures; `share` is linear from 0 to 1.
        line: line style in pictures, as Matplotlib and the page know it.
        table, picture: whether the table and the pictures show it.
        order: metrics are listed by it, then by name.
    """

    name: str
    summary: str
    measure: Callable[[Predictions, Predictions], Tensor]
    title: str
    unit: str
    better: Literal["lower", "higher"]
    form: str = ".4f"
    scale: Literal["linear", "log", "share"] = "linear"
    line: Literal["solid", "dashed", "dotted"] = "solid"
    table: bool = True
    picture: bool = True
    order: int = 100
    along: Optional[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = None


def _accept(keys: Any) -> None:
    """The default `check` of a study: accepts all values."""


@dataclass(frozen=True)
class Study:
    """A study of backbones, of trained heads, or of other studies' results: `study=NAME`.

    Attributes:
        figure: what it reproduces: a figure of Godey et al. 2024, or the arXiv number of a later paper.
        schema: frozen dataclass of its keys `study.*`, derived from `studies.shared.config.StudyKeys`.
        run: (StudyConfig, output folder) -> content of NAME.json, which it has written together with NAME.csv and
            NAME.png.
        check: (composed keys) -> None: converts values in place and raises UserError for impossible ones.
        commands: entries of `experiment=paper`, see `studies.shared.figures.Figure`.
    """

    name: str
    summary: str
    figure: str
    schema: type
    run: Callable[[Any, Path], dict[str, Any]]
    check: Callable[[Any], None] = _accept
    commands: tuple[Any, ...] = ()


STARTS: Registry[Start] = Registry("head.init", "start", "bottleneck.heads.starts")
HEAD_KINDS: Registry[HeadKind] = Registry("head.kind", "head kind", "bottleneck.heads.kinds")
OBJECTIVES: Registry[Objective] = Registry("head.objective", "objective", "bottleneck.losses.objectives")
LOSSES: Registry[Loss] = Registry("head.loss_impl", "loss implementation", "bottleneck.losses.impls")
METRICS: Registry[Metric] = Registry("metric", "metric", "bottleneck.evaluation.metrics")
STUDIES: Registry[Study] = Registry("study", "study", "bottleneck.studies")


def metrics() -> list[Metric]:
    """The declared metrics in the order in which they are listed."""
    return sorted(METRICS, key=lambda m: (m.order, m.name))

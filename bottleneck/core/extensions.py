"""What can be added to the project by one file: starts, head kinds, objectives, losses, metrics and studies.

Each kind of extension has a dataclass that says what a declared object must tell about itself, and a registry of the declared
objects. Config checks, help, plots and docs read the registries, so no module keeps a list of names. Rooms above `core` declare
their objects; a registry imports the folder of its built-in objects on first use. Heavy types appear in annotations only.

Dims: n tokens of a chunk, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from bottleneck.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Start:
    """How heads begin: `head.init=NAME`.

    Attributes:
        make: (StartInputs) -> function from a head's key to its factors (A [V, R], B [R, D]); see `heads.starting`.
        closed_form: nothing in it is random, so heads of different seeds start equal.
        lr_ref, gamma: defaults of `optim.lr_ref` and `optim.gamma` for heads that start so.
        options: names of the `head.*` keys it reads besides `calibration_tokens`, with their defaults.
        reads_hidden: it reads the calibration tokens' hidden states themselves, which are then kept until it is done.
    """

    name: str
    summary: str
    make: Callable[..., Any]
    closed_form: bool
    lr_ref: float = 8e-3
    gamma: float = 0.6
    options: Mapping[str, Any] = field(default_factory=dict)
    reads_hidden: bool = False


@dataclass(frozen=True)
class HeadKind:
    """A parametrisation of the head: `head.kind=NAME`.

    Attributes:
        build: (vocab_size, rank, hidden_size, **options) -> `heads.head.Head`, an nn.Module.
        options: names of its own `head.options.*` keys, with their defaults.
    """

    name: str
    summary: str
    build: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """What heads are trained on: `head.objective=NAME`.

    Attributes:
        loss: (logits [n, V], targets [n], log_teacher [n, V] or None, options) -> loss [n], nats; differentiable, float32.
        teacher: it needs one; log_teacher then holds the teacher's log-probabilities at the option `temperature` (or at 1).
        options: names of the `head.*` keys it reads, with their defaults.
        impls: values of `head.loss_impl` that can compute it.
        fast: name of a faster path that computes the same, see `losses.distill`; None: the readable path alone.
    """

    name: str
    summary: str
    loss: Callable[..., Tensor]
    teacher: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    impls: tuple[str, ...] = ("auto", "chunked")
    fast: Optional[str] = None


@dataclass(frozen=True)
class Loss:
    """An implementation of the cross-entropy of a low-rank head: `head.loss_impl=NAME`."""

    name: str
    summary: str
    step: Callable[..., Any]


@dataclass(frozen=True)
class Metric:
    """A number of a head in curve.json."""

    name: str
    summary: str


@dataclass(frozen=True)
class Study:
    """A study of trained heads or of a backbone: `study=NAME`."""

    name: str
    summary: str


STARTS: Registry[Start] = Registry("head.init", "start", "bottleneck.heads.starts")
HEAD_KINDS: Registry[HeadKind] = Registry("head.kind", "head kind", "bottleneck.heads.kinds")
OBJECTIVES: Registry[Objective] = Registry("head.objective", "objective", "bottleneck.losses.objectives")
# The owners of these rooms extend the dataclasses above and may name another folder.
LOSSES: Registry[Loss] = Registry("head.loss_impl", "loss implementation", "bottleneck.losses.impls")
METRICS: Registry[Metric] = Registry("metric", "metric", "bottleneck.evaluation.metrics")
STUDIES: Registry[Study] = Registry("study", "study", "bottleneck.studies")

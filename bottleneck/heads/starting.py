"""Starting the heads of a bank: calibrate, compute the start `head.init` and set every head to it.

A start computes low-rank factors from the head it approximates, the calibration moments and, if it asks for them, the
hidden states. A head kind then sets its own parameters from these factors. Every start of the package except `normal`
gives `z = B h` coordinates of unit variance on the calibration text, so that one learning rate means the same for all
of them.

Dims: D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bottleneck.backbone.model import FullHead
from bottleneck.core.extensions import STARTS
from bottleneck.heads.calibration import Calibration, calibrate, roots
from bottleneck.heads.key import HeadKey

if TYPE_CHECKING:
    from bottleneck.heads.bank import HeadBank

log = logging.getLogger(__name__)
Factors = tuple[Tensor, Tensor]  # A [V, R], B [R, D]
Watch = Callable[..., Iterable[Any]]


def unwatched(what: str, steps: Iterable[Any]) -> Iterable[Any]:
    """Iterate without reporting progress."""
    return steps


@dataclass(frozen=True)
class StartInputs:
    """Inputs of a start.

    Attributes:
        head: the head to approximate: the original head, or the one of `head.teacher=FOLDER`.
        moments: over the calibration tokens.
        hidden: batches of hidden states [..., D] of the calibration tokens; empty unless the start `reads_hidden`.
        keys: the heads whose factors will be requested.
        options: the values of the start's options.
        watch: (what, steps) -> steps, reporting progress.
    """

    head: FullHead
    moments: Calibration
    hidden: Sequence[Tensor] = ()
    keys: Sequence[HeadKey] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    watch: Watch = unwatched

    @property
    def W_VD(self) -> Tensor:
        """The matrix of the head, float32.

        A scale (Cohere, Granite) is folded in; bias and soft cap have no low-rank form.
        """
        return self.head.W_VD.float() * self.head.scale


def options_of(declared: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The declared options with the given values, or else their defaults."""
    return {name: given.get(name, default) for name, default in declared.items()}


def make_start(
    init: str,
    head: FullHead,
    moments: Calibration,
    *,
    hidden: Sequence[Tensor] = (),
    keys: Sequence[HeadKey] = (),
    options: Mapping[str, Any] | None = None,
    watch: Watch = unwatched,
) -> Callable[[HeadKey], Factors]:
    """The start `init` of a run: head key -> (A [V, R], B [R, D]).

    Args:
        hidden, keys: as in `StartInputs`; needed by starts that `reads_hidden`.
        options: values of `head.*`; entries that the start does not declare are ignored.
    Raises: UserError for an unknown start.
    """
    start = STARTS[init]
    inputs = StartInputs(head, moments, hidden, keys, options_of(start.options, options or {}), watch)
    return start.make(inputs)


@torch.no_grad()
def start_bank(
    bank: HeadBank,
    init: str,
    head: FullHead,
    hidden: Iterable[Tensor],
    *,
    options: Mapping[str, Any] | None = None,
    whiten: bool = False,
    lr_ratio: float = 1.0,
    watch: Watch = unwatched,
) -> None:
    """Set every head of a bank to its start.

    Args:
        head: the head that the start approximates.
        hidden: batches of hidden states [..., D] of the calibration tokens; read once, kept if the start
            `reads_hidden`.
        options: values of `head.*` keys.
        whiten, lr_ratio: `head.whiten` and `optim.lr_ratio`; used if the bank was built with `coordinates`.
    """
    start = STARTS[init]
    seeds = sorted({key.seed for key in bank.keys})
    if len(seeds) > 1 and start.closed_form:
        log.warning("seed=%s: head.init=%s has nothing random, heads of different seeds will be equal", seeds, init)
    if start.reads_hidden:
        hidden = list(hidden)
    moments = calibrate(hidden, head)
    sources = {key: dataclasses.replace(key, rank=bank[key].start_rank) for key in bank.keys}
    factors = make_start(
        init,
        head,
        moments,
        hidden=list(hidden) if start.reads_hidden else (),
        keys=list(dict.fromkeys(sources.values())),
        options=options,
        watch=watch,
    )
    for key in bank.keys:
        bank[key].begin(key, *factors(sources[key]), head=head, moments=moments)
    if bank.whiten_DD is not None:
        one = torch.eye(len(moments.cov_DD), dtype=torch.float64)
        root, inverse = roots(moments.cov_DD) if whiten else (one, one)
        bank.use_coordinates(root / lr_ratio, inverse * lr_ratio)

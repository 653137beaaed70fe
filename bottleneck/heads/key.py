"""The key that identifies a head within a run, and the head's file and module name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from bottleneck.core.errors import check

if TYPE_CHECKING:
    import torch

LOW_RANK = "low_rank"
MATRICES = (LOW_RANK, "full")  # kinds whose head of rank r is one matrix of rank r


@dataclass(frozen=True)
class HeadKey:
    """Identifies a head in a bank. The key and the run's config determine everything else about the head.

    Attributes:
        kind: name of its `HeadKind`.
        options: the kind's own options that differ from their defaults, sorted by name.
    """

    rank: int
    lr: float
    seed: int
    kind: str = LOW_RANK
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """File and module name without dots, such as r64_lr1e-2_s0 or mos-components4_r64_lr1e-2_s0.

        The rate is exact to 6 digits.
        """
        kind = (
            "" if self.kind == LOW_RANK else "-".join([self.kind, *(f"{k}{_word(v)}" for k, v in self.options)]) + "_"
        )
        return f"{kind}r{self.rank}_lr{_digits(self.lr)}_s{self.seed}"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> HeadKey:
        """The key of a head from its row in curve.json."""
        return cls(row["rank"], row["lr"], row["seed"], row.get("kind", LOW_RANK), as_options(row.get("options") or {}))

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of its row in curve.json besides rank, rate and seed: none for a low-rank head."""
        if self.kind == LOW_RANK:
            return {}
        options = {name: list(v) if isinstance(v, tuple) else v for name, v in self.options}
        return {"kind": self.kind} | ({"options": options} if options else {})


def as_options(given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options in the form of a key: sorted by name, with tuples for lists."""
    return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(given.items()))


def generator(key: HeadKey) -> torch.Generator:
    """A CPU generator seeded by a head's rank and seed only, so that heads of all rates start from the same values."""
    import torch  # here, since commands that only read curves need no torch

    digest = hashlib.sha256(f"{key.rank}/{key.seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _digits(number: float) -> str:
    d = Decimal(f"{number:.6g}").normalize().as_tuple()
    return f"{''.join(map(str, d.digits))}e{d.exponent}"


def _word(value: Any) -> str:
    """An option's value in a file name: letters, digits and signs only."""
    if isinstance(value, float):
        return ("m" if value < 0 else "") + _digits(abs(value))
    if isinstance(value, (list, tuple)):
        return "x".join(map(_word, value))
    return "".join(c if c.isalnum() else "x" for c in str(value).lower())


def full_rank_index(keys: list[HeadKey], hidden_size: int) -> int:
    """Index of the head of rank D, the teacher if head.teacher=trained. Raises UserError unless exactly one has it."""
    full = [i for i, key in enumerate(keys) if key.rank == hidden_size and key.kind in MATRICES]
    kinds = "of kind low_rank or full and"
    needs = f"needs exactly one head {kinds} of the full rank {hidden_size} in the run, with one rate and one seed"
    check(len(full) == 1, f"head.teacher=trained: {needs}; found {len(full)}")
    return full[0]

"""The heads of a run as groups of one kind: the entries of `heads`, or the one group that `head.kind` and `ranks` give.

    heads=[{kind: low_rank, rank: [64, 256]}, {kind: mos, rank: 64, components: 4, lr: 1e-3}]

An entry has a kind (default: low_rank), ranks (default: those of `ranks`), rates (default: those of `optim`) and the
options of its kind. Every entry is trained with every seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

from bottleneck.config.head_options import as_declared, check_option_types, head_options
from bottleneck.config.numbers import as_count, as_list, as_rate, unique
from bottleneck.config.schema import HeadConfig
from bottleneck.core.errors import check
from bottleneck.core.extensions import HEAD_KINDS, HeadKind

OWN = ("kind", "rank", "lr")  # keys of an entry besides the options of its kind
LOW_RANK = "low_rank"


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one kind with the same options.

    Attributes:
        ranks: auto, or a list; `at_shape` resolves auto.
        options: values of all options of the kind.
        lr: rates that replace those of `optim`.
        where: the key that chose the kind, for messages.
    """

    kind: str
    ranks: Literal["auto"] | list[int]
    options: Mapping[str, Any]
    lr: Optional[list[float]] = None
    where: str = "head.kind"

    @property
    def declared(self) -> HeadKind:
        return HEAD_KINDS[self.kind]

    @property
    def named(self) -> str:
        """The kind as it was given, for messages."""
        return f"{self.where}={self.kind}"


def in_form(heads: Any) -> Optional[list[dict[str, Any]]]:
    """Entries of `heads` with lists of ranks and rates. Raises UserError for a wrong name, type or value."""
    if heads is None:
        return None
    example = "such as heads=[{kind: low_rank, rank: 256}, {kind: mos, rank: 64, components: 4}]"
    fits = isinstance(heads, list) and len(heads) > 0 and all(isinstance(e, dict) for e in heads)
    check(fits, f"heads={heads}: must be a list of kinds with their options, {example}")
    return [_entry(f"heads[{i}]", given) for i, given in enumerate(heads)]


def _entry(where: str, given: dict[str, Any]) -> dict[str, Any]:
    name = given.get("kind", LOW_RANK)
    check(name in HEAD_KINDS.names(), f"{where}.kind={name}: no such kind; allowed are {', '.join(HEAD_KINDS.names())}")
    kind = HEAD_KINDS[name]
    entry: dict[str, Any] = {"kind": name}
    if "rank" in given:
        ranks = [as_count(f"{where}.rank", r) for r in as_list(given["rank"])]
        entry["rank"] = unique(f"{where}.rank", ranks)
    if "lr" in given:
        entry["lr"] = unique(f"{where}.lr", [as_rate(f"{where}.lr", v) for v in as_list(given["lr"])])
    options = {key: as_declared(value, kind.options.get(key)) for key, value in given.items() if key not in OWN}
    allowed = ", ".join([*OWN, *kind.options])
    for option in options:
        check(option in kind.options, f"{where}.{option}: not an option of {name}; allowed are {allowed}")
    check_option_types(where, options, kind.options)
    reason = kind.refuses(**{**kind.options, **options}) if kind.refuses else None
    check(reason is None, f"{where}.{reason}")
    return entry | options


def head_groups(c: Any) -> list[HeadGroup]:
    """The groups of a run's config, composed or frozen."""
    h: HeadConfig = c.head
    if c.heads is None:
        return [HeadGroup(h.kind, c.ranks, head_options(h, HEAD_KINDS[h.kind].options))]
    groups = []
    for i, entry in enumerate(c.heads):
        options = HEAD_KINDS[entry["kind"]].options
        chosen = {**options, **{k: v for k, v in entry.items() if k not in OWN}}
        ranks = entry.get("rank", "auto" if HEAD_KINDS[entry["kind"]].full_rank else c.ranks)
        groups.append(HeadGroup(entry["kind"], ranks, chosen, entry.get("lr"), f"heads[{i}].kind"))
    return groups


def check_groups(c: Any) -> None:
    """Raises UserError where a kind does not go with the run's losses or coordinates, or a key is given in vain."""
    groups, h = head_groups(c), c.head
    if c.heads is not None:
        check(h.kind == LOW_RANK, f"head.kind={h.kind}: heads names the kinds; give one of both keys")
        all_ranked = all("rank" in e or HEAD_KINDS[e["kind"]].full_rank for e in c.heads)
        check(c.ranks == "auto" or not all_ranked, "ranks: every entry of heads has a rank of its own; leave one out")
        all_rated = all("lr" in e for e in c.heads)
        check(c.optim.lr is None or not all_rated, "optim.lr: every entry of heads has an lr of its own; leave one out")
    for group in groups:
        kind = group.declared
        impls = f"does not go with {group.named}; allowed are {', '.join(kind.impls or ())}"
        check(kind.impls is None or h.loss_impl in kind.impls, f"head.loss_impl={h.loss_impl}: {impls}")
        other = f"does not go with {group.named}, which has no A B"
        check(kind.coordinates or not h.whiten, f"head.whiten: {other}")
        check(kind.coordinates or c.optim.lr_ratio == 1, f"optim.lr_ratio: {other}")


def at_shape(group: HeadGroup, hidden_size: int, ladder: tuple[int, ...]) -> HeadGroup:
    """The group with its ranks as a list. Raises UserError for a rank that the backbone cannot have.

    Args: ladder: ranks of auto, of which those below the hidden size are taken.
    """
    where = "ranks" if group.where == "head.kind" else group.where.replace(".kind", ".rank")
    if group.declared.full_rank:
        full = f"{where}: {group.named} exists at rank {hidden_size} only; leave {where.rpartition('.')[2]} out"
        check(group.ranks in ("auto", [hidden_size]), full)
        ranks = [hidden_size]
    elif group.ranks == "auto":
        ranks = [r for r in ladder if r < hidden_size] + [hidden_size]
    else:
        ranks = list(group.ranks)
    for r in ranks:
        above = f"{where}: {r} is above the hidden size of the backbone; allowed are 1 to {hidden_size}"
        check(r <= hidden_size, above)
    return dataclasses.replace(group, ranks=ranks)

"""Expected speed-up of speculative decoding from acceptances and times of steps.

A round drafts k tokens one after the other, verifies them by one pass of the target over k + 1 tokens, and yields the
accepted ones and one more from the target (Leviathan et al. 2023, Theorem 3.8, where the target's pass takes as long
for k + 1 tokens as for one):

    speed-up(k) = (E_k + 1) · t_target(1) / (k · t_draft + t_target(k + 1))

E_k is `evaluation.metrics.accepted`. With a batch every sequence has rounds of its own; a batch of them takes as long
as its times are, and E_k is the mean over sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Best(NamedTuple):
    """The number of drafted tokens with the largest expected speed-up; 0 tokens and 1.0 where none pays."""

    drafted: int
    speedup: float


def speedups(accepted: Sequence[float], draft_s: float, target_s: Sequence[float]) -> list[float]:
    """Speed-up for k = 1, 2, … drafted tokens.

    Args:
        accepted: E_k for k = 1, 2, …
        draft_s: seconds of a step of the draft.
        target_s: seconds of a pass of the target over 1, 2, … tokens; one more than `accepted` has.
    """
    return [(e + 1) * target_s[0] / (k * draft_s + target_s[k]) for k, e in enumerate(accepted, start=1)]


def best_of(found: Sequence[float]) -> Best:
    """Args: found: of `speedups`."""
    return max([Best(0, 1.0), *(Best(k, s) for k, s in enumerate(found, start=1))], key=lambda b: b.speedup)

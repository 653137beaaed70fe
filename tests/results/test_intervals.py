"""Confidence intervals: their coverage is the nominal one, paired ones are tighter, knees have them too."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bottleneck.results import curve
from bottleneck.results.intervals import paired_difference
from bottleneck.results.knee import crossing, knee_lines
from support.curves import made

RANKS = (8, 16, 32, 64)
OWN = 3.0
TRUTH = {8: 4.2, 16: 3.6, 32: 3.2, 64: 3.02}


def simulated(rng: np.random.Generator, groups: int, likeness: float) -> dict:
    """A curve whose stretches are a sample of text with known expected losses.

    Stretches differ in how hard they are for every head (AR(1) with coefficient `likeness` between neighbours), more so
    for poor heads, and each head has noise of its own. Few tokens in the last stretch.
    """
    tokens = [512] * (groups - 1) + [200]
    hard = np.zeros(groups)
    hard[0] = rng.normal()
    for g in range(1, groups):
        hard[g] = likeness * hard[g - 1] + math.sqrt(1 - likeness**2) * rng.normal()
    losses = {0: OWN + 0.4 * hard}
    losses |= {r: x + 0.4 * hard * (1 + 0.3 * (x - OWN)) + 0.06 * rng.standard_normal(groups) for r, x in TRUTH.items()}
    means = {r: float(np.average(x, weights=tokens)) for r, x in losses.items()}
    c = made({r: means[r] for r in RANKS}, own=means[0], validation_tokens=sum(tokens))
    c["reference"] |= {"group_tokens": tokens, "group_losses": losses[0].tolist()}
    for h in c["heads"]:
        h["group_losses"] = losses[h["rank"]].tolist()
    return curve.finish(c)


@pytest.mark.slow
@pytest.mark.parametrize("groups, likeness", [(69, 0.0), (100, 0.3)])
def test_intervals_cover_the_truth_in_95_of_100_curves(groups, likeness):
    """400 simulated curves: losses, differences from the original head, and knees."""
    rng = np.random.default_rng(2)
    hits: dict[str, list[bool]] = {"loss": [], "excess": [], "knee": [], "pair": []}
    knee = crossing([(r, TRUTH[r]) for r in RANKS], OWN * 1.1)
    widths = []
    for _ in range(400):
        c = simulated(rng, groups, likeness)
        own = c["reference"]["loss_interval"]
        hits["loss"].append(own[0] <= OWN <= own[1])
        h = c["heads"][1]
        low, high = h["excess_interval"]
        hits["excess"].append(low <= TRUTH[16] - OWN <= high)
        widths.append((high - low) / (own[1] - own[0]))
        pair = paired_difference(c, c["heads"][1], c["heads"][2])
        hits["pair"].append(pair[0] <= TRUTH[16] - TRUTH[32] <= pair[1])
        (ten,) = [k for k in c["knee"] if k["percent"] == 10]
        low, high = ten["interval"]
        hits["knee"].append(low <= knee <= (high or math.inf))
    shares = {name: np.mean(found) for name, found in hits.items()}
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares
    # differences on the same tokens are tighter than losses
    assert max(widths) < 0.9 and np.mean(widths) < 0.6, np.mean(widths)


def test_intervals_change_no_number_and_need_enough_text():
    """They only add keys; without losses of stretches, or with few, there are none."""
    c = simulated(np.random.default_rng(0), 60, 0.0)
    plain = json.loads(json.dumps(c))
    for row in (plain["reference"], *plain["heads"], *plain["knee"]):
        for key in [k for k in row if k.endswith("interval") or k.startswith("group_")]:
            del row[key]
    again = curve.finish(json.loads(json.dumps(plain)))
    assert again == plain
    for row in (c["reference"], *c["heads"]):
        low, high = row["loss_interval"]
        assert low < row["loss"] < high
        assert row["perplexity_interval"] == pytest.approx([math.exp(low), math.exp(high)], rel=1e-5)
    few = simulated(np.random.default_rng(0), 9, 0.0)
    assert "loss_interval" not in few["heads"][0] and "interval" not in few["knee"][0]
    assert paired_difference(few, few["heads"][0], few["heads"][1]) is None


def test_a_knee_beyond_the_last_rank_has_no_upper_end():
    """If resamples do not reach the target, the interval is open; it never begins below the smallest rank."""
    rng = np.random.default_rng(0)
    c = simulated(rng, 60, 0.0)
    one, *_, ten = c["knee"]
    assert one["percent"] == 1 and one["rank"] is not None and one["interval"][1] is None
    assert "95 %" in knee_lines(c)[0] and "or more" in knee_lines(c)[0]
    assert RANKS[0] <= ten["interval"][0] < ten["rank"] < ten["interval"][1] <= RANKS[-1]


def test_merged_runs_have_the_same_draws(tmp_path):
    """Heads of two runs on the same text are compared as if they had trained in one."""
    whole = simulated(np.random.default_rng(3), 50, 0.0)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        half = json.loads(json.dumps(whole))
        half["heads"] = half["heads"][part]
        halves.append(curve.finish(half))
    (merged,) = curve.merge(halves)
    assert merged == whole
    # a run of an earlier version has no stretches: its heads have no interval, the others keep theirs
    del halves[0]["reference"]["group_losses"], halves[0]["reference"]["group_tokens"]
    for h in halves[0]["heads"]:
        del h["group_losses"], h["loss_interval"], h["perplexity_interval"], h["excess_interval"]
    (mixed,) = curve.merge(halves)
    assert ["loss_interval" in h for h in mixed["heads"]] == [False, False, True, True]
    assert all("interval" not in k for k in mixed["knee"])

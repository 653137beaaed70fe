"""Cost as the axis of the picture: parameters, bytes and FLOPs of a head, and the Pareto front."""

from __future__ import annotations

import copy
import io
import json
import random
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from bottleneck.benchmark import __main__ as benchmark
from bottleneck.heads.head import build_head
from bottleneck.heads.key import HeadKey
from bottleneck.results import curve, equal_cost, picture
from bottleneck.results.cost import AXES, MEASURED, measured_on, pareto
from bottleneck.results.knee import cost_lines, knee_lines, least_costs
from bottleneck.results.labels import labels, line_names
from bottleneck.results.schema import fault
from conftest import HIDDEN, VOCAB, composed
from support.curves import made, save
from train import train


@pytest.fixture
def drawn(monkeypatch) -> list[dict[str, list[float]]]:
    """x of every line of each figure by its label, for the figures that are drawn."""
    seen: list[dict[str, list[float]]] = []
    plt = picture.pyplot()
    close = plt.close

    def keep(figure: Any) -> None:
        seen.append({str(line.get_label()): list(line.get_xdata()) for line in figure.axes[0].get_lines()})
        close(figure)

    monkeypatch.setattr(plt, "close", keep)
    return seen


def test_costs_are_those_of_the_shapes():
    """Counted on the products of W = A B: d r + r V multiplications, as many additions, each weight read once."""
    (h,) = made({8: 2.5})["heads"]
    d, V, r = 64, 100, 8
    assert AXES["rank"].of(h) == r and AXES["parameters"].of(h) == d * r + r * V
    assert AXES["flops"].of(h) == AXES["bytes"].of(h) == 2 * (d * r + r * V)
    other = h | {"kind": "mixture"}
    assert AXES["flops"].of(other) is None and AXES["flops"].of(other | {"flops_per_token": 9}) == 9


@pytest.mark.parametrize("x", [x for x in AXES if x not in MEASURED])
def test_heads_and_knees_stand_at_their_cost(drawn, x):
    c = made({8: 2.5, 16: 2.1, 64: 2.01})
    picture.draw([c], io.BytesIO(), x)
    scale = {"rank": 1, "parameters": 164, "bytes": 328, "flops": 328}[x]
    (lines,) = drawn
    assert lines["toy"] == [8 * scale, 16 * scale, 64 * scale]
    knee = next(k["rank"] for k in c["knee"] if k["percent"] == 10)
    assert any(xs == [pytest.approx(scale * knee)] for xs in lines.values())
    own = [xs for name, xs in lines.items() if name.startswith("original head's cost")]
    assert own == ([] if x == "rank" else [[scale // 164 * 6400] * 2])


@pytest.mark.parametrize("x", ["parameters", "decode_ms"])
def test_the_least_cost_of_several_kinds(drawn, x):
    """Marked at the cheapest kind: half way in the logarithm of the cost where the losses are the target -+ 0.05."""
    c = made({4: 2.5, 8: 2.25, 16: 2.15, 64: 2.05})
    own = c["reference"]["loss"] = 2.0
    other = copy.deepcopy(c["heads"])
    for i, h in enumerate(other):
        h |= {"kind": "gated", "parameters": 2 * h["parameters"], "loss": h["loss"] - 0.005 * i, "flops_per_token": 9}
    c["heads"] += other
    for h in c["heads"]:
        h["decode_ms"], h["timing"] = h["parameters"] / 1000, {}
    scale = {"parameters": 164, "decode_ms": 0.164}[x]
    one, five, ten = least_costs(c, x)
    assert one == (1, None, "") and ten[0] == 10 and own * 1.1 == pytest.approx((2.25 + 2.15) / 2)
    assert ten[1] == pytest.approx(scale * (8 * 16) ** 0.5) and ten[2] == "fisher"
    assert five[1] == pytest.approx(scale * 16 * 4**0.5) and five[2] == "fisher"
    (line,) = cost_lines(c, x)
    assert line.startswith("least ") and "1 %: none of these heads; 5 %: " in line and line.endswith("(low_rank)")
    picture.draw([c], io.BytesIO(), x)
    assert [pytest.approx(ten[1])] in drawn[0].values()


def of_kinds(c: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """The curve with its heads once more for each kind."""
    heads = [h | {"kind": kind} for kind in kinds for h in copy.deepcopy(c["heads"])]
    return curve.finish(c | {"heads": heads, "knee": []})


def test_lines_are_named_by_what_differs(drawn):
    """Kinds by their names, one start by none; two curves of several kinds: the colour is the kind, the marker the
    curve; what all share is the title."""
    kinds = ["block", "low_rank"]
    short, long = (of_kinds(made({8: 2.5, 64: 2.1}, tokens=t), kinds) for t in (1_000_000, 2_000_000))
    assert set(line_names([short]).values()) == {"block", "low_rank"}
    mixed = copy.deepcopy(short)
    mixed["heads"][0]["init"] = "svd"
    assert "svd, " + mixed["heads"][0]["kind"] in line_names([mixed]).values()
    assert line_names([made({8: 2.5})]) == {"fisher": "fisher"}
    picture.draw([short, long], io.BytesIO())
    picture.draw([made({8: 2.5, 64: 2.1})], io.BytesIO())
    both, one = (set(lines) for lines in drawn)
    assert {"block", "low_rank", "1M tokens", "2M tokens"} <= both
    assert not any("toy" in name for name in both) and "toy" in one


def test_a_curve_says_its_only_kind_and_what_tells_its_text_from_anothers():
    (plif,) = [of_kinds(made({8: 2.5, 64: 2.1}), ["plif"])]
    assert labels([plif]) == ["toy, plif"]
    other = made({8: 2.5}, data_hash="e", validation_tokens=20)
    assert labels([made({8: 2.5}), other]) == ["toy, 10 validation tokens", "toy, 20 validation tokens"]
    assert labels([made({8: 2.5}), other | {"validation_tokens": 10}]) == ["toy, text d", "toy, text e"]
    console = Console(width=200, file=io.StringIO())
    curve.show([made({8: 2.5}), other], console)
    assert "1,000 training tokens, 10 validation tokens" in console.file.getvalue()


def test_a_line_without_a_point_is_said_to_have_diverged(drawn):
    kinds = ["block", "low_rank"]
    curves = [of_kinds(made({8: 2.5, 64: 2.1}, tokens=t), kinds) for t in (1_000_000, 2_000_000)]
    for h in (h for c in curves for h in c["heads"] if h["kind"] == "block"):
        h.update(status="diverged", best=False)
    picture.draw(curves, io.BytesIO())
    picture.draw(curves[:1], io.BytesIO())
    assert all("block (diverged)" in lines and "low_rank" in lines for lines in drawn)


def test_kinds_of_one_rank_share_a_line_of_knees():
    c = of_kinds(made({8: 2.05}), ["block", "low_rank"])
    c["heads"][0]["loss"] = 2.5
    assert knee_lines(curve.finish(c)) == ["within x % of the original head's loss: 1 %: none; 5 %: block; 10 %: block"]
    c["heads"][0]["loss"] = 2.01
    (line,) = knee_lines(curve.finish(c))
    assert line.endswith("1 %: low_rank; 5 %: low_rank, block; 10 %: low_rank, block")


def test_the_pareto_front_is_what_nothing_beats():
    """Against the definition, on random points."""
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randrange(20), rng.randrange(20)) for _ in range(15)]
        front = pareto(points)
        beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        assert front == sorted(set(points) - beaten)
        near = pareto(points, near=0.3)
        for p in front:  # what is left out is nearly as dear as a better point that is kept
            kept = [q for q in near if q[0] <= 1.3 * p[0] and q[1] < p[1]]
            assert (p in near) != bool(kept)
    chain = [(100 + 2 * i, 50 - i) for i in range(20)]
    assert len(pareto(chain, near=0.03)) > 6


def test_the_command_draws_against_cost(tmp_path, capsys, drawn):
    one, two = made({8: 2.5, 64: 2.1}), made({8: 2.4, 64: 2.2}, recipe={"batch_size": 16})
    runs = [str(save(tmp_path / name, c)) for name, c in (("a", one), ("b", two))]
    assert curve.main([*runs, "--out", str(tmp_path / "out"), "--x", "parameters"]) == 0
    assert drawn[0]["Pareto front (costs within 3% count as equal)"] == [8 * 164, 64 * 164]
    assert curve.main([*runs, "--out", str(tmp_path / "out"), "--x", "weight"]) == 2
    assert "invalid choice: 'weight'" in capsys.readouterr().err
    for h in one["heads"]:
        h["kind"] = "mixture"
    save(tmp_path / "a", one)
    assert curve.main([*runs, "--out", str(tmp_path / "no"), "--x", "bytes"]) == 2
    error = capsys.readouterr().err
    assert "--x bytes: not known for heads of kind mixture" in error and not (tmp_path / "no").exists()


@pytest.fixture
def mixed_run(toy, tmp_path):
    """A small run of three kinds."""
    heads = "heads=[{rank: 4}, {kind: mos, rank: 4, components: 3}, {kind: gated, rank: 4}]"
    words = [*toy, "tokens=1536", "data.validation_tokens=600", "ranks=auto", heads]
    train(composed(words), tmp_path / "run")
    return tmp_path / "run"


def test_costs_of_other_kinds(mixed_run):
    """Every weight of gated is used once; A of a mixture once for each component. PyTorch counts the products."""
    rows = {h.get("kind", "low_rank"): h for h in json.loads((mixed_run / "curve.json").read_text())["heads"]}
    for kind, h in rows.items():
        head = build_head(HeadKey.of(h), VOCAB, HIDDEN)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            head.logits(torch.randn(1, HIDDEN))
        assert AXES["flops"].of(h) == counted.get_total_flops(), kind
        assert AXES["bytes"].of(h) == 2 * h["parameters"]
    assert rows["mos"]["flops_per_token"] > 2 * rows["mos"]["parameters"]


def test_milliseconds_are_measured_only_when_asked_for(mixed_run, tmp_path, capsys):
    """No run has them; --x refuses; the benchmark writes them with hardware; then the picture can be drawn."""
    assert not any("step_ms" in h for h in json.loads((mixed_run / "curve.json").read_text())["heads"])
    words = [str(mixed_run), "--out", str(tmp_path / "out"), "--x", "step_ms"]
    assert curve.main(words) == 2
    assert "--x step_ms: not measured for heads of kind gated, low_rank, mos" in capsys.readouterr().err
    assert benchmark.main(["cost", str(mixed_run), "--tokens", "64", "--repeats", "2"]) == 0
    content = json.loads((mixed_run / "curve.json").read_text())
    assert fault(content) is None
    for h in content["heads"]:
        assert h["step_ms"] > 0 and h["decode_ms"] > 0 and h["timing"]["tokens"] == 64 and h["timing"]["device"]
    for x in ("step_ms", "decode_ms"):
        assert curve.main([*words[:-1], x]) == 0
    content["heads"][0]["timing"]["device"] = "another machine"
    (mixed_run / "curve.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert curve.main(words) == 2
    assert "--x step_ms: measured in different ways: " in capsys.readouterr().err


def test_other_kinds_are_compared_with_the_low_rank_head_of_their_cost():
    """Heads that differ by exactly 0.1 on every stretch: the difference is 0.1 and certain, whatever the losses are."""
    c = made({8: 2.5, 16: 2.3}, validation_tokens=1200)
    groups = [2.5 + (-1) ** i for i in range(12)]
    c["reference"] |= {"group_tokens": [100] * 12, "group_losses": groups}
    c["heads"][0]["group_losses"] = groups
    mixture = {"kind": "mos", "options": {"components": 2}, "best": True}
    near, far = (c["heads"][0] | mixture | {"rank": r, "parameters": n} for r, n in ((7, 1300), (9, 1400)))
    near |= {"loss": 2.4, "group_losses": [x - 0.1 for x in groups]}
    c["heads"] += [near, far]
    assert [(a["rank"], b["rank"]) for a, b in equal_cost.pairs(c, "parameters")] == [(7, 8)]
    _, line = equal_cost.lines(c, "parameters")
    assert "rank 7, against rank 8: -0.1000 (95 %: -0.1000 to -0.1000)" in line and "mos components=2" in line
    assert equal_cost.lines(c, "step_ms") == [], "not measured"
    near["init"] = "svd"  # a difference of starts would be taken for one of kinds
    assert equal_cost.pairs(c, "parameters") == []


def test_the_bias_takes_part_in_no_product():
    head = build_head(HeadKey(8, 1e-3, 0, "low_rank_bias"), VOCAB, HIDDEN)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        head.logits(torch.randn(1, HIDDEN))
    assert head.flops_per_token == counted.get_total_flops()


def test_times_of_different_numbers_of_threads_are_different_measurements():
    timing = {"device": "CPU, 2 cores", "tokens": 64, "dtype": "float32"}
    said = {measured_on({"timing": timing | {"threads": n}}) for n in (1, 2)}
    assert len(said) == 2 and any("1 thread," in words for words in said)


def test_the_least_measured_cost_is_that_of_a_head_that_no_cheaper_one_beats():
    """Regression: rank 64 is good enough and measured faster than 16, which hid it: "none of these heads"."""
    c = made({8: 2.5, 16: 2.4, 64: 2.0})
    for h, ms in zip(c["heads"], (2.0, 2.2, 2.1)):
        h["step_ms"] = ms
    ten = least_costs(c, "step_ms")[2]
    assert ten[1] is not None and 2.0 < ten[1] <= 2.1
    c["heads"][2]["step_ms"] = 1.9  # the fastest of all
    assert [cost for _, cost, _ in least_costs(c, "step_ms")] == [1.9] * 3


def test_other_texts_have_no_common_front_and_lines_of_their_own(tmp_path, capsys, drawn):
    """A perplexity on another text is no better one."""
    runs = [str(save(tmp_path / n, made({8: x}, data=n, data_hash=n))) for n, x in (("a", 2.5), ("b", 1.5))]
    assert curve.main([*runs, "--out", str(tmp_path / "out"), "--x", "flops"]) == 0
    assert "Pareto front" not in drawn[0]
    said = capsys.readouterr().out.splitlines()
    assert [b for a, b in zip(said, said[1:]) if a in ("toy, a:", "toy, b:")] == [x for x in said if "least" in x]


def test_times_of_a_head_are_kept_in_whatever_order_its_runs_are_merged():
    """Regression: those of the first run that had the head counted, also where only the second was timed."""
    plain, timed = made({8: 2.5}), made({8: 2.5})
    timed["heads"][0] |= {"step_ms": 2.0, "decode_ms": 0.1, "timing": {"device": "d"}}
    for curves in ([plain, timed], [timed, plain]):
        (merged,) = curve.merge(curves)
        assert merged["heads"][0]["step_ms"] == 2.0 and merged["heads"][0]["timing"] == {"device": "d"}
    assert "step_ms" not in plain["heads"][0]

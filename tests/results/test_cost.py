"""Cost as the axis of the picture: parameters, bytes and FLOPs of a head, and the Pareto front."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest

from bottleneck.results import curve, picture
from bottleneck.results.cost import AXES, pareto
from support.curves import made, save


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


@pytest.mark.parametrize("x", AXES)
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


def test_the_pareto_front_is_what_nothing_beats():
    """Against the definition, on random points."""
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randrange(20), rng.randrange(20)) for _ in range(15)]
        front = pareto(points)
        beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        assert front == sorted(set(points) - beaten)


def test_the_command_draws_against_cost(tmp_path, capsys, drawn):
    one, two = made({8: 2.5, 64: 2.1}), made({8: 2.4, 64: 2.2}, recipe={"batch_size": 16})
    runs = [str(save(tmp_path / name, c)) for name, c in (("a", one), ("b", two))]
    assert curve.main([*runs, "--out", str(tmp_path / "out"), "--x", "parameters"]) == 0
    assert drawn[0]["Pareto front"] == [8 * 164, 64 * 164]
    assert curve.main([*runs, "--out", str(tmp_path / "out"), "--x", "weight"]) == 2
    assert "invalid choice: 'weight'" in capsys.readouterr().err
    for h in one["heads"]:
        h["kind"] = "mixture"
    save(tmp_path / "a", one)
    assert curve.main([*runs, "--out", str(tmp_path / "no"), "--x", "bytes"]) == 2
    error = capsys.readouterr().err
    assert "--x bytes: not known for heads of kind mixture" in error and not (tmp_path / "no").exists()

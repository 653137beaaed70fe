"""Tokens until a run reaches another run's loss: crossings by hand, real runs, and runs that cannot be compared."""

from __future__ import annotations

import csv

from bottleneck.results.tokens_to_equal_loss import main, race, reached, read


def test_where_a_line_reaches_a_loss():
    line = [(0, 5.0), (100, 3.0), (200, 3.5), (300, 2.0)]
    assert (
        reached(line, 4.0) == 50
        and reached(line, 3.0) == 100
        and reached(line, 2.75) == 250
        and reached(line, 6.0) == 0
    )
    assert reached(line, 1.9) is None and reached([], 1.0) is None


def test_two_runs_race(run, tmp_path, capsys):
    """A higher rate gets there sooner; each number is that of the runs' own files."""
    options = ("ranks=[2,32]", "trainer.val_every=4")
    run(*options, "optim.lr=[1e-4,1e-3]", run_dir=tmp_path / "slow")
    run(*options, "optim.lr=1e-2", "tokens=8192", run_dir=tmp_path / "fast")
    assert main([str(tmp_path / "slow"), str(tmp_path / "fast"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert (
        "tokens until the loss of slow after 10,240" in said and (tmp_path / "out" / "race.png").stat().st_size > 10_000
    )
    with open(tmp_path / "out" / "race.csv", newline="") as f:
        found = {int(r["rank"]): r for r in csv.DictReader(f)}
    base, other = read(tmp_path / "slow"), read(tmp_path / "fast")
    assert sorted(found) == [2, 32]
    for rank, row in found.items():
        aim = min(h["loss"] for h in base.curve["heads"] if h["rank"] == rank)
        ((head, line),) = other.heads(rank)
        assert float(row["base_loss"]) == aim and float(row["loss"]) == head["loss"] == line[-1][1]
        assert [t for t, _ in line] == [0, 2048, 4096, 6144, 8192]
        first = next(i for i, (_, x) in enumerate(line) if x <= aim)
        assert line[max(0, first - 1)][0] <= int(row["tokens"]) <= line[first][0]
    assert [f.tokens for f in race(other, [base])] == [None, None]


def test_what_cannot_be_compared_is_one_line(run, tmp_path, capsys):
    run("ranks=[2]", "tokens=1024", run_dir=tmp_path / "a")
    run("ranks=[4]", "tokens=1024", run_dir=tmp_path / "b")
    run("ranks=[2]", "tokens=1024", "data.validation_fraction=0.1", run_dir=tmp_path / "text")
    run("ranks=[2]", "tokens=1024", "logger=none", run_dir=tmp_path / "silent")
    for other, words in (
        ("b", "shares no rank"),
        ("text", "its text is not that of a"),
        ("silent", "no losses along training"),
        ("absent", "no such folder"),
        ("a", f"{tmp_path / 'a'}: the run is given twice; give each once"),
        ("b/../a", "a: the run is given twice; give each once"),
    ):
        assert main([str(tmp_path / "a"), str(tmp_path / other), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()

"""Result files are a set: curve.json is written first, failed pictures do not matter, a rerun completes the set."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bottleneck.core import files as atomic
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import METRICS, Metric
from bottleneck.results import curve, files
from bottleneck.results import page as report
from bottleneck.results.details import panels
from conftest import ROOT
from support.curves import made

DERIVED = ("curve.csv", "curve.png", "details.png")


def finished(folder: Path) -> Path:
    """The folder of a finished run with metrics, its heads of one number."""
    c = made({8: 2.5, 64: 2.1})
    for h in c["heads"]:
        h |= {"kl": 0.5, "top1_agreement": 0.5, "top5_agreement": 0.5, "acceptance": 0.5}
    curve.write([c], folder)
    (folder / "heads").mkdir()
    for rank in (8, 64):
        save_file({"A": torch.zeros(1)}, folder / "heads" / f"r{rank}_lr1e-1_s0.safetensors")
    return folder


@pytest.mark.parametrize("missing", [DERIVED[:1], DERIVED[1:2], DERIVED[2:], DERIVED])
def test_a_rerun_completes_the_files_of_a_finished_run(tmp_path, missing):
    """Regression: a run killed after curve.json counted as finished, and its table and pictures were never written."""
    run = finished(tmp_path / "run")
    whole = {name: (run / name).read_bytes() for name in ("curve.json", *DERIVED)}
    for name in missing:
        (run / name).unlink()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run / f".curve.csv.{dead.pid}.part").write_text("half")
    found = curve.complete(run)
    assert (
        found == json.loads(whole["curve.json"]) and not (run / missing[0]).exists()
    )  # a refused command writes nothing
    curve.write_missing(found, run)
    assert {name: (run / name).read_bytes() for name in whole} == whole and not list(run.glob(".*.part"))


def test_a_whole_set_is_left_as_it_is(tmp_path):
    run = finished(tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    curve.write_missing(curve.complete(run), run)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    (run / "curve.csv").write_bytes(b"")
    curve.write_missing(curve.complete(run), run)
    assert (run / "curve.csv").stat().st_size
    head = run / "heads" / "r8_lr1e-1_s0.safetensors"
    for cut in (head.read_bytes()[:-1], b""):  # "finished: nothing to do" was said of both
        head.write_bytes(cut)
        assert curve.complete(run) is None
    head.unlink()
    assert curve.complete(run) is None  # it has not finished
    (run / "curve.json").write_text("{")
    assert curve.complete(run) is None


@pytest.mark.parametrize(
    "at, end",
    [(1, KeyboardInterrupt()), (2, UserError("curve.png: cannot be written")), (3, OSError(errno.ENOSPC, "full"))],
)
def test_whenever_writing_ends_no_file_is_of_another_curve(tmp_path, monkeypatch, at, end):
    """Ctrl-C or a full disk at the second, third, fourth file: only files of the new curve stay; a rerun completes
    them."""
    run = finished(tmp_path / "run")
    new = made({8: 2.4, 64: 2.05})
    for h in new["heads"]:
        h |= {"kl": 0.4, "top1_agreement": 0.5, "top5_agreement": 0.5, "acceptance": 0.5}
    calls, put = [], files._put

    def stops(path: Path, raw: bytes) -> None:
        calls.append(path.name)
        if len(calls) == at + 1:
            raise end
        put(path, raw)

    monkeypatch.setattr(files, "_put", stops)
    with pytest.raises(type(end)):
        curve.write([new], run)
    monkeypatch.setattr(files, "_put", put)
    assert calls == ["curve.json", *DERIVED][: at + 1] and not (run / calls[-1]).exists()
    curve.write_missing(curve.complete(run), run)
    curve.write([new], tmp_path / "whole")
    for name in ("curve.json", *DERIVED):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("loss", [0.0, 460.0, 645.0, 699.9, 1e5])
def test_pictures_of_any_loss(tmp_path, loss, caplog):
    """Regression: a head of 645 nats overflowed the axis after training, and no curve was written."""
    c = made({8: 2.5, 64: 2.1})
    for h in c["heads"][:1]:
        perplexity = math.exp(loss) if loss < 700 else None
        h |= {"loss": loss, "perplexity": perplexity, "bits_per_byte": loss / 3, "initial_loss": loss}
    curve.write([curve.finish(c)], tmp_path)
    assert not caplog.records and (tmp_path / "curve.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "curve.json").read_text())["heads"][0]["loss"] == loss
    assert curve.main([str(tmp_path), "--out", str(tmp_path / "again")]) == 0


def test_a_picture_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    """Any error of Matplotlib costs only the picture."""

    def fails(*_):
        raise OverflowError("cannot convert float\ninfinity to integer")

    monkeypatch.setattr(files, "draw", fails)
    with caplog.at_level(logging.WARNING):
        run = finished(tmp_path / "run")
    assert {p.name for p in run.iterdir()} == {"curve.json", "curve.csv", "details.png", "heads"}
    (record,) = caplog.records
    assert "curve.png: cannot be drawn: OverflowError" in record.getMessage() and "\n" not in record.getMessage()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    run = finished(tmp_path / "run")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    assert curve.main([str(run), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and not list((tmp_path / "out").iterdir())


def test_names_that_are_not_utf8(tmp_path, capsys):
    """A folder named in Latin-1 gives backbone, text and run names that are not valid UTF-8."""
    name = os.fsdecode(b"mod\xe8le")
    c = made({8: 2.5, 64: 2.1}, backbone=name, data=name, recipe={"teacher": name})
    assert c["backbone"] == c["data"] == c["recipe"]["teacher"] == r"mod\xe8le"
    run = tmp_path / name
    curve.write([c], run)
    curve.show([c], curve.Console())
    shown = subprocess.run(
        [sys.executable, "-m", "bottleneck.curve", run, "--out", tmp_path / os.fsdecode(b"\xe9t\xe9")],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert shown.returncode == 0 and rb"\xe9t\xe9/curve.json" in shown.stdout, shown.stderr
    assert report.main([str(run), "--out", str(tmp_path / os.fsdecode(b"p\xe9.html"))]) == 0
    # JSON can hold a lone surrogate as an escape
    (run / "curve.json").write_text(json.dumps({**c, "backbone": name}))
    assert curve.read([run])[0]["backbone"] == r"mod\xe8le"


def surprise(original, head):
    """The metric of a plugin: squared log-ratio at the target."""
    at = original.targets_n[:, None]
    return (original.log_p_nV.gather(1, at) - head.log_p_nV.gather(1, at)).squeeze(1) ** 2


@pytest.fixture
def plugged():
    """A metric as a plugin declares it, removed afterwards."""
    metric = Metric("surprise", "squared log-ratio at the target", surprise, "surprise", "nats²", "lower", form=".3f")
    METRICS.names()
    yield METRICS.register(metric)
    del METRICS._items["surprise"]


def test_a_plugins_metric_is_everywhere(run, plugged, tmp_path, capsys):
    """curve.json, curve.csv, the table, pictures, the page and metrics.csv; built-in numbers keep their bits."""
    c = run("tokens=1024", "ranks=[2,8]").curve
    values = [h["surprise"] for h in c["heads"]]
    assert all(v > 0 for v in values) and c["metrics"][0]["name"] == "surprise"
    folder = tmp_path / "run"
    rows = (folder / "curve.csv").read_text().splitlines()
    assert "surprise" in rows[0].split(",") and str(values[0]) in rows[1].split(",")
    assert "surprise" in capsys.readouterr().out
    assert [(p.unit, [m.name for m in p.metrics]) for p in panels([c])][-1] == ("nats²", ["surprise"])
    assert "val/surprise" in (folder / "metrics.csv").read_text()
    page = report.page([c], [folder])
    assert '"name": "surprise"' in page and '"unit": "nats\\u00b2"' in page
    del METRICS._items["surprise"]  # where the plugin is not installed, the file itself says how to show it
    (again,) = curve.merge(curve.read([folder]))
    curve.show([again], curve.Console(width=200))
    assert f"{values[0]:.3f}" in capsys.readouterr().out
    curve.write([again], tmp_path / "merged")
    assert "surprise" in (tmp_path / "merged" / "curve.csv").read_text().splitlines()[0].split(",")
    METRICS.register(plugged)


def test_a_run_on_a_file_whose_name_is_not_utf8(run, toy_text, tmp_path):
    """Regression: the run trained to its end and then wrote no curve."""
    text, folder = (tmp_path / os.fsdecode(name) for name in (b"t\xe9xt.jsonl", b"r\xfcn"))
    shutil.copy(toy_text, text)
    c = run("tokens=512", "ranks=[2]", f"data.files='{text}'", run_dir=folder).curve
    assert c["data"].encode().endswith(b"xt.jsonl") and curve.read([folder]) == [json.loads(json.dumps(c))]
    assert (folder / "curve.csv").is_file() and (folder / "curve.png").is_file()


def test_a_run_that_lost_its_pictures_is_completed(run, tmp_path, caplog):
    """The same command again, with ckpt_path=last: no training, and the whole set."""
    folder = tmp_path / "run"
    first = run("tokens=512", "ranks=[2]").curve
    whole = {name: (folder / name).read_bytes() for name in ("curve.json", *DERIVED)}
    for name in DERIVED:
        (folder / name).unlink()
    with caplog.at_level(logging.INFO):
        again = run("tokens=512", "ranks=[2]", "ckpt_path=last")
    assert again.module is None and again.curve == json.loads(json.dumps(first))
    assert {name: (folder / name).read_bytes() for name in whole} == whole
    assert "wrote curve.csv, curve.png, details.png from" in caplog.text


def test_named_ticks_of_a_rank_axis_do_not_touch():
    """Ranks of kinds at equal parameters, such as 62, 63 and 64, were written over each other."""
    from bottleneck.results.picture import _apart

    ranks = {20, 31, 32, 52, 62, 63, 64, 99, 116, 124, 127, 128, 196, 392}
    named = sorted(_apart(ranks, 0.05))
    assert {32, 64, 128} <= set(named) and named[-1] == 392
    assert all(math.log2(b / a) >= 0.05 * math.log2(392 / 20) for a, b in zip(named, named[1:]))
    assert _apart({8}, 0.05) == {8} and _apart({2**k for k in range(3, 12)}, 0.05) == {2**k for k in range(3, 12)}

"""The Python interface: the same curve as the command, and the notebook that shows it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

import bottleneck
from bottleneck.config.literal import literal
from bottleneck.core.errors import UserError
from conftest import ROOT
from support.curves import made


def arguments(toy: list[str]) -> dict:
    """The toy overrides as arguments of `sweep`."""
    pairs = [word.split("=", 1) for word in toy]
    read = {k: v if k in ("backbone.path", "data.files", "data.cache_dir") else number(v) for k, v in pairs}
    path, files = read.pop("backbone.path"), read.pop("data.files")
    return read | {"backbone": path, "data": files, "tokens": 2048, "ranks": [2, 8]}


def number(text: str):
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text


def test_sweep_is_the_command_s_run(run, toy, tmp_path, monkeypatch):
    """Bit for bit the heads of train(); the table, the plot and the factors are those of its curve."""
    reference = run("tokens=2048", "ranks=[2,8]").curve
    out: list = []
    # outside the main thread, as in a server: no signal handlers there, and the same numbers
    thread = threading.Thread(target=lambda: out.append(bottleneck.sweep(**arguments(toy), folder=tmp_path / "api")))
    thread.start()
    thread.join()
    curve = out[0]
    assert [h["loss"] for h in curve.content["heads"]] == [h["loss"] for h in reference["heads"]]
    assert list(curve.table()["rank"]) == [2, 8] and "kl" in curve.table()
    assert list(curve.plot().get_lines()[0].get_xdata()) == [2, 8]
    A, B = curve.heads[2].factors()
    assert A.shape == (320, 2) and B.shape == (2, 32) and A.dtype == torch.float32
    assert "<table" in curve._repr_html_() and "original head" in curve._repr_html_()
    # the second call reads the finished run and does not train again
    assert bottleneck.sweep(**arguments(toy), folder=tmp_path / "api").content == curve.content
    assert bottleneck.Curve.read(tmp_path / "api").content == curve.content


def test_the_table_names_kinds_and_their_options(tmp_path):
    """Heads of several kinds at one rank could not be told apart in a notebook."""
    c = made({8: 2.5, 16: 2.4})
    assert "kind" not in bottleneck.Curve(c, tmp_path).table()
    c["heads"] += [c["heads"][0] | {"kind": "mos", "options": {"components": n}} for n in (2, 3)]
    shown = bottleneck.Curve(c, tmp_path)
    assert list(shown.table()["kind"]) == ["low_rank", "low_rank", "mos components=2", "mos components=3"]
    assert "mos components=3" in shown._repr_html_()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"ranks": [8, 300]}, "300 is above the hidden size"),
        ({"optim": {"lr": -1}}, "optim.lr=-1"),
        ({"foo": 3}, "foo: unknown key"),
        ({"optim": "foo"}, "optim=foo: no such choice"),
        ({"trainer": {"devices": 2}}, "sweep trains in this process"),
        ({"data": "no/such (é) folder"}, "no/such (é) folder"),
        ({"optim.lr_rule": "magic"}, "power, table, grid"),
    ],
)
def test_bad_input_raises_what_the_command_prints(given, words, tmp_path):
    with pytest.raises(UserError) as caught:
        bottleneck.sweep(folder=tmp_path / "run", **given)
    assert words in str(caught.value)


def test_pandas_neither_warns_of_this_package_nor_takes_it_for_the_accelerator():
    code = "import bottleneck, pandas; from pandas.core import nanops; assert not nanops._USE_BOTTLENECK, 'taken'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert int(bottleneck.__version__.split(".")[0]) < 1  # pandas' accelerator begins at 1.x


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Every code cell of docs/notebook.ipynb, in order; a cell's last expression is shown as a notebook shows it."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for cell in json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "notebook", "exec"), namespace)
        shown = eval(compile(ast.Expression(last.value), "notebook", "eval"), namespace) if last else None
        assert shown is None or (getattr(shown, "_repr_html_", None) or shown.__repr__)()
    assert set(namespace["curve"].heads) == {8, 64}


@pytest.mark.parametrize(
    "value, wanted",
    [
        (numpy.array([2, 8]), [2, 8]),
        ([numpy.int64(2)], [2]),
        (torch.tensor(0.5), 0.5),
        ({"rows": numpy.int32(4)}, {"rows": 4}),
        ('a\\"b', 'a\\"b'),
        ("it's\\", "it's\\"),
        ("é=(1)", "é=(1)"),
    ],
)
def test_python_values_arrive_as_they_are(value, wanted):
    assert OverridesParser.create().parse_override(f"key={literal(value)}").value() == wanted

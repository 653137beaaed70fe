"""Ctrl-C in the commands that read curves: one line, whenever it comes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bottleneck.results import files
from conftest import ROOT
from support.curves import commands, made, save

LINE = "interrupted; run the same command again\n"


@pytest.mark.parametrize("name", ["curve", "race", "report"])
def test_an_interrupt_while_files_are_read_is_one_line(tmp_path, monkeypatch, capsys, name):
    def stop(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "parse", stop)
    run, other = (save(tmp_path / name, made({8: 2.5})) for name in ("run", "other"))
    assert commands(run, other, tmp_path / "out")[name]() == 130
    assert capsys.readouterr().err == LINE and not (tmp_path / "out").exists()


def test_an_interrupt_while_modules_are_imported_is_one_line(tmp_path):
    """Regression: Ctrl-C during the imports, which take seconds, printed up to 176 lines."""
    program = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def guard(name, *a, **k):\n"
        "    if name.startswith(('scipy', 'torch')):\n"
        "        raise KeyboardInterrupt\n"
        "    return real(name, *a, **k)\n"
        "builtins.__import__ = guard\n"
        "import bottleneck.curve, bottleneck.race, bottleneck.report, bottleneck.export, bottleneck.evaluate\n"
        "b = bottleneck\n"
        "given = {b.export: ['RUN', '--rank', '8', '--to', 'DIR'], b.evaluate: ['RUN', '--tasks', 'a']}\n"
        "def code(c):\n"
        "    sys.argv[1:] = given.get(c, [])\n"
        "    return c.main()\n"
        "sys.exit(sum(map(code, (b.curve, b.race, b.report, b.export, b.evaluate))) - 520)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and done.stdout == "" and done.stderr == 5 * LINE

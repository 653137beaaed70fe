"""The installed package: a wheel, in an empty environment, in another folder; and Hydra's next version."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bottleneck.__main__ import COMMANDS, main
from conftest import ROOT

SMALL = [
    "ranks=[8,64]",
    "tokens=16384",
    "trainer.progress=false",
    "head.calibration_tokens=4096",
    "data.validation_tokens=2000",
]


def test_the_command_lists_its_commands_and_refuses_others(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"  {name} " in page for name in COMMANDS)
    assert main(["trian"]) == 2 and "trian: no such command; there are train, study" in capsys.readouterr().err


def test_every_command_has_its_function():
    """Read from the source: importing them all would take seconds."""
    for module, function, _ in COMMANDS.values():
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert function in names, (module, function)


@pytest.mark.parametrize(
    "called, shown",
    [("bottleneck prepare", "bottleneck prepare"), ("x/prepare.py", "python -m bottleneck.data.prepare")],
)
def test_help_names_the_command_as_it_was_called(called, shown, capsys, monkeypatch):
    from bottleneck.data.prepare import main as prepare

    monkeypatch.setattr(sys, "argv", [called, "--help"])
    with pytest.raises(SystemExit):
        prepare()
    assert f"usage: {shown} [-h]" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [called, "--wrong"])
    assert prepare() == 2 and f"({shown} --help)" in capsys.readouterr().err


def work(words: list, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the wheel. A .pth file shares our dependencies, since installing torch takes minutes."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "tests", "docs", "outputs", "multirun", "build", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    work(build, folder, PATH="/usr/bin:/bin")
    work([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    wheel = next(folder.glob("bottleneck-*.whl"))
    work([sys.executable, "-m", "pip", "--python", folder / "venv", "install", "-q", "--no-deps", wheel], folder)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "venv"


@pytest.mark.slow
def test_the_wheel_trains_studies_and_exports_in_another_folder(installed, tmp_path):
    """The demo on 16k tokens, a study of closed forms, an export; nothing is written beside the package, and the
    top-level
    names `data` and `train` are not claimed."""
    env = {"PATH": f"{installed}/bin:/usr/bin:/bin", "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    (site,) = (installed / "lib").glob("python*/site-packages")
    names = {p.name for p in site.iterdir()}
    assert "bottleneck" in names and not names & {"data", "train.py", "conf"}
    before = {p for p in (site / "bottleneck").rglob("*") if "__pycache__" not in p.parts}
    where = work([installed / "bin" / "python", "-c", "import bottleneck; print(bottleneck.__file__)"], tmp_path, **env)
    assert str(site) in where.stdout
    command = installed / "bin" / "bottleneck"
    work([command, "train", *SMALL, "hydra.run.dir=run"], tmp_path, **env)
    assert {h["rank"] for h in json.loads((tmp_path / "run" / "curve.json").read_text())["heads"]} == {8, 64}
    study = ["study=estimate", "study.ranks=[8]", "tokens=2048", "study.calibration_tokens=2048"]
    work([command, "study", *study, "study.inits=[fisher]", "hydra.run.dir=study"], tmp_path, **env)
    assert (tmp_path / "study" / "estimate.json").is_file()
    work([command, "export", "run", "--rank", "8", "--to", "model"], tmp_path, **env)
    assert (tmp_path / "model" / "config.json").is_file()
    assert before == {p for p in (site / "bottleneck").rglob("*") if "__pycache__" not in p.parts}


@pytest.mark.slow
def test_the_demo_runs_under_hydra_1_4(tmp_path):
    """Hydra 1.4 is a release candidate as of this test. Where the registry has none, only our own floor is asserted."""
    assert '"hydra-core>=1.3.8,<2"' in (ROOT / "pyproject.toml").read_text()
    folder = tmp_path / "hydra"
    wanted = ["--target", folder, "hydra-core>=1.4.0rc1"]  # with the OmegaConf that it needs
    install = [sys.executable, "-m", "pip", "install", "-q", "--pre", *wanted]
    done = subprocess.run(list(map(str, install)), capture_output=True, text=True)
    if done.returncode:
        assert "No matching distribution" in done.stderr, done.stderr
        return
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    version = work([sys.executable, "-c", "import hydra; print(hydra.__version__)"], tmp_path, **env)
    assert version.stdout.startswith("1.4")
    words = [sys.executable, ROOT / "train.py", *SMALL, f"hydra.run.dir={tmp_path / 'run'}"]
    work(words, tmp_path, **env)
    assert (tmp_path / "run" / "curve.json").is_file()

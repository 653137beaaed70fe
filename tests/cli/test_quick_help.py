"""Commands answer --help and wrong options before they load libraries that take seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bottleneck.backbone import load
from bottleneck.core.paths import ROOT
from bottleneck.serve import arguments

COMMANDS = ("study", "curve", "report", "race", "export", "rank", "evaluate")


def loaded_by(*words: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """What a command did and which modules it loaded."""
    line = [sys.executable, "-X", "importtime", "-m", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    return done, {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_torch(command):
    """Loading torch takes seconds, and a minute from a slow network disk."""
    done, loaded = loaded_by(f"bottleneck.{command}", "--help")
    assert done.returncode == 0 and done.stdout and "argparse" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "scipy.stats"}


@pytest.mark.parametrize("command", ["export", "rank", "evaluate"])
def test_wrong_options_load_no_torch(command):
    done, loaded = loaded_by(f"bottleneck.{command}", "RUN", "--no-such")
    assert done.returncode == 2 and "torch" not in loaded
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_dtypes_of_the_export_are_those_of_the_backbone():
    assert set(arguments.DTYPES) == set(load.DTYPES)

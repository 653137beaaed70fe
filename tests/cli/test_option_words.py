"""The command line's words: overrides may stand on both sides of Hydra's options."""

from __future__ import annotations

import pytest

from bottleneck.cli.one_line_errors import overrides_first
from conftest import shell


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("ranks=8 -m tokens=1,2", "ranks=8 tokens=1,2 -m"),
        ("-m ranks=2,4 tokens=5", "ranks=2,4 tokens=5 -m"),
        ("ranks=8 --cfg job tokens=5", "ranks=8 tokens=5 --cfg job"),
        ("ranks=8 --cfg=job tokens=5", "ranks=8 tokens=5 --cfg=job"),
        ("-c job --package trainer ranks=8", "ranks=8 -c job --package trainer"),
        ("--info tokens=5", "tokens=5 --info"),
        ("--info config tokens=5", "tokens=5 --info config"),
        ("", ""),
    ],
)
def test_overrides_come_first(given, wanted):
    assert overrides_first(given.split()) == wanted.split()


def test_overrides_on_both_sides_of_an_option():
    """Regression: argparse refused them with eight lines of usage."""
    done = shell("ranks=[8]", "--cfg", "job", "tokens=16384")
    assert done.returncode == 0 and "tokens: 16384" in done.stdout and "usage:" not in done.stderr

"""Paths of the configs, the embedded text and the embedded backbone: top level of a checkout, or inside the package."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# `bottleneck/conf` and `bottleneck/data` are links in a checkout; a wheel holds the folders themselves
CONF = (PACKAGE / "conf").resolve()
ROOT = CONF.parent  # what ${repo:…} in the configs is relative to: it holds conf/ and data/
CHECKOUT = ROOT != PACKAGE


def in_repository(path: str) -> Path:
    """A path that a config gives relative to this repository.

    Nothing is written into an installed package: it uses the user's cache folder instead of the checkout's .cache.
    """
    if CHECKOUT or not path.startswith(".cache/"):
        return ROOT / path
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME and no entry in the password file
        base = Path(".cache").absolute()
    return base / "bottleneck" / path.removeprefix(".cache/")

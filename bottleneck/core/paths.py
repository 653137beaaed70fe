"""Where configs, embedded text and backbone are: in a checkout at the top level, in a wheel inside the package."""

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

    An installed package is not written to: what would be in the checkout's .cache is in the user's cache folder.
    """
    if CHECKOUT or not path.startswith(".cache/"):
        return ROOT / path
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME and no entry in the password file
        base = Path(".cache").absolute()
    return base / "bottleneck" / path.removeprefix(".cache/")

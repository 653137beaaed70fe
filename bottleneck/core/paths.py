"""Where the configs and the embedded text and backbone lie: in a checkout at the top level, in a wheel inside the package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# `bottleneck/conf` and `bottleneck/data` are links in a checkout; a wheel holds the folders themselves
CONF = (PACKAGE / "conf").resolve()
ROOT = CONF.parent  # what ${repo:…} in the configs is relative to: it holds conf/ and data/

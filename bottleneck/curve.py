"""`python -m bottleneck.curve`: merge runs into one curve. See `bottleneck.results.curve`."""

from __future__ import annotations

import sys

from bottleneck.cli.imports import run


def main() -> int:
    """Returns the exit code."""
    return run("bottleneck.results.curve")


if __name__ == "__main__":
    sys.exit(main())

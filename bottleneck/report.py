"""`python -m bottleneck.report`: one HTML page of curves. See `bottleneck.results.page`."""

from __future__ import annotations

import sys

from bottleneck.cli.imports import run


def main() -> int:
    """Returns the exit code."""
    return run("bottleneck.results.page")


if __name__ == "__main__":
    sys.exit(main())

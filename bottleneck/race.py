"""`python -m bottleneck.race`: tokens to equal loss. See `bottleneck.results.tokens_to_equal_loss`."""

from __future__ import annotations

import sys

from bottleneck.cli.imports import run


def main() -> int:
    """Returns the exit code."""
    return run("bottleneck.results.tokens_to_equal_loss")


if __name__ == "__main__":
    sys.exit(main())

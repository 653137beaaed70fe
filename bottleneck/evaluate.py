"""`python -m bottleneck.evaluate`: heads on tasks of lm-evaluation-harness. See `bottleneck.downstream.lm_eval`."""

from __future__ import annotations

import sys

from bottleneck.cli.imports import run
from bottleneck.downstream.arguments import parser


def main() -> int:
    """Returns the exit code."""
    return run("bottleneck.downstream.lm_eval", parser)


if __name__ == "__main__":
    sys.exit(main())

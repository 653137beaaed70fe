"""`python -m bottleneck.export`: a trained head for use elsewhere. See `bottleneck.serve.export`."""

from __future__ import annotations

import sys

from bottleneck.cli.imports import run
from bottleneck.serve.arguments import parser


def main() -> int:
    """Returns the exit code."""
    return run("bottleneck.serve.export", parser)


if __name__ == "__main__":
    sys.exit(main())

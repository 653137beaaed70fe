"""`python -m bottleneck.rank`: which rank to ship as a draft. See `bottleneck.drafts.rank`."""

from __future__ import annotations

import sys

from bottleneck.cli.imports import run
from bottleneck.drafts.arguments import parser


def main() -> int:
    """Returns the exit code."""
    return run("bottleneck.drafts.rank", parser)


if __name__ == "__main__":
    sys.exit(main())

"""Import a command under a guard: Ctrl-C during its imports, which take seconds, prints one line and no traceback."""

from __future__ import annotations

import importlib
import sys


def run(module: str) -> int:
    """Import a command's module and call its `main`. Returns the exit code."""
    try:
        code: int = importlib.import_module(module).main()
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130
    return code

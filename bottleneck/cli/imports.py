"""Import a command under a guard: Ctrl-C during its imports, which take seconds, prints one line and no traceback."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Optional

from bottleneck.core.errors import Parser, UserError


def run(module: str, parser: Optional[Callable[[], Parser]] = None) -> int:
    """Import a command's module and call its `main`. Returns the exit code.

    Args: parser: of the command, from a module that imports quickly: --help and wrong options do not wait for imports.
    """
    try:
        if parser is not None:
            parser().parse_args()
        code: int = importlib.import_module(module).main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130
    return code

"""The command `bottleneck NAME …`, also `python -m bottleneck NAME …`: one entry to every command of the package."""

from __future__ import annotations

import importlib
import sys
from typing import Optional

from bottleneck.core.startup import prepare_process

COMMANDS = {
    "train": ("bottleneck.train", "command", "train heads: the curve of perplexity against rank"),
    "study": ("bottleneck.study", "command", "the other figures of the paper, for your backbone"),
    "curve": ("bottleneck.curve", "main", "merge runs into one curve"),
    "report": ("bottleneck.report", "main", "one HTML page of curves"),
    "export": ("bottleneck.export", "main", "a trained head as a model for Transformers or vLLM"),
    "evaluate": ("bottleneck.evaluate", "main", "score heads on tasks of lm-evaluation-harness"),
    "rank": ("bottleneck.rank", "main", "which rank to ship as a draft for a target model"),
    "race": ("bottleneck.race", "main", "tokens until a run is as good as another one"),
    "prepare": ("bottleneck.data.prepare", "main", "prepare the tokens of a run, without weights or training"),
    "benchmark": ("bottleneck.benchmark.__main__", "main", "speed beside other implementations"),
}


def usage() -> str:
    """The page of `bottleneck --help`."""
    lines = [f"  {name:<10} {summary}" for name, (_, _, summary) in COMMANDS.items()]
    return "\n".join(["usage: bottleneck NAME …; bottleneck NAME --help explains one", "", *lines])


def main(argv: Optional[list[str]] = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"error: {words[0]}: no such command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    prepare_process()
    module, function, _ = COMMANDS[words[0]]
    sys.argv = [f"bottleneck {words[0]}", *words[1:]]
    return int(getattr(importlib.import_module(module), function)() or 0)


if __name__ == "__main__":
    sys.exit(main())

"""Options of the command that scores heads on tasks; imports in milliseconds, see `cli.imports.run`."""

from __future__ import annotations

from pathlib import Path

from bottleneck.core.errors import Parser


def parser() -> Parser:
    """The options of `python -m bottleneck.evaluate`."""
    p = Parser(prog="python -m bottleneck.evaluate", description="Score the heads of a run with lm-evaluation-harness.")
    p.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    p.add_argument(
        "--tasks",
        required=True,
        help="names of lm-eval's tasks, YAML files, folders of YAML files; separated by commas",
    )
    p.add_argument(
        "--ranks", help="ranks to score, separated by commas (default: all); the original head is always scored"
    )
    p.add_argument("--limit", type=int, help="only so many questions of each task, for a first look")
    p.add_argument("--batch-size", default="8", help="sequences in one forward pass, or auto (default: 8)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    p.add_argument("--backbone", metavar="PATH", help="where the backbone is now, if it has moved: folder or Hub name")
    return p

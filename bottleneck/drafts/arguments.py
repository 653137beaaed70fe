"""Options of the command that compares ranks as drafts; imports in milliseconds, see `cli.imports.run`."""

from __future__ import annotations

from pathlib import Path

from bottleneck.core.errors import Parser


def parser() -> Parser:
    """The options of `python -m bottleneck.rank`."""
    p = Parser(prog="python -m bottleneck.rank", description="Which rank to ship as a draft for a target model.")
    p.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    p.add_argument("--target", required=True, metavar="MODEL", help="Hub name, folder or .gguf file of the target")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of rank.json, .csv, .png (default: RUN_DIR/rank)")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="sequences of a step (default: 1 32)")
    p.add_argument("--context", type=int, default=64, help="cached tokens of each sequence (default: 64)")
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    p.add_argument("--backbone", metavar="PATH", help="where the backbone is now, if it has moved")
    return p

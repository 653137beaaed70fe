"""Options of the export command; imports in milliseconds, see `cli.imports.run`."""

from __future__ import annotations

from pathlib import Path

from bottleneck.core.errors import Parser

FORMS = ("dense", "serve", "factored", "modelling")
DTYPES = ("float32", "bfloat16", "float16")  # of `backbone.load`, which imports torch


def parser() -> Parser:
    """The options of `python -m bottleneck.export`."""
    p = Parser(
        prog="python -m bottleneck.export",
        description="Write a trained head as a Transformers model, as a model for vLLM, or as its two matrices.",
    )
    p.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--rank", type=int, help="rank of the head; the best of this rank, of any kind")
    which.add_argument("--head", metavar="NAME", help="name of the head, as in RUN_DIR/heads")
    p.add_argument("--to", type=Path, required=True, metavar="DIR", help="new or empty folder")
    p.add_argument(
        "--form",
        choices=FORMS,
        default="dense",
        help="whole model, model with the head as two matrices, these alone, or model with any kind (default: dense)",
    )
    p.add_argument("--lr", type=float, help="the head of this rate (default: the best of the rank)")
    p.add_argument("--seed", type=int, help="the head of this seed (default: the best of the rank)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights written (default: float32)")
    p.add_argument("--backbone", metavar="PATH", help="where the backbone is now, if it has moved: folder or Hub name")
    p.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code from the backbone's repository, which some families need; only if you trust it",
    )
    return p

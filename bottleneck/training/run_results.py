"""Results of a run: the Python object, the files in its folder, and the number that a sweeper optimizes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl
from rich.console import Console

from bottleneck.config.schema import TrainConfig
from bottleneck.core.environment import environment
from bottleneck.core.errors import check
from bottleneck.core.held_log import write_held_logs
from bottleneck.core.run_file import write_run_file
from bottleneck.results import files, table
from bottleneck.training.cluster import global_rank
from bottleneck.training.curve_of_run import build_curve
from bottleneck.training.head_files import save_heads
from bottleneck.training.inputs import Inputs
from bottleneck.training.module import HeadSweep
from bottleneck.training.resume import set_damaged_aside

log = logging.getLogger("bottleneck")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run built, for tests and for use from Python.

    Attributes:
        curve: content of curve.json.
        module, trainer: None if the run was already finished.
    """

    curve: dict[str, Any]
    module: Optional[HeadSweep]
    trainer: Optional[pl.Trainer]
    run_dir: Path


def begin(run_dir: Path, c: TrainConfig, *, trainer: pl.Trainer, resume: Optional[Path]) -> None:
    """The run is accepted, since its heads have started: from here on it writes into its folder. Process 0 does.

    Writes run.json, which holds the run's config, and the log; renames a damaged last.ckpt that is not resumed from.
    """
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        set_damaged_aside(run_dir, resume)
        write_run_file(run_dir, dataclasses.asdict(c), environment(trainer.strategy.root_device))
        write_held_logs()


def write_results(c: TrainConfig, inputs: Inputs, *, module: HeadSweep, run_dir: Path) -> Result:
    """Write heads/, curve.json, curve.csv and the pictures, and show the table. Only process 0 writes."""
    curve = build_curve(c, module, inputs.corpus)
    if module.trainer.is_global_zero:
        about = {"init": c.head.init, "backbone": module.backbone.name, "backbone_hash": module.backbone.hash}
        save_heads(module.bank, run_dir / "heads", about)
        files.write([curve], run_dir)
        table.show([curve], Console())
        log.info("wrote curve.json, curve.csv, curve.png, details.png and heads/ in %s", run_dir)
    return Result(curve, module, trainer=module.trainer, run_dir=run_dir)


def already_finished(curve: dict[str, Any], run_dir: Path) -> Result:
    """The result of a run that was already finished. Process 0 writes missing result files."""
    if global_rank() == 0:
        files.write_missing(curve, run_dir)
    log.info("%s is finished: nothing to do", run_dir)
    return Result(curve, None, trainer=None, run_dir=run_dir)


def optimized_value(run_dir: Path, metric: str) -> float:
    """The number that `optimized_metric` names, of the head with the lowest validation loss.

    Args: metric: a number of a head in curve.json, such as loss; loss@64 is that of the best head of rank 64.
    Returns: the number, infinity if every such head diverged. Raises UserError if there is no such number or rank.
    """
    name, _, rank = metric.partition("@")
    heads = json.loads((run_dir / "curve.json").read_text(encoding="utf-8"))["heads"]
    ranks = sorted({h["rank"] for h in heads})
    chosen = [h for h in heads if not rank or h["rank"] == int(rank)]
    check(bool(chosen), f"optimized_metric={metric}: there is no head of that rank; ranks are {ranks}")
    numbers = sorted(k for k, v in heads[0].items() if isinstance(v, (int, float)) and not isinstance(v, bool))
    check(name in heads[0], f"optimized_metric={metric}: not in curve.json, whose numbers are {', '.join(numbers)}")
    fine = [h for h in chosen if h["status"] == "ok" and h["loss"] is not None]
    best = min(fine, key=lambda h: h["loss"]) if fine else None
    return math.inf if best is None or best[name] is None else float(best[name])

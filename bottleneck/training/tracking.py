"""Where metrics go while heads train: metrics.csv in the run's folder, Weights & Biases, or nowhere."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Optional

from pytorch_lightning.loggers.logger import Logger

from bottleneck.config.schema import LoggerConfig
from bottleneck.training.metrics_csv import MetricsCSV
from bottleneck.training.wandb_heads import WandbHeads
from bottleneck.training.wandb_runs import wandb_settings

log = logging.getLogger(__name__)


def build_loggers(
    c: LoggerConfig, run_dir: Path, group: str, heads: dict[str, dict[str, Any]], resume_step: Optional[int]
) -> list[Logger]:
    """The loggers of a run. Raises UserError if W&B is wanted and refuses the run.

    Args:
        group: W&B group of the run's heads, unless the config or the environment sets one.
        heads: facts of each head by its name, see `recipe.head_facts`.
        resume_step: step that the run resumes from.
    """
    if c.kind == "csv":
        return [MetricsCSV(run_dir / "metrics.csv", resume_step)]
    if c.kind != "wandb":
        return []
    settings = wandb_settings(c)
    if settings.mode == "disabled":
        log.info("logger=wandb: disabled, no metrics are kept")
        return []
    return [WandbHeads(settings, run_dir, group, heads, resume_step)]


def close(loggers: list[Any], curve: Optional[dict[str, Any]], in_sweep: bool) -> None:
    """End the W&B runs.

    Args: curve: the result, or None where there is none; in_sweep: the run is a job of a multirun.
    """
    for logger in loggers:
        if isinstance(logger, WandbHeads):
            logger.finish(curve, not in_sweep)

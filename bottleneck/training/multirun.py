"""After the last job of a multirun: the curves of its jobs as one, in the sweep's folder `curve`, and in W&B where that is used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from bottleneck.config.schema import LoggerConfig
from bottleneck.core.errors import UserError
from bottleneck.results import curve
from bottleneck.training import tracking

log = logging.getLogger(__name__)


class MergeCurves(Callback):
    """A Hydra callback (conf/train.yaml). What it does can be done again: python -m bottleneck.curve SWEEP --out DIR."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep = Path(config.hydra.sweep.dir)
        merged = sweep / curve.MERGED
        jobs = sorted(p.parent for p in sweep.glob("*/curve.json") if p.parent != merged)
        if len(jobs) < 2:
            return
        try:
            curves = curve.merge(curve.read(jobs, merged))
        except UserError as error:  # jobs that train the same head twice, say on other numbers of processes
            log.warning("the jobs' curves are not merged: %s", error)
            return
        curve.write(curves, merged)
        curve.show(curves, Console())
        log.info("wrote curve.json, curve.csv and curve.png of %d jobs in %s", len(jobs), merged)
        logger = LoggerConfig(**OmegaConf.to_container(config.logger, resolve=True))
        if logger.kind == "wandb":
            tracking.log_curves(logger, merged, logger.group or sweep.name, curves)

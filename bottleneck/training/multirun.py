"""After the last job of a multirun, merge the jobs' curves into the sweep's folder `curve`, and into W&B if it is used.

The sweep's folder may hold jobs of an earlier multirun, if `-m` is repeated with fewer jobs or a job fails this time.
Only jobs of this multirun that succeeded are merged. Each of them leaves a file with the multirun's token, which jobs
receive as an environment variable, both in this process and on a cluster.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any, Optional

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from bottleneck.cli import one_line_errors as cli
from bottleneck.config.schema import LoggerConfig
from bottleneck.core.errors import UserError
from bottleneck.core.files import write_atomic
from bottleneck.results import curve
from bottleneck.training import wandb_heads

log = logging.getLogger(__name__)
TOKEN = "BOTTLENECK_MULTIRUN"
MARK = ".multirun"  # in a job's folder: the token of the last multirun in which the job succeeded


class MergeCurves(Callback):
    """A Hydra callback, set in conf/train.yaml. By hand: `python -m bottleneck.curve SWEEP --out DIR`."""

    def __init__(self) -> None:
        self.token, self.began, self.failures = "", 0.0, 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.token, self.began = secrets.token_hex(8), time.time()
        os.environ[TOKEN] = self.token

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.failures = len(cli.failures)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        folder = Path(config.hydra.runtime.output_dir)
        succeeded = job_return.status == JobStatus.COMPLETED and len(cli.failures) == self.failures
        if "MULTIRUN" in str(config.hydra.mode) and succeeded and (folder / "curve.json").is_file():
            token = os.environ.get(TOKEN, "")
            write_atomic(folder / MARK, lambda part: part.write_text(token))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep = Path(config.hydra.sweep.dir)
        merged = sweep / curve.MERGED
        every = sorted(p.parent for p in sweep.rglob("curve.json") if p.parent != merged)
        jobs = [job for job in every if self._is_ours(job)]
        if len(jobs) < len(every):
            others = ", ".join(str(job.relative_to(sweep)) for job in every if job not in jobs)
            log.warning("%s: not merged, from an earlier multirun or a job that failed this time: %s", sweep, others)
        if len(jobs) < 2:
            _warn_of_old(merged)
            return
        try:
            curves = curve.merge(curve.read([job / "curve.json" for job in jobs]))
        except UserError as error:  # jobs may train the same head twice, for example with different process counts
            log.warning("the jobs' curves are not merged: %s", error)
            _warn_of_old(merged)
            return
        curve.write(curves, merged)
        curve.show(curves, Console())
        log.info("wrote curve.json, curve.csv and curve.png of %d jobs in %s", len(jobs), merged)
        settings = OmegaConf.to_container(config.logger, resolve=True)
        assert isinstance(settings, dict)
        logger = LoggerConfig(**{str(k): v for k, v in settings.items()})
        if logger.kind == "wandb":
            wandb_heads.log_curves(logger, merged, logger.group or sweep.name, curves)

    def _is_ours(self, job: Path) -> bool:
        """Whether this multirun ran a job in a folder and the job succeeded."""
        try:
            token, written = (job / MARK).read_text(), (job / MARK).stat().st_mtime
        except (OSError, ValueError):
            return False
        # the token is empty on a cluster that does not pass the environment on to its jobs
        return token == self.token or (token == "" and written >= self.began - 1)


def _warn_of_old(merged: Path) -> None:
    if merged.exists():
        log.warning("%s holds the curve of an earlier multirun", merged)


def sweep_of(run_dir: Path) -> Optional[Path]:
    """The folder of the multirun that a run is a job of, at any depth (hydra.sweep.subdir); None for a single run."""
    return next((folder for folder in run_dir.parents if (folder / "multirun.yaml").exists()), None)

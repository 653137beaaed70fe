"""Where metrics go while heads train: a CSV file of the run, or Weights & Biases."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Optional

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from bottleneck.checkpoint import write_atomic
from bottleneck.config import LoggerConfig
from bottleneck.errors import UserError

COLUMNS = ("step", "tokens", "metric", "head", "value")


class MetricsCSV(Logger):
    """One row a number: step, tokens, metric, head, value. Rows are appended and flushed, so a kill loses nothing; a
    resumed run drops the rows after its checkpoint and repeats none. (Lightning's CSVLogger deletes the file instead.)"""

    def __init__(self, path: Path, resume_step: Optional[int] = None):
        super().__init__()
        self.path, self.resume_step = path, resume_step
        self._kept: Optional[set[tuple[str, ...]]] = None  # rows of the run before it was resumed; None: file not open yet

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's config is stored by Hydra in .hydra/config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: Optional[int] = None) -> None:
        if self._kept is None:
            self._kept = self._open()
        tokens = metrics.get("tokens", "")
        with open(self.path, "a", newline="") as f:
            writer = csv.writer(f)
            for name, value in metrics.items():
                metric, _, head = name.rpartition("/")
                if metric and (str(step), metric, head) not in self._kept:
                    writer.writerow((step, tokens, metric, head, repr(float(value))))

    def _open(self) -> set[tuple[str, ...]]:
        rows: list[list[str]] = []
        if self.resume_step is not None and self.path.exists():
            with open(self.path, newline="") as f:
                whole = [r for r in csv.reader(f) if len(r) == len(COLUMNS) and r[0].isdigit()]
            rows = [r for r in whole if int(r[0]) <= self.resume_step]

        def write(part: Path) -> None:
            with open(part, "w", newline="") as f:
                csv.writer(f).writerows([COLUMNS, *rows])

        write_atomic(self.path, write)
        return {(r[0], r[2], r[3]) for r in rows}


@rank_zero_only
def close_loggers(c: LoggerConfig) -> None:
    """End the W&B run of this job, so that the next job of a multirun has one of its own."""
    if c.kind == "wandb":
        import wandb

        wandb.finish()


def build_loggers(c: LoggerConfig, run_dir: Path, config: dict[str, Any], resume_step: Optional[int]) -> list[Logger]:
    """The loggers of a run. `config` is its resolved configuration, `resume_step` the step it goes on from."""
    if c.kind == "csv":
        return [MetricsCSV(run_dir / "metrics.csv", resume_step)]
    if c.kind == "wandb":
        logger = WandbLogger(
            project=c.project, entity=c.entity, group=c.group, name=c.name or run_dir.name, tags=list(c.tags),
            offline=c.mode == "offline", save_dir=str(run_dir), config=config,
        )  # fmt: skip
        try:
            _ = logger.experiment  # begins the run now: an account that is missing shows before weights load
        except Exception as error:  # wandb's own kinds, and the network's
            raise UserError(f"logger=wandb: {error}; logger.mode=offline needs no account") from error
        return [logger]
    return []

"""Where metrics go while heads train: a CSV file of the run, or Weights & Biases, with a run for each head."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from bottleneck.config.schema import LoggerConfig, TrainConfig
from bottleneck.core.environment import commit
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import metrics
from bottleneck.core.files import write_atomic
from bottleneck.heads.bank import HeadKey
from bottleneck.results.curve import band_losses

log = logging.getLogger(__name__)
IDS = "wandb.json"  # ids of the W&B runs, by head; and the lowest validation loss of each so far
BEST = "best"
AGENT = "WANDB_SWEEP_ID"  # set where W&B's agent runs the job
FINAL = ("loss", "perplexity", "bits_per_byte", "initial_loss")  # and the metrics
COLUMNS = ("step", "tokens", "metric", "head", "value")


class MetricsCSV(Logger):
    """One row a number: step, tokens, metric, head, value. Rows are appended and flushed, so a kill loses nothing; a
    resumed run drops the rows after its checkpoint and repeats none. (Lightning's CSVLogger deletes the file instead.)"""

    def __init__(self, path: Path, resume_step: Optional[int] = None):
        super().__init__()
        self.path, self.resume_step = path, resume_step
        self._kept: Optional[set[tuple[str, ...]]] = (
            None  # rows of the run before it was resumed; None: file not open yet
        )

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
        try:
            with open(self.path, "a", newline="") as f:
                writer = csv.writer(f)
                for name, value in metrics.items():
                    metric, _, head = name.rpartition("/")
                    if metric and (str(step), metric, head) not in self._kept:
                        writer.writerow((step, tokens, metric, head, repr(float(value))))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error}") from error

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


class WandbHeads(Logger):
    """Weights & Biases as its users expect it: a run for each head, of one group, whether heads train together or apart.

    Every run has its head's facts as `config`, `tokens` as its x axis, and the last, final and best values as `summary`. A
    resumed run has the ids of the first try, so it goes on in the same W&B runs (offline: more files of the same runs).
    """

    TIMEOUT = 30  # seconds that a server is waited for

    def __init__(
        self, c: LoggerConfig, run_dir: Path, group: str, heads: dict[str, dict[str, Any]], resume_step: Optional[int]
    ):
        super().__init__()
        self.c, self.run_dir, self.group, self.heads = c, run_dir, c.group or group, heads
        self.runs: dict[str, Any] = {}
        self.ids: dict[str, Any] = {BEST: {}}
        if rank_zero_only.rank == 0:
            self.ids = ids = {BEST: {}} | _ids(run_dir, resume_step)
            if AGENT in os.environ and len(heads) == 1:  # a W&B sweep: its agent has made the run
                ids |= dict.fromkeys(heads, os.environ["WANDB_RUN_ID"])
            for name, facts in heads.items():
                run = begin(
                    c,
                    run_dir,
                    self.group,
                    f"{c.name}-{name}" if c.name else name,
                    "head",
                    facts,
                    ids.get(name) or _new_id(),
                )
                if run.settings.mode == "offline":  # the server was waited for once
                    c = self.c = replace(c, mode="offline")
                self.runs[name], ids[name] = run, run.id
                self.runs[name].define_metric("tokens")
                self.runs[name].define_metric("*", step_metric="tokens")
            self._keep()

    def _keep(self) -> None:
        write_atomic(self.run_dir / IDS, lambda part: part.write_text(json.dumps(self.ids)))

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Each run has its config from the start; Lightning's would overwrite it."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: Optional[int] = None) -> None:
        rows: dict[str, dict[str, float]] = {name: {"tokens": metrics.get("tokens", 0)} for name in self.runs}
        for name, value in metrics.items():
            metric, _, head = name.rpartition("/")
            if head in rows:
                rows[head][metric] = value
            elif metric:  # of the run (all) or of the backbone's own head (full)
                for row in rows.values():
                    row[
                        metric
                        if head == "all"
                        else f"{metric}/{head}"
                        if metric == "train/seconds"
                        else f"{metric}_{head}"
                    ] = value
        for name, row in rows.items():
            if len(row) > 1:
                self.runs[name].log(row, step=step)
        best = self.ids[BEST]
        validated = {
            name: row["val/loss"] for name, row in rows.items() if math.isfinite(row.get("val/loss", math.nan))
        }
        for name, loss in validated.items():
            best[name] = min(best.get(name, loss), loss)
        if validated:  # a resumed run has seen what came before
            self._keep()

    @rank_zero_only
    def finish(self, curve: Optional[dict[str, Any]], alone: bool) -> None:
        """End the runs; with their results, where there is a curve, and that as a run of its own unless this is one job of several."""
        results = {} if curve is None else {HeadKey.of(h).name: h for h in curve["heads"]}
        wanted = {*FINAL, *(m.name for m in metrics())}
        for name, run in self.runs.items():
            if name in results:
                final = {f"final/{k}": v for k, v in results[name].items() if k in wanted and v is not None}
                final |= {f"final/{k}": v for k, v in band_losses(results[name]).items() if v is not None}
                run.summary.update(final | {"best/loss": self.ids[BEST].get(name), "status": results[name]["status"]})
            run.finish(exit_code=0 if curve is not None else 1)
        self.runs = {}
        if curve is not None and alone and AGENT not in os.environ:
            log_curves(self.c, self.run_dir, self.group, [curve])


def close(loggers: list[Any], curve: Optional[dict[str, Any]], in_sweep: bool) -> None:
    """End what loggers began. `curve`: the result, or None where there is none; `in_sweep`: the run is a job of a multirun."""
    for logger in loggers:
        if isinstance(logger, WandbHeads):
            logger.finish(curve, not in_sweep)


def begin(c: LoggerConfig, folder: Path, group: str, name: str, job: str, facts: dict[str, Any], run_id: str) -> Any:
    """One W&B run beside others in this process. A server that does not answer in time is done without: the run is offline then.

    Raises: UserError where there is no account to log in with.
    """
    import wandb

    def start(mode: str, run_id: str) -> Any:
        # system metrics and the terminal's output are the machine's, not a head's
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            init_timeout=WandbHeads.TIMEOUT,
            finish_timeout=2 * WandbHeads.TIMEOUT,
        )
        return wandb.init(
            project=c.project,
            entity=c.entity,
            group=group,
            job_type=job,
            name=name,
            tags=list(c.tags),
            config=facts,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=str(folder),
            mode=mode,
            reinit="create_new",
            settings=settings,
        )

    try:
        return start(c.mode, run_id)
    except wandb.errors.UsageError as error:
        raise UserError(f"logger=wandb: {error}; logger.mode=offline needs no account") from error
    except wandb.errors.Error as error:
        log.warning(
            "logger=wandb: the server cannot be reached (%s): %s stays offline, in %s; wandb sync uploads it",
            " ".join(str(error).split())[:200],
            name,
            folder / "wandb",
        )
        return start("offline", _new_id())  # the first try holds the id


def log_curves(c: LoggerConfig, folder: Path, group: str, curves: list[dict[str, Any]]) -> None:
    """A run of job type curve: table, native line chart with the own head's line, picture, and the files in `folder` as an artifact."""
    import wandb

    ids = _ids(folder, 0)
    run_id = ids.setdefault("curve", _new_id())
    write_atomic(folder / IDS, lambda part: part.write_text(json.dumps(ids)))
    first = curves[0]
    facts = {k: first[k] for k in ("backbone", "hidden_size", "vocab_size", "data", "tokens")} | {
        "git_commit": commit()
    }
    run = begin(c, folder, group, c.name or group, "curve", facts, run_id)
    rows = [
        h | band_losses(h) | {"backbone": curve["backbone"], "data": curve["data"]}
        for curve in curves
        for h in curve["heads"]
    ]
    columns = list(dict.fromkeys(k for row in rows for k in row if not isinstance(row[k], (dict, list))))
    run.log({"heads": wandb.Table(columns=columns, data=[[row.get(k) for k in columns] for row in rows])})
    xs, ys, keys = [], [], []
    for curve in curves:
        best = sorted((h for h in curve["heads"] if h["best"] and h["perplexity"]), key=lambda h: h["rank"])
        ranks = [h["rank"] for h in best]
        for key, values in (
            ("trained", [h["perplexity"] for h in best]),
            ("full head", [curve["reference"]["perplexity"]] * len(best)),
        ):
            xs.append(ranks)
            ys.append(values)
            keys.append(f"{curve['backbone']}, {key}" if len(curves) > 1 else key)
    run.log(
        {
            "perplexity_against_rank": wandb.plot.line_series(
                xs=xs, ys=ys, keys=keys, title="Perplexity against rank", xname="rank"
            )
        }
    )
    artifact = wandb.Artifact(f"curve-{run_id}", type="curve")
    for name in ("curve.json", "curve.csv", "curve.png", "details.png"):
        if (folder / name).is_file():
            artifact.add_file(str(folder / name))
    run.log({p.stem: wandb.Image(str(p)) for p in (folder / "curve.png", folder / "details.png") if p.is_file()})
    run.log_artifact(artifact)
    run.summary.update(
        {
            "heads": len(rows),
            "full/loss": first["reference"]["loss"],
            "full/perplexity": first["reference"]["perplexity"],
        }
    )
    run.finish()


def _new_id() -> str:
    return secrets.token_hex(6)


def _ids(folder: Path, resume_step: Optional[int]) -> dict[str, str]:
    """Ids of the runs of an earlier try in this folder, where this one goes on from it."""
    try:
        return json.loads((folder / IDS).read_text()) if resume_step is not None else {}
    except (OSError, ValueError):
        return {}


def build_loggers(
    c: LoggerConfig, run_dir: Path, group: str, heads: dict[str, dict[str, Any]], resume_step: Optional[int]
) -> list[Logger]:
    """The loggers of a run. Raises UserError where W&B is asked for and there is no account.

    Args:
        group: what the runs of heads that belong together are shown under, unless the config says.
        heads: facts of each head by its name, see `facts`.
        resume_step: the step that the run goes on from.
    """
    if c.kind == "csv":
        return [MetricsCSV(run_dir / "metrics.csv", resume_step)]
    return [WandbHeads(c, run_dir, group, heads, resume_step)] if c.kind == "wandb" else []


def facts(c: TrainConfig, key: HeadKey, hidden_size: int, vocab_size: int, data: str, backbone: str) -> dict[str, Any]:
    """What a head is, for comparison with others: alike whether it trains alone or in company."""
    o = c.optim
    return {
        "rank": key.rank,
        "parameters": key.rank * (vocab_size + hidden_size),
        "lr": key.lr,
        "lr_ratio": o.lr_ratio,
        "seed": key.seed,
        "init": c.head.init,
        "passes": c.head.passes if c.head.init == "refined" else None,
        "objective": c.head.objective,
        "temperature": c.head.temperature if c.head.objective != "ce" else None,
        "mix": c.head.mix if c.head.objective == "mixed" else None,
        "teacher": c.head.teacher if c.head.objective != "ce" else None,
        "whiten": c.head.whiten,
        "backbone": backbone,
        "revision": c.backbone.revision,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "data": data,
        "tokens": c.tokens // (c.batch_size * c.data.block_size) * c.batch_size * c.data.block_size,
        "batch_size": c.batch_size,
        "block_size": c.data.block_size,
        "data_seed": c.data.seed,
        "epochs": c.data.epochs,
        "weight_decay": o.weight_decay,
        "betas": list(o.betas),
        "eps": o.eps,
        "warmup": o.warmup,
        "lr_final": o.lr_final,
        "clip": o.clip,
        "calibration_tokens": c.head.calibration_tokens,
        "dtype": c.backbone.dtype,
        "git_commit": commit(),
    }

"""Weights & Biases: one run per head, and one run for the curve."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, Optional

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from bottleneck.config.schema import LoggerConfig
from bottleneck.core.environment import commit
from bottleneck.core.extensions import metrics as declared_metrics
from bottleneck.core.files import write_atomic
from bottleneck.heads.key import HeadKey
from bottleneck.results.curve import band_losses
from bottleneck.results.labels import labels, line_names
from bottleneck.results.schema import FINITE, series
from bottleneck.training.wandb_runs import (
    AGENT,
    WandbSettings,
    begin,
    new_id,
    offline,
    outside_the_sweep,
    wandb_settings,
)

log = logging.getLogger(__name__)
IDS = "wandb.json"  # ids of the W&B runs, by head; and the lowest validation loss of each so far
BEST = "best"
CURVE = "curve"  # job type and key in wandb.json of the run that shows the curve
FINAL = ("loss", "perplexity", "bits_per_byte", "initial_loss")  # and the metrics


class WandbHeads(Logger):
    """One W&B run per head, all in one group, whether heads train together or in separate jobs.

    Every W&B run has its head's facts as `config`, `tokens` as its x axis, and the last, final and best values as
    `summary`. A resumed run continues the same W&B runs (offline: it adds files to them). Under a W&B agent, a trial of
    one head logs to the agent's run. If a trial has several heads, the agent's run shows their curve and the lowest
    validation loss.
    """

    def __init__(
        self, s: WandbSettings, run_dir: Path, group: str, heads: dict[str, dict[str, Any]], resume_step: Optional[int]
    ):
        super().__init__()
        self.s, self.run_dir, self.group = s, run_dir, s.group or group
        self.runs: dict[str, Any] = {}
        self.trial: Any = None  # the W&B agent's run, if the trial has several heads
        self.ids: dict[str, Any] = {BEST: {}}
        if getattr(rank_zero_only, "rank", 0) == 0:  # set by Lightning, not in its types
            self._begin(heads, resume_step)

    def _begin(self, heads: dict[str, dict[str, Any]], resume_step: Optional[int]) -> None:
        self.ids = ids = {BEST: {}} | (_ids(self.run_dir) if resume_step is not None else {})
        agents = _agents_run()
        own = agents and len(heads) == 1  # the only head's run is the agent's
        if own:
            ids |= dict.fromkeys(heads, agents)
        for name, facts in heads.items():
            shown = f"{self.s.name}-{name}" if self.s.name else name
            with contextlib.nullcontext() if AGENT not in os.environ or own else outside_the_sweep():
                self.runs[name] = run = self._start(shown, "head", facts, ids.get(name) or new_id())
            ids[name] = run.id
        if agents and len(heads) > 1:
            self.trial = self._start(self.group, CURVE, {"heads": list(heads)}, agents)
        self._keep()

    def _start(self, name: str, job: str, facts: dict[str, Any], run_id: str) -> Any:
        run = begin(self.s, self.run_dir, group=self.group, name=name, job=job, facts=facts, run_id=run_id)
        if run.settings.mode == "offline":
            self.s = offline(self.s)
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
        return run

    def _keep(self) -> None:
        write_atomic(self.run_dir / IDS, lambda part: part.write_text(json.dumps(self.ids)))

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: each run has its config from the start, and Lightning's would overwrite it."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: Optional[int] = None) -> None:
        """Log numbers named METRIC/HEAD in the head's run, and those of the whole run in every one."""
        tokens = metrics.get("tokens", 0)
        rows: dict[str, dict[str, float]] = {name: {"tokens": tokens} for name in self.runs}
        for name, value in metrics.items():
            metric, _, head = name.rpartition("/")
            if head in rows:
                rows[head][metric] = value
            elif metric:  # of the whole run (all), or of the original head (full)
                shared = f"{metric}/{head}" if metric == "train/seconds" else f"{metric}_{head}"
                for row in rows.values():
                    row[metric if head == "all" else shared] = value
        for name, row in rows.items():
            if len(row) > 1:
                self.runs[name].log(row, step=step)
        losses = {n: row["val/loss"] for n, row in rows.items() if math.isfinite(row.get("val/loss", math.nan))}
        best = self.ids[BEST]
        for name, loss in losses.items():
            best[name] = min(best.get(name, loss), loss)
        if losses and self.trial is not None:
            lowest = min(losses.values())
            perplexity = math.exp(lowest) if lowest < 700 else math.inf
            self.trial.log({"tokens": tokens, "val/loss": lowest, "val/perplexity": perplexity}, step=step)
        if losses:  # a resumed run reads the best losses of earlier tries
            self._keep()

    @rank_zero_only
    def finish(self, curve: Optional[dict[str, Any]], alone: bool) -> None:
        """End the runs, with their results where there is a curve.

        Args: alone: not a job of a multirun, so the curve gets its own W&B run.
        """
        results = {} if curve is None else {HeadKey.of(h).name: h for h in curve["heads"]}
        code = 0 if curve is not None else 1
        wanted = {*FINAL, *(m.name for m in declared_metrics())}
        for name, run in self.runs.items():
            if name in results:
                final = {f"final/{k}": v for k, v in results[name].items() if k in wanted and v is not None}
                final |= {f"final/{k}": v for k, v in band_losses(results[name]).items() if v is not None}
                run.summary.update(final | {"best/loss": self.ids[BEST].get(name), "status": results[name]["status"]})
            run.finish(exit_code=code)
        self.runs = {}
        if self.trial is not None:
            if curve is not None:
                _show(self.trial, self.run_dir, [curve])
            self.trial.finish(exit_code=code)
            self.trial = None
        elif curve is not None and alone and not _agents_run():
            _log_curves(self.s, self.run_dir, self.group, [curve])


def _agents_run() -> str:
    """Id of the run that W&B's agent made for this process. Empty without an agent: a shell may still have its
    WANDB_SWEEP_ID.
    """
    return os.environ.get("WANDB_RUN_ID", "") if AGENT in os.environ else ""


def log_curves(c: LoggerConfig, folder: Path, group: str, curves: list[dict[str, Any]]) -> None:
    """Show the merged curves of a multirun as a W&B run."""
    s = wandb_settings(c)
    if s.mode != "disabled":
        _log_curves(s, folder, s.group or group, curves)


def _log_curves(s: WandbSettings, folder: Path, group: str, curves: list[dict[str, Any]]) -> None:
    ids = _ids(folder)
    run_id = ids.setdefault(CURVE, new_id())
    write_atomic(folder / IDS, lambda part: part.write_text(json.dumps(ids)))
    facts = {k: curves[0][k] for k in ("backbone", "hidden_size", "vocab_size", "data", "tokens")}
    facts |= {"git_commit": commit()}
    run = begin(s, folder, group=group, name=s.name or group, job=CURVE, facts=facts, run_id=run_id)
    _show(run, folder, curves)
    run.finish()


def _show(run: Any, folder: Path, curves: list[dict[str, Any]]) -> None:
    """Log curves: a table, a line chart with the original head's line, the pictures, and the files as an artifact."""
    import wandb

    rows = [
        h | band_losses(h) | {"backbone": curve["backbone"], "data": curve["data"]}
        for curve in curves
        for h in curve["heads"]
    ]
    columns = list(dict.fromkeys(k for row in rows for k in row if not isinstance(row[k], (dict, list))))
    run.log({"heads": wandb.Table(columns=columns, data=[[row.get(k) for k in columns] for row in rows])})
    xs, ys, keys = _lines(curves)
    title = "Perplexity against rank"
    chart = wandb.plot.line_series(xs=xs, ys=ys, keys=keys, title=title, xname="rank")
    run.log({"perplexity_against_rank": chart})
    artifact = wandb.Artifact(f"curve-{run.id}", type="curve")
    for name in ("curve.json", "curve.csv", "curve.png", "details.png"):
        if (folder / name).is_file():
            artifact.add_file(str(folder / name))
    run.log({p.stem: wandb.Image(str(p)) for p in (folder / "curve.png", folder / "details.png") if p.is_file()})
    run.log_artifact(artifact)
    reference = curves[0]["reference"]
    full = {"full/loss": reference["loss"], "full/perplexity": reference["perplexity"]}
    run.summary.update({"heads": len(rows)} | full)


def _lines(curves: list[dict[str, Any]]) -> tuple[list[list[int]], list[list[float]], list[str]]:
    """Ranks, perplexities and label of every line of the chart."""
    xs, ys, keys = [], [], []
    called = line_names(curves)
    for curve, run in zip(curves, labels(curves)):
        best = sorted((h for h in curve["heads"] if h["best"] and h["perplexity"]), key=lambda h: h["rank"])
        names = sorted({series(h) for h in best})
        lines = {
            f"trained, {called[name]}" if len(names) > 1 else "trained": [h for h in best if series(h) == name]
            for name in names
        }
        for label, heads in lines.items():
            xs.append([h["rank"] for h in heads])
            ys.append([h["perplexity"] for h in heads])
            keys.append(f"{run}, {label}" if len(curves) > 1 else label)
        ranks = list(dict.fromkeys(h["rank"] for h in best))
        xs.append(ranks)
        ys.append([curve["reference"]["perplexity"]] * len(ranks))
        keys.append(f"{run}, original head" if len(curves) > 1 else "original head")
    return xs, ys, keys


def _ids(folder: Path) -> dict[str, Any]:
    """Ids of the W&B runs of an earlier try in this folder. Damaged entries of the file are skipped."""
    path = folder / IDS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        log.warning("%s: cannot be read; the heads get new W&B runs", path)
        return {}
    ids: dict[str, Any] = {k: v for k, v in found.items() if isinstance(v, str) and v.isalnum()}
    best = found.get(BEST)
    if isinstance(best, dict):
        ids[BEST] = {k: float(v) for k, v in best.items() if isinstance(v, (int, float)) and abs(v) <= FINITE}
    return ids

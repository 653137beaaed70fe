"""Train rank-constrained LM heads on a frozen backbone: `python train.py --help`.

A run composes its config, checks it, resumes or starts, loads its inputs, builds the module, fits, and writes its
results. The parts are in bottleneck/training. Modules that import torch are imported where a run needs them, so that
--help, --cfg and refused commands do not wait for it.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bottleneck.cli import one_line_errors as cli
from bottleneck.config import checks
from bottleneck.core.errors import check
from bottleneck.core.paths import CONF
from bottleneck.core.startup import prepare_process

if TYPE_CHECKING:
    from bottleneck.training.run_results import Result
    from bottleneck.training.session import Session


def train(cfg: DictConfig, run_dir: Path) -> Result:
    """Train one run of the composed config in its folder. A finished run is left as it is.

    Raises: UserError for bad input, if possible before any weights are loaded; Stopped after a signal.
    """
    from bottleneck.training.session import open_session

    with open_session(run_dir) as session:
        return _train(cfg, run_dir, session=session)


def _train(cfg: DictConfig, run_dir: Path, *, session: Session) -> Result:
    from bottleneck.training import build, cluster, fit, inputs, multirun, resume, run_results, teacher, tracking

    # check
    c = checks.check_config(cfg)
    kind = fit.device_type(c)
    c, taught_by = teacher.resolve(c, run_dir, kind)
    cluster.check_world(c.trainer.devices, c.trainer.num_nodes)

    # resume or start
    c = resume.as_begun(c, run_dir)
    begun = resume.find(c, run_dir)
    if begun.finished is not None:
        return run_results.already_finished(begun.finished, run_dir)

    # inputs
    session.listen_to_slurm()
    fit.check_device(c)
    given = inputs.load_inputs(c, taught_by)
    c = teacher.identified(c, taught_by, kind)
    begun = resume.verify(begun, c, run_dir=run_dir, bank=build.outline(c, given))
    sweep = multirun.sweep_of(run_dir)
    group = (sweep or run_dir).name
    loggers = tracking.build_loggers(c.logger, run_dir, group=group, heads=given.facts(c), resume_step=begun.step)
    session.close_at_end(loggers, in_sweep=sweep is not None)
    trainer = fit.build_trainer(c, run_dir, flag=session.flag, loggers=loggers)
    backbone = inputs.load_backbone(c, given, trainer=trainer)

    # module, fit, results
    accepted = functools.partial(run_results.begin, run_dir, c, trainer=trainer, resume=begun.path)
    module = build.build_module(
        c, given, backbone=backbone, flag=session.flag, resume_step=begun.step, accepted=accepted
    )
    fit.fit(trainer, module, c=c, data=given.data, resume=begun.path)
    result = run_results.write_results(c, given, module=module, run_dir=run_dir)
    session.finish(result.curve)
    return result


def run_everywhere(cfg: DictConfig, run_dir: Path) -> float:
    """Run `train` in every process of the run. Returns the value of `optimized_metric`, for Hydra's sweepers."""
    c = checks.check_config(cfg)  # before other processes start, so that a bad value is reported once
    from bottleneck.training import cluster, processes, run_results

    processes.run_in_all(train, cfg, run_dir)
    return run_results.optimized_value(run_dir, c.optimized_metric) if cluster.global_rank() == 0 else 0.0


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float:
    """One Hydra job."""

    def work() -> float:
        run = HydraConfig.get()
        named = ("hydra.run.dir=", "hydra.sweep.dir=", "hydra.sweep.subdir=")
        given = any(override.startswith(named) for override in run.overrides.hydra)
        where = "resumes in hydra.run.dir, which is a new folder by default; give hydra.run.dir=FOLDER"
        check(cfg.ckpt_path != "last" or given, f"ckpt_path=last: {where}")
        cli.keep_hydra_files(cfg)
        return run_everywhere(cfg, Path(run.runtime.output_dir))

    return cli.job(work)


def command() -> int:
    """`python train.py …`; returns the exit code."""
    prepare_process()
    return cli.one_line_errors(cli.hydra_command(main))


if __name__ == "__main__":
    sys.exit(command())

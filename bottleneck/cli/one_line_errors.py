"""Bad input on the command line: one line that says what, where and what is allowed, exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Optional

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bottleneck.cli.hydra_messages import explain
from bottleneck.cli.plugin_option import load_plugins
from bottleneck.cli.refused_run import HYDRA, folder_before_job
from bottleneck.config.schema import register
from bottleneck.core.errors import Stopped, UserError, how_to_resume
from bottleneck.core.files import write_atomic
from bottleneck.core.held_log import write_held_logs
from bottleneck.core.paths import CONF

SHOW = "HYDRA_FULL_ERROR"  # Hydra's switch for full tracebacks; where the user sets it they are shown
OURS = "BOTTLENECK_ONE_LINE"
NO_SLURM = 'Could not detect "srun"'  # submitit's words

started: list[int] = []  # numbers of the jobs that this process started
folders: list[Path] = []  # folders of these jobs
sweeps: list[Path] = []  # folder of the multirun, once per job
failures: list[str] = []  # one line for each job of this process that failed


def job(work: Callable[[], Any]) -> Any:
    """Run one Hydra job. Returns the result of `work`, or NaN if the job failed; a multirun then continues.

    A UserError is printed here as one line and kept in `failures`, because Hydra would add a second line. On a cluster
    the error is raised, so that the job counts as failed there. A refused job leaves its folder as it was.
    """
    run = HydraConfig.get()
    started.append(run.job.num if run.mode == RunMode.MULTIRUN else 0)
    folder = Path(run.runtime.output_dir)
    folders.append(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    if run.mode == RunMode.MULTIRUN:
        sweeps.append(Path(run.sweep.dir))
    before = folder_before_job()
    here = "BasicLauncher" in run.launcher.get("_target_", "")
    try:
        # hydra.job.chdir=true has changed to the run's folder, but paths are relative to the folder of the command
        with contextlib.chdir(run.runtime.cwd):
            value = work()
        write_held_logs()
        return value
    except UserError as error:
        before.restore()
        if not here:
            raise
        name = f"{_job_name(run)}: " if run.mode == RunMode.MULTIRUN else ""
        failures.append(f"{name}{error}")
        print(f"error: {failures[-1]}", file=sys.stderr)
    except Exception as error:  # a defect, ours or a library's
        if run.mode != RunMode.MULTIRUN or not here:
            raise
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        failures.append(f"{_job_name(run)}: {type(error).__name__}: {first}")
    return math.nan


def _job_name(run: Any) -> str:
    """Number of a multirun's job and the overrides that are its own: those which the command line does not have."""
    own = [word for word in run.overrides.task if word not in sys.argv]
    return f"job {run.job.num} ({','.join(own) or run.job.override_dirname})"


def keep_hydra_files(cfg: DictConfig) -> None:
    """Write `.hydra/` into the job's folder, unless the folder already holds a run.

    Hydra itself would overwrite it on every command, before any check, so conf/train.yaml sets hydra.output_subdir to
    null.
    """
    run = HydraConfig.get()
    folder = Path(run.runtime.output_dir)
    if any((folder / name).exists() for name in (HYDRA, "run.json", "curve.json", "checkpoints", "heads")):
        return
    files = {"config.yaml": cfg, "hydra.yaml": OmegaConf.create({"hydra": run}), "overrides.yaml": run.overrides.task}
    for name, content in files.items():
        write_atomic(folder / HYDRA / name, functools.partial(OmegaConf.save, content))


def composed(overrides: list[str]) -> DictConfig:
    """The config that `python train.py OVERRIDES` composes, for other commands. Raises Hydra's errors."""
    register()
    words = load_plugins(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=words)


# options of Hydra whose value is the next word; that of --info may be left out
VALUED = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
VALUED |= {"--experimental-rerun", "--info", "-i"}


def overrides_first(words: list[str]) -> list[str]:
    """Overrides, then options: argparse refuses overrides on both sides of an option (ranks=8 -m tokens=1e5,1e6)."""
    overrides: list[str] = []
    options: list[str] = []
    for before, word in zip(["", *words], words):
        (options if word.startswith("-") or (before in VALUED and "=" not in word) else overrides).append(word)
    return overrides + options


def hydra_command(main: Callable[[], object]) -> Callable[[], object]:
    """A Hydra main function that loads the plugins named on the command line before it composes."""

    def command() -> None:
        register()
        sys.argv[1:] = overrides_first(load_plugins(sys.argv[1:]))
        main()

    return command


def one_line_errors(main: Callable[[], object], after_interrupt: Optional[str] = None) -> int:
    """Run a command's main function; returns the exit code.

    Args: after_interrupt: what the user can do after Ctrl-C. Default: how to resume a run.
    """
    wanted_by_user = os.environ.get(SHOW) == "1" and OURS not in os.environ
    os.environ[SHOW] = os.environ[OURS] = "1"  # otherwise Hydra prints several lines of its own and exits with 1
    try:
        main()
        sys.stdout.flush()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if wanted_by_user:
            raise
        print(f"error: {error if isinstance(error, UserError) else explain(error)}", file=sys.stderr)
        return 2
    except ValueError as error:  # Hydra raises it for some overrides of groups, such as backbone=null
        if wanted_by_user or started:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if wanted_by_user or NO_SLURM not in str(error):
            raise
        print("error: hydra/launcher=slurm: there is no Slurm here (no srun command)", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
        return 0
    except OSError as error:  # a folder that cannot be written, a full disk
        if wanted_by_user or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except Stopped as stop:
        with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
            print(f"{stop}; {after_interrupt or _how_to_resume()}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print(f"interrupted; {after_interrupt or _how_to_resume()}", file=sys.stderr)
        return 130
    return _summary()


def _how_to_resume() -> str:
    return how_to_resume(*folders[-1:], **({"sweep": sweeps[-1]} if sweeps else {}))


def _summary() -> int:
    """Repeat the failures of a multirun's jobs at its end, and return the exit code."""
    if failures and len(started) > 1:
        print("\n".join([f"{len(failures)} of {len(started)} jobs failed:", *failures]), file=sys.stderr)
    return 2 if failures else 0

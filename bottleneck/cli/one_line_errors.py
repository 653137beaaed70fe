"""Bad input on the command line: one line that says what, where and what is allowed, exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Callable, Optional

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bottleneck.config.schema import register, unknown_key
from bottleneck.core.errors import Stopped, UserError, go_on
from bottleneck.core.paths import CONF

SHOW = "HYDRA_FULL_ERROR"  # Hydra's switch for full tracebacks; set by the user it still shows them
OURS = "BOTTLENECK_ONE_LINE"

started: list[int] = []  # jobs of this process that were composed and begun
folders: list[Path] = []  # of these jobs
failures: list[str] = []  # one line for each job of this process that ended with a UserError


def job(work: Callable[[], object]) -> None:
    """Run one Hydra job. A UserError is printed as one line and remembered: the next jobs of a multirun still run.

    Raised through Hydra it would be printed with a second line; on a cluster it is raised, so that the job counts as failed.
    """
    run = HydraConfig.get()
    started.append(run.job.get("num", 0) if run.mode == RunMode.MULTIRUN else 0)
    folder = Path(run.runtime.output_dir)
    folders.append(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    try:
        work()
    except UserError as error:
        if "BasicLauncher" not in run.launcher.get("_target_", ""):
            raise
        name = f"job {run.job.num} ({run.job.override_dirname}): " if run.mode == RunMode.MULTIRUN else ""
        failures.append(f"{name}{error}")
        print(f"error: {failures[-1]}", file=sys.stderr)
        if run.mode != RunMode.MULTIRUN:
            _leave_nothing(folder)
    except (
        Exception
    ) as error:  # a defect or a library's: the next jobs run all the same, and it is told again at the end
        if run.mode != RunMode.MULTIRUN or "BasicLauncher" not in run.launcher.get("_target_", ""):
            raise
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        failures.append(f"job {run.job.num} ({run.job.override_dirname}): {type(error).__name__}: {first}")


def _leave_nothing(folder: Path) -> None:
    """Remove the folder of a run that was refused: Hydra has made it, with the config and an empty log, and nothing else is in it."""
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if (
        names
        and names <= {".hydra", ".lock", "train.log", "study.log"}
        and not any(p.stat().st_size for p in folder.glob("*.log"))
    ):
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.parent.name == "outputs":
            with contextlib.suppress(OSError):  # the day's, where this was its first
                folder.parent.rmdir()


def composed(overrides: list[str]) -> DictConfig:
    """The config that `python train.py OVERRIDES` sees, for commands beside it. Raises Hydra's errors."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=overrides)


def one_line_errors(main: Callable[[], object], after_interrupt: Optional[str] = None) -> int:
    """Run a command's main function; returns the exit code. `after_interrupt`: what one may do then; default: `errors.go_on`."""
    wanted_by_user = os.environ.get(SHOW) == "1" and OURS not in os.environ
    os.environ[SHOW] = os.environ[OURS] = "1"  # else Hydra prints several lines of its own and exits with 1
    try:
        main()
        sys.stdout.flush()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if wanted_by_user:
            raise
        print(f"error: {error if isinstance(error, UserError) else explain(error)}", file=sys.stderr)
        return 2
    except ValueError as error:  # how Hydra reports some overrides of groups, such as backbone=null
        if wanted_by_user or started:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it ends
        return 0
    except OSError as error:  # a folder that cannot be written, a full disk
        if wanted_by_user or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"{stop}; {after_interrupt or go_on(*folders[-1:])}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print(f"interrupted; {after_interrupt or go_on(*folders[-1:])}", file=sys.stderr)
        return 130
    if failures and len(started) > 1:  # what scrolled by is said again at the end
        print("\n".join([f"{len(failures)} of {len(started)} jobs failed:", *failures]), file=sys.stderr)
    return 2 if failures else 0


def explain(error: BaseException) -> str:
    """One line from the errors of Hydra and OmegaConf."""
    return " ".join(_explain(error).split())


def _explain(error: BaseException) -> str:
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as KEY=VALUE: {str(error).split('See https')[0].strip()}"
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(chain)
    if "Could not override 'study'" in text:
        return "study: is for python -m bottleneck.study, which computes the paper's other figures"
    if "hydra/launcher/submitit" in text:
        return "hydra/launcher: Slurm's launcher is not installed; pip install -e '.[slurm]' (hydra-submitit-launcher)"
    unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in '\w+')[\s\S]*?full_key: (\S+)", text)
    unknown = unknown or re.search(r"Could not override '(([^']+))'[\s\S]*append to your config", text)
    if unknown:
        return unknown_key(unknown.group(2).lstrip("+~"))
    pattern = r"(Value '[^\n]+|Cannot convert [^\n]+|[^\n]*could not be converted[^\n]*)\n[\s\S]*?full_key: (\S+)"
    value = re.search(pattern, text)
    if value:
        return f"{value.group(2)}: {value.group(1).strip()}"
    inner = re.search(r"UserError raised while resolving interpolation: ([^\n]+)", text)
    if inner:
        return inner.group(1)
    pattern = r"Could not find '([^']+)'\s*(?:Available options in '[^']+':\s*([\s\S]*?))?(?:\n\n|Config search path|$)"
    missing = re.search(pattern, text)
    if missing:
        group, _, name = missing.group(1).rpartition("/")
        options = " ".join((missing.group(2) or "").split())
        return f"{group}={name}: no such choice; allowed are {options or 'the files in conf/' + group}"
    if not isinstance(error, HydraException):
        return chain[-1]
    return (
        chain[0]
        if len(chain) == 1 or "merging override" not in chain[0]
        else f"{chain[0]}: {chain[-1].splitlines()[0]}"
    )

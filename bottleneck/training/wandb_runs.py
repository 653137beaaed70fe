"""Start W&B runs: choose their settings, and translate W&B's errors.

Settings follow W&B's convention: a key of `logger` on the command line, else W&B's environment variable, else W&B's
settings files, else the default.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from bottleneck.config.schema import LoggerConfig
from bottleneck.core.errors import UserError, check

log = logging.getLogger(__name__)
AGENT = "WANDB_SWEEP_ID"  # set where W&B's agent runs the job
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
SECONDS = 30  # to wait for a server
TAG_LETTERS = 64
SWEEP_SETTINGS = ("sweep_id", "sweep_param_path", "run_id")


@dataclass(frozen=True)
class WandbSettings:
    """Settings of W&B runs.

    Attributes:
        mode: online, offline or disabled.
        folder: where W&B keeps its files; None: in the run's folder.
    """

    project: str
    entity: Optional[str]
    group: Optional[str]
    name: Optional[str]
    mode: str
    tags: tuple[str, ...]
    folder: Optional[Path]


def wandb_settings(c: LoggerConfig, variables: Mapping[str, str] = os.environ) -> WandbSettings:
    """The settings from config and environment. Raises UserError if a value is not allowed."""
    given = variables.get("WANDB_MODE", "").strip().lower()
    check(not given or given in MODES, f"WANDB_MODE={given}: must be one of {', '.join(MODES)}")
    if variables.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes"):
        given = "disabled"
    stored = _settings_files(variables)
    source = f"WANDB_MODE={given}" if given else f"mode = {stored.get('mode')} in W&B's settings file"
    given = given or stored.get("mode", "")
    mode = c.mode or MODES.get(given, "online")
    if c.mode == "online" and MODES.get(given, "online") != "online":
        log.warning("logger.mode=online: overrides %s, the run is uploaded", source)
    tags = tuple(c.tags) or tuple(t.strip() for t in variables.get("WANDB_TAGS", "").split(",") if t.strip())
    for tag in tags:
        check(
            0 < len(tag) <= TAG_LETTERS,
            f"logger.tags: {tag[:20]!r} has {len(tag)} letters; a tag has 1 to {TAG_LETTERS}",
        )
    folder = variables.get("WANDB_DIR")
    return WandbSettings(
        project=c.project or variables.get("WANDB_PROJECT") or stored.get("project") or "bottleneck",
        entity=c.entity or variables.get("WANDB_ENTITY") or stored.get("entity") or None,
        group=c.group or variables.get("WANDB_RUN_GROUP") or None,
        name=c.name or variables.get("WANDB_NAME") or None,
        mode=mode,
        tags=tags,
        folder=Path(folder).expanduser() if folder else None,
    )


def _settings_files(variables: Mapping[str, str]) -> dict[str, str]:
    """Mode, project and entity in W&B's settings files: the user's, and the one in the current folder.

    `wandb offline` and `wandb init` write them. `wandb.init` reads them too, but what it is passed overrides them.
    """
    try:
        import wandb

        found = wandb.Settings()
        folder = Path(variables.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
        found.settings_system = str(folder / "settings")
        found.update_from_system_settings()
    except Exception:  # no wandb, no home folder: `begin` reports them
        return {}
    values = {name: getattr(found, name) for name in ("mode", "project", "entity")}
    return {name: str(value) for name, value in values.items() if value}


def new_id() -> str:
    """A new W&B run id."""
    return secrets.token_hex(6)


@contextlib.contextmanager
def outside_the_sweep() -> Iterator[None]:
    """Start runs that are not the run of W&B's agent: `wandb.init` would give each of them the agent's id."""
    import wandb

    settings = wandb.setup().settings
    kept = {name: getattr(settings, name) for name in SWEEP_SETTINGS}
    try:
        for name in SWEEP_SETTINGS:
            setattr(settings, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(settings, name, value)


def begin(
    s: WandbSettings, folder: Path, *, group: str, name: str, job: str, facts: dict[str, Any], run_id: str
) -> Any:
    """Start one of several W&B runs in this process. The run is offline if the server does not answer.

    Raises: UserError if the server refuses the account, or W&B refuses a setting.
    """
    import wandb

    folder = s.folder or folder

    def start(mode: str, run_id: str) -> Any:
        # no system metrics and no terminal output: they belong to the machine, not to a head
        settings = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, init_timeout=SECONDS, finish_timeout=2 * SECONDS
        )
        return wandb.init(
            project=s.project,
            entity=s.entity,
            group=group,
            job_type=job,
            name=name,
            tags=list(s.tags),
            config=facts,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]  # one of MODES
            reinit="create_new",
            settings=settings,
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
        return start(s.mode, run_id)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise UserError(f"logger=wandb: {error}; logger.mode=offline needs no account") from error
    except wandb.errors.Error as error:
        words = " ".join(str(error).split())[:200]
        if _server_answers() and "timed out" not in words:
            raise UserError(f"logger=wandb: the server refused the run: {words}; is the API key valid?") from error
        log.warning(
            "logger=wandb: the server cannot be reached (%s): %s stays offline, in %s; wandb sync uploads it",
            words,
            name,
            folder / "wandb",
        )
        return start("offline", new_id())  # the failed attempt still holds the first id
    except Exception as error:  # no home folder, a bad WANDB_BASE_URL: W&B raises many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and "errors.pydantic.dev" not in line]
        raise UserError(f"logger=wandb: {': '.join(lines[:3]) or type(error).__name__}") from error


def _server_answers() -> bool:
    """Whether W&B's server answers, with anything but a server error (HTTP 5xx). No data is sent."""
    import wandb

    try:
        with urllib.request.urlopen(str(wandb.setup().settings.base_url), timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def offline(s: WandbSettings) -> WandbSettings:
    """The same settings in offline mode, so that the server is waited for only once."""
    return replace(s, mode="offline")

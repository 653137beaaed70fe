"""run.json: the config of the run in a folder. The run writes it once its config has been accepted; commands read it.

Hydra's `.hydra/config.yaml` may describe a later command in the same folder, even a refused one. Folders written by
earlier versions have only that file, so it is read if there is no run.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

from omegaconf import OmegaConf

from bottleneck.core.errors import UserError, check
from bottleneck.core.files import write_atomic

RUN_FILE = "run.json"
HYDRA_CONFIG = Path(".hydra") / "config.yaml"
SCHEMA = 1


def write_run_file(folder: Path, config: dict[str, Any], about: dict[str, Any]) -> None:
    """Write run.json.

    Args:
        config: the checked config, as it is stored in checkpoints.
        about: versions and commit of the code.
    """
    content = {"schema": SCHEMA, "config": config, "versions": about}
    raw = (json.dumps(content, indent=1, default=str) + "\n").encode()
    path = folder / RUN_FILE
    if not path.is_file() or path.read_bytes() != raw:
        write_atomic(path, lambda part: part.write_bytes(raw))


def read_run_file(folder: Path) -> Optional[dict[str, Any]]:
    """The config in run.json, or None where the folder has no such file. Raises UserError where it is damaged."""
    path = folder / RUN_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    config = content.get("config") if isinstance(content, dict) else None
    check(isinstance(config, dict), f"{path}: damaged: no config in it")
    check(content.get("schema") == SCHEMA, f"{path}: schema {content.get('schema')}; this version reads {SCHEMA}")
    return config


def read_run_config(folder: Path) -> Optional[dict[str, Any]]:
    """The config of a run's folder: from run.json, else from Hydra's file; None where there is neither.

    Raises: UserError if the file is damaged.
    """
    config = read_run_file(folder)
    path = folder / HYDRA_CONFIG
    if config is not None or not path.is_file():
        return config
    try:
        node = OmegaConf.load(path)
        found = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_dict(node) else None
    except Exception as error:  # yaml and OmegaConf raise many kinds
        raise UserError(f"{path}: cannot be read as a config: {error}") from error
    check(isinstance(found, dict), f"{path}: not a config")
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else None

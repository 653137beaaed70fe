"""Run one study: `python -m bottleneck.study study=NAME`; `python -m bottleneck.study --help` lists them.

`python -m bottleneck.study experiment=paper` alone lists the commands for every figure.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does

import logging
import sys
from pathlib import Path
from typing import Any, Iterable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bottleneck.cli import one_line_errors as cli
from bottleneck.cli.hydra_messages import explain
from bottleneck.cli.plugin_option import load_plugins
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import STUDIES
from bottleneck.core.paths import CONF
from bottleneck.studies.shared.config import check_study, register, unknown_key
from bottleneck.studies.shared.figures import listing

log = logging.getLogger("bottleneck")
RESUME = "to resume, repeat the command with the same hydra.run.dir"


def study(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run one study into `folder`. Returns: the content of its NAME.json. Raises: UserError for bad input."""
    for name in ("pytorch_lightning", "httpx", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False
    c = check_study(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    result = STUDIES[c.study.name].run(c, folder)
    log.info("wrote %s.json, .csv, .png in %s", c.study.name, folder)
    return result


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="study")
def main(cfg: DictConfig) -> None:
    def work() -> None:
        cli.keep_hydra_files(cfg)
        study(cfg, Path(HydraConfig.get().runtime.output_dir))

    cli.job(work)


def own_words(words: Iterable[str]) -> list[str]:
    """The words for Hydra: experiment=NAME chooses from conf/study_experiment; conf/experiment is for training."""
    return [f"study_{word}" if word.startswith("experiment=") else word for word in words]


def _run() -> None:
    """Hydra's main, with unknown keys reported in this command's terms."""
    if sys.argv[1:] == ["experiment=paper"]:
        print(listing(figure for s in STUDIES for figure in s.commands))
        return
    sys.argv[1:] = cli.overrides_first(load_plugins(own_words(sys.argv[1:])))
    register()  # after the plugins, which declare studies too
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        line = explain(error)
        if ": unknown key" in line:
            chosen = [word.removeprefix("study=") for word in sys.argv if word.startswith("study=")]
            raise UserError(unknown_key(line.split(":")[0], chosen[0] if chosen else None)) from error
        raise


def command() -> int:
    """`python -m bottleneck.study …`; returns the exit code."""
    return cli.one_line_errors(_run, after_interrupt=RESUME)


if __name__ == "__main__":
    sys.exit(command())

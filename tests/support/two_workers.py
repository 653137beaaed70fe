"""python tests/support/two_workers.py FOLDER: two workers that wait, started as train.py starts its own."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def wait(cfg: Any, folder: Path) -> None:
    """Print that this worker has started, then wait for a signal."""
    (folder / f"at-{os.environ['RANK']}").touch()
    time.sleep(600)


if __name__ == "__main__":
    from omegaconf import OmegaConf

    from bottleneck.core.errors import Stopped
    from bottleneck.training.elastic import start_workers

    cfg = OmegaConf.create({"trainer": {"timeout_minutes": 1}})
    (Path(sys.argv[1]) / "starting").touch()
    try:
        start_workers(wait, cfg, Path(sys.argv[1]), {"version": 1}, 2)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal)

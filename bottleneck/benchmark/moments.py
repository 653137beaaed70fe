"""Run train.py in this process up to its first step: python -m bottleneck.benchmark.moments FILE OVERRIDES…

It runs in a process of its own, started by `benchmark.startup`, and writes when each part of the start was done. The
functions of train.py's story are wrapped from outside, so that the code which is measured holds no clocks.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable

from bottleneck.core.paths import ROOT
from bottleneck.core.startup import prepare_process

STORY = (  # module, function, the part of the start that ends when it returns for the first time
    ("checks", "check_config", "config"),
    ("inputs", "load_inputs", "tokenizer, text, outline"),
    ("inputs", "load_backbone", "backbone on its device"),
    ("build", "build_module", "module"),
    ("module.HeadSweep", "on_fit_start", "trainer"),
    ("build", "_start_heads", "calibration, starts"),
    ("module.HeadSweep", "on_train_start", "first validation"),
    ("module.HeadSweep", "training_step", "first step"),
)
LAST = STORY[-1][-1]


class _FirstStepDone(BaseException):
    """Ends the run: its later phases are not measured."""


def trace(file: Path, arguments: list[str]) -> int:
    """Run `train.py` with these arguments until its first optimizer step is done. Returns the exit code.

    `file` gets {part: [time.time(), CPU seconds of this process] at its end}, in order, as JSON. Importing comes first
    here, and takes the same time as where `train.py` imports.
    """
    moments = {"interpreter": _now()}
    prepare_process()
    import train
    from bottleneck.config import checks
    from bottleneck.training import (  # noqa: F401
        build,
        cluster,
        fit,
        inputs,
        module,
        multirun,
        resume,
        run_results,
        session,
        teacher,
        tracking,
    )

    moments["imports"] = _now()
    places: dict[str, Any] = {
        "checks": checks,
        "inputs": inputs,
        "build": build,
        "module.HeadSweep": module.HeadSweep,
    }

    def mark(function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if part not in moments:
                moments[part] = _now()
                file.write_text(json.dumps(moments))
            if part == LAST:
                raise _FirstStepDone
            return result

        return marked

    for where, name, part in STORY:
        setattr(places[where], name, mark(getattr(places[where], name), part))
    sys.argv = [str(ROOT / "train.py"), *arguments]
    try:
        return train.command()
    except _FirstStepDone:  # the run has closed its files and processes on the way here
        return 0


def _now() -> tuple[float, float]:
    return time.time(), time.process_time()


if __name__ == "__main__":
    sys.exit(trace(Path(sys.argv[1]), sys.argv[2:]))

"""Run train.py in this process and write when each part of its start was done: python -m bottleneck.benchmark.moments.

It runs in a process of its own, started by `benchmark.startup`. The functions of train.py's story are wrapped from
outside, so that the code which is measured holds no clocks.
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

STORY = (  # module, function, the part of the start that ends when it returns
    ("inputs", "load_inputs", "tokenizer, text, outline"),
    ("inputs", "load_backbone", "backbone on its device"),
    ("build", "build_module", "module"),
)


def trace(file: Path, arguments: list[str]) -> None:
    """Run `train.py` with these arguments. `file` gets {part: time.time() at its end}, in order, as JSON.

    Importing comes first here, and takes the same time as where `train.py` imports.
    """
    moments = {"interpreter": time.time()}
    prepare_process()
    import train
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

    moments["imports"] = time.time()
    modules: dict[str, Any] = {"inputs": inputs, "build": build}

    def mark(function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if part not in moments:
                moments[part] = time.time()
                file.write_text(json.dumps(moments))
            return result

        return marked

    for where, name, part in STORY:
        setattr(modules[where], name, mark(getattr(modules[where], name), part))
    for name, part in (("on_train_start", "calibration, starts, first validation"), ("training_step", "first step")):
        setattr(module.HeadSweep, name, mark(getattr(module.HeadSweep, name), part))
    sys.argv = [str(ROOT / "train.py"), *arguments]
    sys.exit(train.command())


if __name__ == "__main__":
    trace(Path(sys.argv[1]), sys.argv[2:])

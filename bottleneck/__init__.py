"""Rank-constrained LM heads `W = AB` on frozen backbones, trained side by side on one forward pass.

`bottleneck.sweep` trains heads from Python and returns their `bottleneck.Curve`.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bottleneck.api import Curve, sweep

__all__ = ["Curve", "__version__", "sweep"]
# pandas looks for a numeric accelerator that is also called bottleneck and finds this package. By the version it sees
# that it is not the accelerator, and warns; so the version stays below pandas' minimum, 1.x.
__version__ = "0.1.0"
warnings.filterwarnings("ignore", message="Pandas requires version .* of 'bottleneck'", category=UserWarning)
# Transformers imports DeepSpeed, where it is installed, to save a model; without a GPU DeepSpeed logs a warning
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def __getattr__(name: str) -> Any:
    """The Python interface, imported when it is used: commands need not wait for it."""
    if name in ("Curve", "sweep"):
        from bottleneck import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

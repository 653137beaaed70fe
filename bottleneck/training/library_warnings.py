"""Library warnings to hide: those about something done on purpose, and those about the library itself."""

from __future__ import annotations

import logging
import warnings

from pytorch_lightning.utilities import rank_zero_only

CHATTY = ("pytorch_lightning", "lightning_fabric", "lightning", "httpx", "filelock")
MESSAGES = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*'set_vital' is deprecated.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*lr_scheduler.step\\(\\).*before.*optimizer.step.*",
    ".*GPU available but not used.*",
    ".*`srun` command is available on your system but is not used.*",
)


def hide() -> None:
    """Hide these messages. Processes other than the first log warnings only."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its retries itself
    if getattr(rank_zero_only, "rank", 0):  # set by Lightning, not in its types
        logging.getLogger().setLevel(logging.WARNING)
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message)

"""The training step in the name of a checkpoint."""

from __future__ import annotations

import re
from typing import Optional

STEP = re.compile(r"(?:step|checkpoint|ckpt|iter)[-_]?(\d+)(k(?![a-z0-9]))?", re.IGNORECASE)


def step_number(name: str) -> Optional[int]:
    """The step in the name of a checkpoint's folder or file, None without one.

    Examples: step1000, step1k, checkpoint-1000, 160m_step1000, 1000.
    """
    found = STEP.search(name) or re.fullmatch(r"(\d+)()", name)
    return int(found.group(1)) * (1000 if found.group(2) else 1) if found else None

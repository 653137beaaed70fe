"""Takes Lightning's handling of signals away, which `bottleneck.training.signals` replaces.

Lightning asks all processes before every step whether one of them had a SIGTERM, and waits for the answer, which holds
up a GPU; on Slurm it saves in the middle of a step. It has no option to leave either out, so this module replaces two
private methods of a trainer. tests/training/test_private_hooks.py fails where Lightning renames them.
"""

from __future__ import annotations

import pytorch_lightning as pl


def disable(trainer: pl.Trainer) -> None:
    """Keep Lightning from installing signal handlers and from asking other processes about signals."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # the hook
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # the hook

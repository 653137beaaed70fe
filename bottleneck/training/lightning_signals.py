"""Disables Lightning's signal handling, which `bottleneck.training.signals` replaces.

Before every step Lightning asks all processes whether one received SIGTERM, and waits for the answer, which stalls a
GPU. On Slurm it saves in the middle of a step. No option turns this off, so this module replaces two private methods of
a trainer. tests/training/test_private_hooks.py fails if Lightning renames them.
"""

from __future__ import annotations

import pytorch_lightning as pl


def disable(trainer: pl.Trainer) -> None:
    """Keep Lightning from installing signal handlers and from asking other processes about signals."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # the hook
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # the hook

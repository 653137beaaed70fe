"""`head.loss_impl=chunked`, see `bottleneck.losses.chunked`."""

from __future__ import annotations

from bottleneck.core.extensions import LOSSES, Loss
from bottleneck.losses import chunked

LOSSES.register(Loss("chunked", "one chunk of logits at a time, on any device", chunked.step))

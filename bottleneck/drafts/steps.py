"""Times of the steps of speculative decoding on this machine: the draft's body, its heads, and the target's passes.

Dims: N sequences, T tokens of a pass, D hidden size, R rank, K rows of a head, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from typing import Any, Callable

import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check

REPEATS = 15


def fastest_seconds(work: Callable[[Any], object], fresh: Callable[[], Any] = lambda: None) -> float:
    """Time of `work(fresh())` without that of `fresh`: the fastest of some calls, since other work only slows one down.

    Two calls before warm up.
    """
    times = []
    for i in range(REPEATS + 2):
        given = fresh()
        _wait()
        began = time.perf_counter()
        work(given)
        _wait()
        if i > 1:
            times.append(time.perf_counter() - began)
    return min(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def body_seconds(backbone: Backbone, batch: int, tokens: int, context: int) -> float:
    """A pass of the body over `tokens` tokens of each sequence, after `context` cached ones."""
    device = backbone.lm_head.weight.device
    ids = torch.arange(batch * (context + tokens), device=device).view(batch, -1) % min(backbone.vocab_size, 1000)
    first = backbone.body(input_ids=ids[:, :context], use_cache=True)
    known = "cannot be timed: its body keeps no cache of its own"
    apart = hasattr(first, "last_hidden_state") and getattr(first, "past_key_values", None) is not None
    check(apart, f"{backbone.name}: family {backbone.family} {known}")
    return fastest_seconds(
        lambda past: backbone.body(input_ids=ids[:, context:], past_key_values=past, use_cache=True),
        lambda: copy.deepcopy(first.past_key_values),
    )


@torch.no_grad()
def head_seconds(matrices: list[Tensor], batch: int, tokens: int = 1) -> float:
    """Logits of `tokens` positions of each sequence and their arg-max.

    Args: matrices: W [K, D] alone, or A [K, R] and B [R, D]; in the dtype and on the device of use.
    """
    last = matrices[-1]
    h = torch.ones(batch * tokens, last.shape[1], dtype=last.dtype, device=last.device)

    def work(_: Any) -> Tensor:
        z = h
        for matrix in reversed(matrices):
            z = z @ matrix.T
        return z.argmax(-1)

    return fastest_seconds(work)


def target_seconds(target: Backbone, batch: int, drafted: int, context: int) -> list[float]:
    """Passes of the whole target over 1 … drafted + 1 tokens of each sequence."""
    W = [target.head.W_VD]
    return [body_seconds(target, batch, t, context) + head_seconds(W, batch, t) for t in range(1, drafted + 2)]

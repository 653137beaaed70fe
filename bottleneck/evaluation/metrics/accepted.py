"""Expected number of accepted tokens in a round of speculative decoding with k drafted tokens.

With acceptances α_1, α_2, … of consecutive drafted tokens, the first i are all accepted with probability α_1 ⋯ α_i, so
the expected number of accepted tokens of k is (Leviathan et al. 2023, Sec. 3.1, without the token that the target adds)

    E_k = Σ_{i=1…k} Π_{j≤i} α_j      = α (1 − α^k) / (1 − α) if all α_j are α

Here α_j are those of k consecutive tokens of a validation block, and the mean is over all such windows. Nothing is
assumed about how α varies from context to context. Assumed is that drafting meets contexts like those of the validation
text (it meets tokens that draft and target agree on), and that a token's acceptance depends on its context alone.

Dims: N blocks, T tokens of a block, k drafted tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bottleneck.core.extensions import METRICS, Metric
from bottleneck.evaluation.metrics.agreement import acceptance

LENGTHS = range(1, 9)


def accepted_of(values_NT: Tensor, keep_NT: Tensor, drafted: int) -> tuple[Tensor, Tensor]:
    """Sum of Σ_i Π_{j≤i} α_j over all windows of `drafted` validation tokens, and their number; float64."""
    if values_NT.shape[1] < drafted:
        return (torch.zeros((), dtype=torch.float64, device=values_NT.device),) * 2
    windows = values_NT.double().unfold(1, drafted, 1)
    whole = keep_NT.unfold(1, drafted, 1).all(-1)
    expected = torch.where(whole, windows.cumprod(-1).sum(-1), 0.0)
    return expected.sum(), whole.sum().double()


def _along(drafted: int) -> Metric:
    return Metric(
        name=f"accepted_{drafted}",
        summary=f"expected number of accepted tokens of {drafted} drafted, along the validation text",
        measure=acceptance,
        title=f"of {drafted}",
        unit="accepted tokens",
        better="higher",
        form=".3f",
        table=False,
        picture=False,
        order=10 + drafted,
        along=lambda values, keep: accepted_of(values, keep, drafted),
    )


for _drafted in LENGTHS:
    METRICS.register(_along(_drafted))

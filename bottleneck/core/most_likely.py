"""The largest entries of long rows, in one pass.

Dims: n rows, V entries of a row, k largest ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64  # entries whose maximum is taken first


def most_likely(values_nV: Tensor, k: int) -> Tensor:
    """Places [n, k] of the k largest entries of each row, the largest first; of equal entries, any.

    They lie in the k groups with the largest maxima, so one pass over the row finds them; `topk` takes several.
    """
    groups = values_nV.shape[1] // GROUP
    if groups <= 4 * k:
        return values_nV.topk(k).indices
    whole, rest = values_nV.split([groups * GROUP, values_nV.shape[1] - groups * GROUP], 1)
    first = whole.unflatten(1, (groups, GROUP)).amax(-1).topk(k).indices[..., None] * GROUP
    near = (first + torch.arange(GROUP, device=first.device)).flatten(1)
    best = torch.cat([whole.gather(1, near), rest], 1).topk(k).indices
    # a place among the entries gathered is one of `near`; a later one lies in the rest of the row
    gathered = near.gather(1, best.clamp(max=near.shape[1] - 1))
    return torch.where(best < near.shape[1], gathered, best - near.shape[1] + groups * GROUP)

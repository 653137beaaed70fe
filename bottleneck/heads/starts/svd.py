"""`svd`: the truncated singular value decomposition of W, which minimises ‖W − A B‖ and ignores the text.

Dims: D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bottleneck.core.extensions import STARTS, Start
from bottleneck.heads.calibration import Calibration
from bottleneck.heads.key import HeadKey
from bottleneck.heads.starting import Factors, StartInputs


def svd_basis(W_VD: Tensor, c: Calibration) -> tuple[Tensor, Tensor]:
    """Truncated SVD of W for every rank at once, its rows of B scaled to unit variance of B h. A [V, D], B [D, D]."""
    W = W_VD.double()
    vectors = torch.linalg.eigh(W.T @ W).eigenvectors.flip(1)
    deviation = ((vectors.T @ c.cov_DD) * vectors.T).sum(1).clamp(min=1e-30).sqrt()
    return (W @ vectors) * deviation, vectors.T / deviation[:, None]


def make(inputs: StartInputs) -> Callable[[HeadKey], Factors]:
    """Slices of `svd_basis`."""
    A, B = svd_basis(inputs.W_VD, inputs.moments)
    return lambda key: (A[:, : key.rank], B[: key.rank])


START = STARTS.register(Start("svd", "closed form: truncated SVD of W", make, closed_form=True, nested=True))

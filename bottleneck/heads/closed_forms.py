"""How heads start: two random starts and two closed forms, from one pass over a few thousand calibration tokens.

Every start gives `z = B h` coordinates of unit variance on the calibration text, so one learning rate means the same
to all of them, except `normal`, which is the paper's literal N(0, 1).

    scaled   B ~ N(0, 1/(d·s²)) with s² the mean square of an entry of h, A ~ N(0, 1/r): logits of unit variance
    normal   A, B ~ N(0, 1): logits of standard deviation √(r·d)·s, for the record (Godey et al. 2024, Sec. 5.1)
    svd      truncated singular value decomposition of W: best in ‖W − A B‖, blind to the text
    fisher   best in the second-order expansion of the loss around the full head, see `fisher_basis`

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Callable, Iterable

import torch
from torch import Tensor

from bottleneck.backbone.model import FullHead
from bottleneck.core.errors import check
from bottleneck.heads.bank import HeadKey
from bottleneck.losses.chunked import chunk_rows

RIDGE = 1e-6  # of the mean eigenvalue: keeps the covariance invertible on few tokens


@dataclass
class Calibration:
    """Moments of the hidden states and of the full head's distribution over the calibration tokens; float64.

    cov_DD = E[h hᵀ];  mean_V = E[p_v];  fisher_V = E[p_v (1 − p_v)], the diagonal of the Fisher matrix of the logits.
    """

    cov_DD: Tensor
    mean_V: Tensor
    fisher_V: Tensor

    @property
    def mean_square(self) -> float:
        """E[h_i²], averaged over the entries i of h."""
        return (self.cov_DD.diagonal().mean()).item()


@torch.no_grad()
def calibrate(hidden: Iterable[Tensor], head: FullHead) -> Calibration:
    """Measure batches of hidden states [..., D]. One chunk of logits is held at a time."""
    D, V = head.W_VD.shape[1], head.W_VD.shape[0]
    device = head.W_VD.device
    cov = torch.zeros(D, D, dtype=torch.float64, device=device)
    mean, square = (torch.zeros(V, dtype=torch.float64, device=device) for _ in range(2))
    tokens = 0
    for h in hidden:
        for part in h.reshape(-1, D).split(chunk_rows(V, device.type)):
            p = torch.softmax(head.float_logits(part), dim=-1)
            mean += p.sum(0)
            square += p.square_().sum(0)
            wide = part.double()
            cov.addmm_(wide.T, wide)
            tokens += len(part)
    check(
        bool(cov.isfinite().all()) and bool(mean.isfinite().all()),
        "backbone: hidden states or logits of the calibration tokens are not finite; its weights are damaged, or "
        "backbone.dtype cannot hold them",
    )
    return Calibration(cov / tokens, mean / tokens, (mean - square) / tokens)


def roots(cov_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and inverse square root [D, D] of a covariance, with a small ridge."""
    cov = cov_DD + RIDGE * cov_DD.diagonal().mean() * torch.eye(len(cov_DD), dtype=cov_DD.dtype, device=cov_DD.device)
    values, vectors = torch.linalg.eigh(cov)
    root = values.clamp(min=RIDGE * values.max()).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def fisher_basis(W_VD: Tensor, c: Calibration) -> tuple[Tensor, Tensor]:
    """Closed-form heads of every rank at once: A [V, D], B [D, D]; rank r takes A's first r columns, B's first r rows.

    The softmax ignores a shift of all logits, so W is first centred: W_c = W − 1 (E[p]ᵀ W). Around W_c the expected
    loss grows by ½ E[δᵀ F δ] with δ = (A B − W_c) h and F the Fisher matrix of the logits; with its diagonal
    q_v = E[p_v (1 − p_v)] and Σ = E[h hᵀ] that is ½ ‖Q^½ (A B − W_c) Σ^½‖²_F, whose minimum at rank r is the truncated
    SVD (Eckart–Young–Mirsky). With V_r the leading right singular vectors of Q^½ W_c Σ^½:

        A = W_c Σ^½ V_r        B = V_rᵀ Σ^-½        E[(B h)(B h)ᵀ] = I
    """
    W = W_VD.double()
    centred = W - c.mean_V @ W
    root, inverse = roots(c.cov_DD)
    X = centred @ root
    gram = X.T @ (c.fisher_V[:, None] * X)
    vectors = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)
    return X @ vectors, vectors.T @ inverse


def svd_basis(W_VD: Tensor, c: Calibration) -> tuple[Tensor, Tensor]:
    """Truncated SVD of W for every rank at once, its rows of B scaled to unit variance of B h. A [V, D], B [D, D]."""
    W = W_VD.double()
    vectors = torch.linalg.eigh(W.T @ W).eigenvectors.flip(1)
    deviation = ((vectors.T @ c.cov_DD) * vectors.T).sum(1).clamp(min=1e-30).sqrt()
    return (W @ vectors) * deviation, vectors.T / deviation[:, None]


def generator(key: HeadKey) -> torch.Generator:
    """Random numbers of one head: from its rank and seed, so rates are compared from one start. CPU, any device after."""
    digest = hashlib.sha256(f"{key.rank}/{key.seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def starts(init: str, head: FullHead, c: Calibration) -> Callable[[HeadKey], tuple[Tensor, Tensor]]:
    """The start of every head of a run: key -> (A [V, R], B [R, D]).

    A head's scale (Cohere, Granite) is folded into W; a bias or a soft cap has no low-rank form and is left out.
    """
    V, D = head.W_VD.shape
    if init in ("fisher", "svd"):
        W = head.W_VD.float() * head.scale
        A, B = (fisher_basis if init == "fisher" else svd_basis)(W, c)
        return lambda key: (A[:, : key.rank], B[: key.rank])

    def random(key: HeadKey) -> tuple[Tensor, Tensor]:
        g = generator(key)
        A, B = torch.randn(V, key.rank, generator=g), torch.randn(key.rank, D, generator=g)
        return (A, B) if init == "normal" else (A / key.rank**0.5, B / (D * c.mean_square) ** 0.5)

    return random

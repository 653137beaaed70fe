"""Mean pairwise cosine of many vectors in one pass, without the n² pairs.

With unit vectors u_i = h_i / |h_i|:  Σ_{i≠j} u_i·u_j = |Σ u_i|² − n,  so the mean over pairs of distinct vectors
(Godey et al. 2024, Fig. 2) is (|Σ u_i|² − n) / (n² − n), exact, in O(n d) time and O(d) memory.

Dims: N vectors, D their size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor


@dataclass
class Cosines:
    """Sums over the vectors seen so far, less `centre_D` where one is given; float64."""

    units_D: Tensor  # Σ h / |h|
    sum_D: Tensor  # Σ h
    square_D: Tensor  # Σ h²
    norms: float = 0.0  # Σ |h|
    count: int = 0
    zeros: int = 0  # vectors of length 0, which have no direction and count in no pair
    centre_D: Optional[Tensor] = None

    @classmethod
    def empty(cls, size: int, device: torch.device | str = "cpu", centre_D: Optional[Tensor] = None) -> Cosines:
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for _ in range(3)), centre_D=centre_D)

    @torch.no_grad()
    def add(self, h_ND: Tensor) -> None:
        """Take in vectors [N, D]."""
        h = h_ND.double()
        if self.centre_D is not None:
            h = h - self.centre_D
        norm_N1 = h.norm(dim=1, keepdim=True)
        empty = norm_N1 == 0
        self.units_D += (h / norm_N1.masked_fill(empty, 1.0)).sum(0)
        self.sum_D += h.sum(0)
        self.square_D += h.square().sum(0)
        self.norms += norm_N1.sum().item()
        self.count += len(h)
        self.zeros += int(empty.sum())

    @property
    def mean_cosine(self) -> float:
        """Over all pairs of distinct vectors; NaN for fewer than two. At least −1/(n−1), at most 1."""
        n = self.count - self.zeros
        return ((self.units_D.square().sum().item() - n) / (n * n - n)) if n > 1 else float("nan")

    @property
    def mean_D(self) -> Tensor:
        return self.sum_D / self.count

    @property
    def mean_norm(self) -> float:
        return self.norms / self.count

    @property
    def top_dimension(self) -> tuple[int, float]:
        """The dimension that adds most to the mean cosine, and its share of |Σ u|²: near 1 where one outlier makes the
        anisotropy, near 1/D for a cone without a preferred axis."""
        squares = self.units_D.square()
        index = int(squares.argmax())
        return index, (squares[index] / squares.sum().clamp(min=1e-300)).item()

    @property
    def top_energy(self) -> float:
        """Largest share of one dimension in E|h|²."""
        return (self.square_D.max() / self.square_D.sum().clamp(min=1e-300)).item()


def brute_force(h_ND: Tensor) -> float:
    """The mean over all pairs, pair by pair: the definition, for checking."""
    u = torch.nn.functional.normalize(h_ND.double(), dim=1)
    cosines = u @ u.T
    n = len(u)
    return ((cosines.sum() - cosines.diagonal().sum()) / (n * n - n)).item()

"""Mean pairwise cosine of many vectors in one pass, and what makes it large: outlier dimensions or a cone.

With unit vectors u_i = h_i / |h_i|:  Σ_{i≠j} u_i·u_j = |Σ u_i|² − n,  so the mean over pairs of distinct vectors
(Godey et al. 2024, Fig. 2) is (|Σ u_i|² − n) / (n² − n), exact, in O(n d) time and O(d) memory.

Vectors around a common mean (a cone) and vectors with a few huge coordinates (outlier dimensions) can have the same
mean cosine, and centring takes away both. Two numbers tell them apart: the mean cosine without the strongest
dimensions, which only a cone survives, and |E h| / √(E |h|²), the norm of the mean over the root mean square norm.

Dims: N vectors, D their size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor


@dataclass
class Cosines:
    """Sums over the vectors added so far, minus `centre_D` and without the dimensions `drop_D` if given; float64."""

    units_D: Tensor  # Σ h / |h|
    sum_D: Tensor  # Σ h
    square_D: Tensor  # Σ h²
    norms: float = 0.0  # Σ |h|
    count: int = 0
    zeros: int = 0  # vectors of length 0, which have no direction and count in no pair
    centre_D: Optional[Tensor] = None
    drop_D: Optional[Tensor] = None  # bool [D]: dimensions that are set to 0

    @classmethod
    def empty(
        cls,
        size: int,
        device: torch.device | str = "cpu",
        centre_D: Optional[Tensor] = None,
        drop_D: Optional[Tensor] = None,
    ) -> Cosines:
        """Sums over no vectors of `size` entries."""
        units, total, square = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(3))
        return cls(units, total, square, centre_D=centre_D, drop_D=drop_D)

    @torch.no_grad()
    def add(self, h_ND: Tensor) -> None:
        """Add vectors [N, D]."""
        h = h_ND.double()
        if self.centre_D is not None:
            h = h - self.centre_D
        if self.drop_D is not None:
            h = h.masked_fill(self.drop_D, 0.0)
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
    def cone(self) -> float:
        """|E h| / √(E |h|²), 0 … 1: 0 without a common direction, 1 if all vectors are the same."""
        energy = (self.square_D.sum() / self.count).item()
        return (self.mean_D.norm().item() / energy**0.5) if energy > 0 else 0.0

    @property
    def top_dimension(self) -> tuple[int, float]:
        """The dimension that contributes most to the mean cosine, and its share of |Σ u|².

        The share is near 1 if one outlier dimension makes the mean cosine, near 1/D for a cone without a preferred
        axis.
        """
        squares = self.units_D.square()
        index = int(squares.argmax())
        return index, (squares[index] / squares.sum().clamp(min=1e-300)).item()

    def strongest(self, k: int) -> Tensor:
        """The k dimensions with the largest E h_i², the strongest first: int64 [k]."""
        return self.square_D.topk(k).indices

    @property
    def top_energy(self) -> float:
        """Largest share of one dimension in E|h|²."""
        return (self.square_D.max() / self.square_D.sum().clamp(min=1e-300)).item()


def without(sums: Cosines, k: int) -> Cosines:
    """Empty sums for the same vectors without the `k` strongest dimensions of `sums`."""
    drop_D = torch.zeros_like(sums.sum_D, dtype=torch.bool)
    drop_D[sums.strongest(k)] = True
    return Cosines.empty(len(drop_D), drop_D.device, drop_D=drop_D)


def brute_force(h_ND: Tensor) -> float:
    """The mean over all pairs, pair by pair: the definition, for tests."""
    u = torch.nn.functional.normalize(h_ND.double(), dim=1)
    cosines = u @ u.T
    n = len(u)
    return ((cosines.sum() - cosines.diagonal().sum()) / (n * n - n)).item()

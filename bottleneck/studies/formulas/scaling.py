"""The scaling law of Fig. 1b: L(N, T) = A / N^α + B / T^β + E, A and α fitted, the rest from Hoffmann et al. 2022.

N parameters, T training tokens, L loss in nats a token. Godey et al. 2024 find A = 119.09, α = 0.246 on Pythia from
410M up.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Sequence

import torch
from torch import Tensor

from bottleneck.core.errors import check

B, BETA, E = 410.7, 0.28, 1.69  # fixed (Godey et al. 2024, Sec. 3.1)
DELTA = 1e-3  # where Huber's loss on log L turns from square to linear (Hoffmann et al. 2022)
START_ALPHAS = (0.1, 0.25, 0.4, 0.6)
START_HEIGHTS = (-2.0, -0.5, 0.5)  # log of A / N^α at the geometric mean of the N


def log_law(log_height: Tensor, alpha: Tensor, log_n: Tensor, log_t: Tensor) -> Tensor:
    """log L for A / N^α = exp(log_height − α log_n).

    Sums are taken in logarithms, so no starting point can overflow.
    """
    terms = torch.stack([log_height - alpha * log_n, math.log(B) - BETA * log_t, torch.full_like(log_n, math.log(E))])
    return torch.logsumexp(terms, dim=0)


@dataclass
class Law:
    """A fitted law.

    Attributes:
        huber: mean Huber loss of the fit on log L.
        points: number of losses it was fitted to.
        spread: largest difference of alpha among starting points that end within 1 % of the best objective.
    """

    A: float
    alpha: float
    huber: float
    points: int
    spread: float

    def __call__(self, parameters: float, tokens: float) -> float:
        """Loss in nats a token of a model with `parameters` after `tokens` > 0 training tokens."""
        return self.A / parameters**self.alpha + self.floor(tokens)

    @staticmethod
    def floor(tokens: float) -> float:
        """Loss of an infinitely large model: B / T^β + E."""
        return B / tokens**BETA + E

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "B": B, "beta": BETA, "E": E}


def fit_law(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> Law:
    """Fit A > 0 and α by least Huber loss on log L, with L-BFGS from several starting points; the best fit is returned.

    Raises: UserError for fewer than two sizes of models, which leave A and α undetermined.
    """
    check(len(set(parameters)) > 1, "the scaling law needs models of two sizes at least")
    log_n, log_t, log_l = (
        torch.tensor([math.log(x) for x in xs], dtype=torch.float64) for xs in (parameters, tokens, losses)
    )
    middle = log_n.mean()  # around it A and α are nearly independent, which keeps the search short

    def objective(p: Tensor) -> Tensor:
        residual = log_law(p[0], p[1], log_n - middle, log_t) - log_l
        return torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=DELTA) / DELTA**2

    found = []
    for alpha in START_ALPHAS:
        for height in START_HEIGHTS:
            p = torch.tensor([height, alpha], dtype=torch.float64, requires_grad=True)
            search = torch.optim.LBFGS(
                [p],
                max_iter=300,
                tolerance_grad=1e-12,
                tolerance_change=1e-14,
                history_size=10,
                line_search_fn="strong_wolfe",
            )

            def closure(search: torch.optim.LBFGS = search, p: Tensor = p) -> Tensor:
                search.zero_grad()
                value = objective(p)
                value.backward()
                return value

            search.step(closure)
            value = objective(p).item()
            if math.isfinite(value):
                found.append((value, p[0].item(), p[1].item()))
    check(bool(found), "the scaling law cannot be fitted to these losses; are they in nats a token?")
    best, height, alpha = min(found)
    near = [a for value, _, a in found if value <= 1.01 * best + 1e-9]
    return Law(math.exp(height + alpha * middle.item()), alpha, best * DELTA**2, len(losses), max(near) - min(near))

"""`lk`: the acceptance rate of a draft, maximised directly (LK losses, Samarin et al. 2026, arXiv 2602.23881).

p is the target's distribution at a token, q = softmax(s) the draft head's. A token drafted from q is accepted by
speculative decoding with probability (Leviathan et al. 2023, Corollary 3.6)

    (1)  α = Σ_v min(p_v, q_v) = 1 − TV(p, q)

Among heads too small to copy p, the one of least KL(p ‖ q) is not the one of largest α: KL is dominated by tokens to
which q gives too little. The total variation alone has almost no gradient where p and q hardly overlap. The two LK
losses avoid both:

    (2)  hybrid   λ KL(p ‖ q) + (1 − λ) (1 − α),  λ = exp(−η sg[α])
    (3)  log      −log α

with sg[·] a constant for the gradient. Far from the target λ is near 1 and (2) is distillation; near it, λ is about
exp(−η) and α is maximised. λ is computed for every token, so that a loss depends neither on the batch nor on how it is
cut into chunks; SpecForge (pull request 492) aggregates α over tokens. η = 0 is distillation. The gradient at the
logits follows from

    (4)  ∂α / ∂s_v = q_v (1[q_v < p_v] − Σ_u q_u 1[q_u < p_u])

The equations' numbers are this file's: of the paper, only abstract and introduction could be read. (2), with λ per
position and η = 3, and (3) are also `lk_hybrid` and `nla` of vLLM's speculators (pull requests 673 and 657). Both p and
q are at temperature 1, at which a draft is sampled.

Dims: n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from bottleneck.core.extensions import OBJECTIVES, Objective

FORMS = ("hybrid", "log")


def overlap(log_p_nV: Tensor, log_q_nV: Tensor) -> Tensor:
    """α of every token [n], equation (1)."""
    return torch.minimum(log_p_nV, log_q_nV).exp().sum(-1)


def loss(logits_nV: Tensor, y_n: Tensor, log_teacher_nV: Optional[Tensor], options: Mapping[str, Any]) -> Tensor:
    """Equation (2) or (3) of every token [n], nats; targets decide only which tokens count."""
    assert log_teacher_nV is not None
    log_q = torch.log_softmax(logits_nV, -1)
    accepted = overlap(log_teacher_nV, log_q)
    if options["form"] == "log":
        return -accepted.clamp(min=torch.finfo(accepted.dtype).tiny).log()
    share = torch.exp(-options["eta"] * accepted.detach())
    kl = (log_teacher_nV.exp() * (log_teacher_nV - log_q)).sum(-1)
    return share * kl + (1 - share) * (1 - accepted)


def refuses(form: str, eta: float) -> Optional[str]:
    """Why options are impossible."""
    if form not in FORMS:
        return f"form={form}: must be one of {', '.join(FORMS)}"
    return None if eta >= 0 else f"eta={eta}: must be at least 0"


OBJECTIVE = OBJECTIVES.register(
    Objective(
        "lk",
        "acceptance rate of a draft: exp(-eta · acceptance) · KL + the rest · (1 - acceptance)",
        loss,
        teacher=True,
        options={"form": "hybrid", "eta": 3.0},
        fast=lambda options: {"overlap": (options["eta"], options["form"] == "log")},
        refuses=refuses,
    )
)

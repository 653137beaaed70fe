"""Acceptance of a run's heads, and of truncated vocabularies at equal bytes, by a target, over the validation text.

FR-Spec (Zhao et al. 2025, arXiv 2502.14856) keeps the rows of the original head for the most frequent tokens of a text
and needs no training: the rival of a head of low rank. Both cost the same bytes where K d = r (V + d).

Dims: D hidden size, K kept rows, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bottleneck.backbone.model import Backbone
from bottleneck.backbone.target import Target
from bottleneck.data.cache import Corpus
from bottleneck.data.module import ValidationBlocks
from bottleneck.evaluation.agreement import COUNTED, compare
from bottleneck.evaluation.metrics.accepted import LENGTHS
from bottleneck.heads.bank import HeadBank
from bottleneck.heads.key import HeadKey
from bottleneck.results.schema import series
from bottleneck.training.finished_run import FinishedRun

log = logging.getLogger(__name__)


class Draft(NamedTuple):
    """One candidate.

    Attributes:
        rank: that it has, or whose bytes it has.
        kind: of `HEAD_KINDS`; `original` for the backbone's own head.
        trained: in the run.
        matrices: whose product gives the logits, the last one first; float32.
        accepted: E_k for k = 1 … 8.
    """

    name: str
    kind: str
    trained: bool
    rank: int
    matrices: list[Tensor]
    acceptance: float
    top1_agreement: float
    accepted: list[float]

    @property
    def bytes(self) -> int:
        """Bytes of its weights in 16 bits."""
        return 2 * sum(m.numel() for m in self.matrices)


def equal_rows(rank: int, hidden_size: int, vocab_size: int) -> int:
    """K of a truncated head with as many weights as a head of low rank has."""
    return rank * (vocab_size + hidden_size) // hidden_size


def by_frequency(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """Ids [V], the most frequent of a text first; of equal counts the smaller first."""
    counts = np.bincount(np.asarray(tokens[:COUNTED], np.int64), minlength=vocab_size)
    return torch.from_numpy(np.argsort(-counts, kind="stable").astype(np.int64))


def candidates(curve: dict[str, Any], target_hash: str) -> list[dict[str, Any]]:
    """One row of a curve for each start, kind and rank: the head that the target accepts most.

    Where the curve's acceptances are those of another target, or none, it is the head of the lowest loss.
    """
    taught = curve.get("target", {}).get("hash") == target_hash
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for h in curve["heads"]:
        place = series(h), h["rank"]
        if h["status"] == "ok" and (place not in found or _worth(h, taught) > _worth(found[place], taught)):
            found[place] = h
    return list(found.values())


def _worth(h: dict[str, Any], taught: bool) -> float:
    return float(h["acceptance"] if taught else -h["loss"])


def measured(
    run: FinishedRun, backbone: Backbone, target: Target, corpus: Corpus, *, block: int, bos: Optional[int], batch: int
) -> list[Draft]:
    """The run's `candidates`, their rivals, and the original head, verified by the target."""
    V, D = backbone.vocab_size, backbone.hidden_size
    rows = {HeadKey.of(h): h for h in candidates(run.curve, target.hash)}
    rivals = _rivals(backbone, [_rank_of(key, D, V) for key in rows], corpus)
    bank = HeadBank([*rows, *rivals], V, D, "chunked").to(backbone.lm_head.weight.device)
    for key, row in rows.items():
        bank[key].load(run.tensors(row))
    for key, tensors in rivals.items():
        bank[key].load(tensors)
    batches = DataLoader(ValidationBlocks(corpus, block, bos), batch_size=batch)
    found = compare(backbone, bank, batches, torch.zeros(V, dtype=torch.long), target)

    def draft(name: str, kind: str, rank: int, matrices: list[Tensor], numbers: dict[str, Any]) -> Draft:
        accepted = [numbers[f"accepted_{k}"] for k in LENGTHS]
        shares = numbers["acceptance"], numbers["top1_agreement"]
        return Draft(name, kind, name in trained, rank, matrices, *shares, accepted)

    trained = {key.name for key in rows}
    drafts = [
        draft(key.name, key.kind, _rank_of(key, D, V), _matrices(bank[key]), found["heads"][key.name])
        for key in bank.keys
    ]
    original = found["target"]["original"]
    return [*drafts, draft("original head", "original", D, [backbone.head.W_VD.float()], original)]


def _rivals(backbone: Backbone, ranks: list[int], corpus: Corpus) -> dict[HeadKey, dict[str, Tensor]]:
    """Truncated heads of the bytes of some ranks, with rows of the original head."""
    head, V, D = backbone.head, backbone.vocab_size, backbone.hidden_size
    if head.bias_V is not None or head.softcap is not None:
        log.warning("%s: its head has a bias or a cap; truncated vocabularies are not drawn beside", backbone.name)
        return {}
    order = by_frequency(corpus.train, V)
    out = {}
    for K in sorted({equal_rows(r, D, V) for r in ranks}):
        if K < V:
            ids = order[:K].sort().values
            W = head.W_VD[ids.to(head.W_VD.device)].float() * head.scale
            out[HeadKey(D, 1.0, 0, "truncated", (("rows", K),))] = {"W": W, "tokens_K": ids}
    return out


def _matrices(head: Any) -> list[Tensor]:
    """The matrices whose product gives a head's logits; further parameters of a kind are left out."""
    tensors = dict(head.named_parameters())
    return [tensors[n].detach() for n in (("W",) if "W" in tensors else ("A", "B"))]


def _rank_of(key: HeadKey, hidden_size: int, vocab_size: int) -> int:
    """The rank of a head, or of the head of low rank with the bytes of a truncated one."""
    if key.kind != "truncated":
        return key.rank
    return -(-dict(key.options)["rows"] * hidden_size // (vocab_size + hidden_size))

"""Output ranks and losses of a run's heads and of the original head, on the same contexts.

Dims: N contexts, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.heads.key import HeadKey
from bottleneck.losses.chunked import chunk_rows
from bottleneck.results.schema import series
from bottleneck.studies.formulas.output_rank import centred_rank, centred_spectrum, losses_without_bands, output_rank
from bottleneck.studies.formulas.spearman import spearman
from bottleneck.studies.shared.config import StudyConfig
from bottleneck.studies.shared.loading import device_of, loaded, log_memory
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import check_same_shapes, one_checkpoint
from bottleneck.studies.shared.text import StudyText, study_text
from bottleneck.training.finished_run import FinishedRun, open_run

log = logging.getLogger(__name__)
Logits = Callable[[Tensor], Tensor]  # hidden states [n, D] -> logits [n, V]


@torch.no_grad()
def states(backbone: Backbone, text: StudyText, micro_batch: int) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and targets [N] of the text."""
    device, found = backbone.lm_head.weight.device, []
    for inputs, targets in text.batches(micro_batch):
        y = targets.to(device)
        found.append((backbone(inputs.to(device))[y != IGNORE], y[y != IGNORE]))
    return torch.cat([h for h, _ in found]), torch.cat([y for _, y in found])


@torch.no_grad()
def chosen_columns(logits: Logits, h_ND: Tensor, *, vocab: int, columns: int) -> Tensor:
    """Tokens [columns] of the vocabulary, ascending: half the likeliest over the contexts, the others evenly spaced.

    Kinds that spend their parameters on frequent tokens have most of their rank among these, which evenly spaced
    tokens of a large vocabulary hardly meet.
    """
    mean_V = torch.zeros(vocab, dtype=torch.float64)
    for h in h_ND.split(chunk_rows(vocab, h_ND.device.type)):
        mean_V += torch.softmax(logits(h).float(), -1).sum(0, dtype=torch.float64).cpu()
    order_V = mean_V.argsort(descending=True, stable=True)
    wanted = min(vocab, columns)
    likely, others = order_V[: wanted // 2], order_V[wanted // 2 :].sort().values
    spaced = torch.linspace(0, len(others) - 1, wanted - len(likely)).round().long()
    return torch.cat([likely, others[spaced]]).sort().values.to(h_ND.device)


@torch.no_grad()
def one_head(logits: Logits, h_ND: Tensor, y_N: Tensor, *, vocab: int, fixed: Tensor) -> dict[str, Any]:
    """Loss in nats a token and output rank of one head over the tokens `fixed` of the vocabulary.

    `limit` is the highest rank that so many contexts and tokens can show; of a linear head, what these tokens did show
    where the whole vocabulary has more.
    """
    total, kept = 0.0, []
    rows = chunk_rows(vocab, h_ND.device.type)
    for h, y in zip(h_ND.split(rows), y_N.split(rows)):
        log_p = torch.log_softmax(logits(h).float(), -1)
        total -= log_p.gather(1, y[:, None]).sum(dtype=torch.float64).item()
        kept.append(log_p[:, fixed].cpu())
    sigma = centred_spectrum(torch.cat(kept))
    found = {"limit": min(len(h_ND), len(fixed)) - 1, "singular_values": sigma.tolist()}
    return {"loss": total / len(y_N), **output_rank(sigma, h_ND.shape[1]), **found}


def limited(found: dict[str, Any], W_VD: Optional[Tensor]) -> dict[str, Any]:
    """`one_head`'s result with a limit that knows the matrix of a linear head; None: the head is not linear.

    The tokens that are used may show less than all would: few of them have the exact rows of `low_rank_sparse`.
    """
    if W_VD is None or centred_rank(W_VD) <= found["rank"]:
        return found
    return found | {"limit": found["rank"]}


@torch.no_grad()
def extended(backbone: Backbone, text: StudyText, *, histories: int, futures: int, columns: int) -> dict[str, Any]:
    """Spectrum of the extended logit matrix [histories, futures · columns] of the original head.

    Histories are pieces of up to 32 tokens of the text, which begin with the token that the tokenizer puts before every
    text, if it does; futures are 4 tokens each from its end.
    """
    device, V = backbone.lm_head.weight.device, backbone.vocab_size
    inputs = torch.cat([x for x, _ in text.batches(8)])
    length = min(32, inputs.shape[1] // 2)
    check(length >= 4, f"data.block_size={inputs.shape[1]}: must be at least 8 for the extended logit matrix")
    pieces = inputs[:, : inputs.shape[1] // length * length].reshape(-1, length)
    few = (
        f"tokens: {len(pieces)} pieces of {length} tokens, the extended logit matrix needs more than {futures} futures"
    )
    check(len(pieces) > futures, few)
    ends = pieces[-futures:, :4]
    past = pieces[:-futures][:histories].clone()
    if text.bos is not None:
        past[:, 0] = text.bos
    if len(past) < histories:
        log.warning("study.histories=%d: the text has %d; give more tokens", histories, len(past))
    fixed = torch.linspace(0, V - 1, min(V, columns)).long().unique().to(device)
    rows = []
    for history in past:
        ids = torch.cat([history.expand(len(ends), -1), ends], 1).to(device)
        log_p = torch.log_softmax(backbone.head.float_logits(backbone(ids)[:, -1]), -1)
        known = log_p[:, fixed]
        rows.append((known - known.mean(-1, keepdim=True)).flatten().cpu())  # centred for each future
    sigma = torch.linalg.svdvals(torch.stack(rows).double())
    return {"histories": len(past), "futures": len(ends), **output_rank(sigma, backbone.hidden_size)}


def best_heads(run: FinishedRun) -> list[dict[str, Any]]:
    """The best head of each kind, options and rank that did not diverge."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in run.curve["heads"]:
        place = (series(row), row["rank"])
        if row["status"] == "ok" and (place not in best or row["loss"] < best[place]["loss"]):
            best[place] = row
    return [best[place] for place in sorted(best)]


def _check_sizes(s: Any, contexts: int, width: int, vocabulary: int) -> None:
    check(contexts > width, f"tokens={contexts}: the rank needs more contexts than the hidden size, {width}")
    most = f"study.columns={s.columns}: the rank needs more tokens of the vocabulary than the hidden size, {width}"
    check(min(vocabulary, s.columns) > width, most)
    check(s.bands <= width, f"study.bands={s.bands}: must be at most the hidden size, {width}")


def _identity(s: Any, bos: Optional[int]) -> dict[str, Any]:
    """What stored parts depend on besides text and dtype.

    Parts of earlier versions are not used again: evenly spaced columns, histories without their first token, limits
    that did not know the rank of W.
    """
    sizes = {name: getattr(s, name) for name in ("columns", "bands", "histories", "futures")}
    return sizes | {"choice": "half likeliest", "bos": bos, "limits": "of W"}


def measure(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The content of escape.json."""
    s = c.study
    cp = one_checkpoint(c)
    shapes = check_same_shapes([cp])
    (width, vocabulary), device = shapes[cp.model], device_of(c)
    run = open_run(Path(s.run).expanduser())
    text = study_text(c, [cp])
    _check_sizes(s, text.tokens, width, vocabulary)
    log_memory([cp], device, 40 * text.tokens * s.columns + 12 * chunk_rows(vocabulary, device.type) * vocabulary)
    parts = PartialResults(folder, s.name, {**text.identity, **_identity(s, text.bos), "dtype": c.backbone.dtype})
    rows = best_heads(run)
    if not rows:
        log.warning("study.run=%s: all of its heads diverged; only the original head is measured", s.run)
    heads: list[dict[str, Any]] = []
    with StudyProgress(len(rows) + 1, c.trainer.progress, "head") as progress, loaded(cp, device, shapes) as backbone:
        other = f"its heads were trained on {run.curve['backbone']} with other weights"
        check(backbone.hash == run.curve["backbone_hash"], f"study.run={s.run}: {other} than {cp.where}")
        h_ND, y_N = states(backbone, text, c.trainer.micro_batch_size)
        check(
            bool(torch.isfinite(h_ND).all()), f"{cp.where}: its hidden states are not numbers; are its weights damaged?"
        )

        fixed = chosen_columns(backbone.head.float_logits, h_ND, vocab=vocabulary, columns=s.columns)

        def original() -> dict[str, Any]:
            found = one_head(backbone.head.float_logits, h_ND, y_N, vocab=vocabulary, fixed=fixed)
            bands = losses_without_bands(h_ND, y_N, backbone.head, s.bands)
            matrix = extended(backbone, text, histories=s.histories, futures=s.futures, columns=16)
            return {**found, "without_bands": bands, "extended": matrix}

        progress.begin("original head")
        reference, kept = parts.get_or(f"original {backbone.hash}", original)
        progress.end(f"loss {reference['loss']:.4f}, output rank {reference['rank']}", kept)
        for row in rows:
            name = HeadKey.of(row).name
            progress.begin(name)

            def trained(row: dict[str, Any] = row) -> dict[str, Any]:
                head = run.head(row).to(device)
                found = one_head(lambda h: head.logits(h.float()), h_ND, y_N, vocab=vocabulary, fixed=fixed)
                return limited(found, head.dense())

            part, kept = parts.get_or(f"{name} {run.hash(row)}", trained)
            heads.append({"head": name, "kind": HeadKey.of(row).kind, "rank_of_head": row["rank"], **part})
            progress.end(f"loss {part['loss']:.4f}, output rank {part['rank']}", kept)
        about = {"backbone": backbone.name, "backbone_hash": backbone.hash}
    losses, ranks = (np.array([h[name] or 0.0 for h in heads]) for name in ("loss", "effective_rank"))
    return {
        **about,
        "hidden_size": width,
        "vocab_size": vocabulary,
        "data": text.corpus.name,
        "tokens": text.tokens,
        "reference": reference,
        "heads": heads,
        "rho": spearman(ranks, losses),
    }

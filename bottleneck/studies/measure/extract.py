"""Log-probabilities of models on a text, and the ranks that they reveal.

Dims: N contexts, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Optional

import torch

from bottleneck.backbone.model import Backbone
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.extraction import common_block, recovered_rank
from bottleneck.studies.formulas.singular import summary
from bottleneck.studies.shared.config import StudyConfig
from bottleneck.studies.shared.loading import device_of, log_memory, visit
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import Checkpoint, check_same_shapes, checkpoints
from bottleneck.studies.shared.text import StudyText, study_text

log = logging.getLogger(__name__)
COLUMNS_FACTOR = 2  # tokens that are read, as a multiple of the hidden size, where all log-probabilities are known
FACTS = "bottleneck.json"  # of an exported head


@torch.no_grad()
def log_probabilities(
    backbone: Backbone, text: StudyText, micro_batch: int, top: Optional[int], progress: StudyProgress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, k] and token ids [N, k] of log-probabilities, float32 on the CPU, as an interface would return them.

    Args:
        top: the k most likely tokens of each context; None: the same evenly spaced tokens in every context, enough of
            them.
    """
    device, V = backbone.lm_head.weight.device, backbone.vocab_size
    wanted = min(V, COLUMNS_FACTOR * backbone.hidden_size + 64)
    fixed = torch.linspace(0, V - 1, wanted).long().unique().to(device)
    values, ids, done = [], [], 0
    for inputs, targets in text.batches(micro_batch):
        h_ND = backbone(inputs.to(device))[targets.to(device) != IGNORE]
        for h in h_ND.split(chunk_rows(V, device.type)):
            log_p = torch.log_softmax(backbone.head.float_logits(h), -1)
            found = (log_p[:, fixed], fixed.expand(len(h), -1)) if top is None else log_p.topk(min(top, V))
            values.append(found[0].cpu())
            ids.append(found[1].cpu())
        done += len(inputs)
        progress.at(done / len(text))
    return torch.cat(values), torch.cat(ids)


def one(
    backbone: Backbone, text: StudyText, micro_batch: int, top: Optional[int], progress: StudyProgress
) -> dict[str, Any]:
    """The rank that a model's log-probabilities reveal, and the singular values it is read from."""
    if backbone.head.softcap is not None:
        log.warning("%s: its head has a soft cap, so its logits are not linear and show no rank", backbone.name)
    values, ids = log_probabilities(backbone, text, micro_batch, top, progress)
    contexts, tokens = len(values), values.shape[1]
    if top is not None:
        chosen, block = common_block(ids, backbone.vocab_size)
        full = torch.full((len(chosen), backbone.vocab_size), torch.nan).scatter_(1, ids[chosen], values[chosen])
        values = full[:, block]
        contexts, tokens = values.shape
    found = recovered_rank(values)
    return {
        "rank": found.rank,
        "gap": found.gap,
        "limit": found.limit,
        "contexts": contexts,
        "tokens_of_block": tokens,
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        "effective_rank": summary(found.sigma)["effective_rank"],
        "singular_values": found.sigma.tolist(),
    }


def known_rank(cp: Checkpoint) -> Optional[int]:
    """The rank that an exported head states in its folder; None for other models."""
    file = Path(cp.backbone.path).expanduser() / FACTS
    try:
        return int(json.loads(file.read_text())["rank"]) if file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(c: StudyConfig, folder: Path) -> dict[str, Any]:
    """The ranks of all models: the content of extract.json."""
    series = checkpoints(c)
    shapes = check_same_shapes(series)
    device = device_of(c)
    text = study_text(c, series)
    top, micro_batch = c.study.top, c.trainer.micro_batch_size
    width, vocabulary = max(shapes.values())
    held = text.tokens * (top or min(vocabulary, COLUMNS_FACTOR * width + 64))
    log_memory(series, device, 24 * held + 8 * chunk_rows(vocabulary, device.type) * vocabulary)
    parts = PartialResults(folder, c.study.name, {**text.identity, "top": top, "dtype": c.backbone.dtype})
    out = []
    with StudyProgress(len(series), c.trainer.progress) as progress:
        for cp in series:
            progress.begin(cp.label)
            part = parts.get(cp.key)
            kept = part is not None
            if part is None:
                part = visit(cp, device, shapes, lambda b: one(b, text, micro_batch, top, progress))
                check(part["effective_rank"] is not None, f"{cp.where}: its logits are all equal; they show no rank")
                part = parts.put(cp.key, part)
            out.append({"model": cp.model, "step": cp.step, "known_rank": known_rank(cp), **part})
            progress.end(f"rank {part['rank']}", kept)
    return {"data": text.corpus.name, "tokens": text.tokens, "top": top, "checkpoints": out}

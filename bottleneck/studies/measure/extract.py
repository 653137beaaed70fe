"""Log-probabilities of models on a text, and the ranks that they reveal.

Dims: N contexts, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from bottleneck.backbone.head import head_input
from bottleneck.backbone.load import export_form, load_config, load_model
from bottleneck.backbone.model import Backbone
from bottleneck.backbone.weights import check_numbers
from bottleneck.core.errors import check
from bottleneck.data.module import IGNORE
from bottleneck.losses.chunked import chunk_rows
from bottleneck.studies.formulas.extraction import common_block, recovered_rank
from bottleneck.studies.formulas.singular import summary
from bottleneck.studies.measure.escape import chosen_columns
from bottleneck.studies.shared.config import StudyConfig
from bottleneck.studies.shared.loading import device_of, log_memory, visit
from bottleneck.studies.shared.partial import PartialResults
from bottleneck.studies.shared.progress import StudyProgress
from bottleneck.studies.shared.series import Checkpoint, Shapes, check_same_shapes, checkpoints
from bottleneck.studies.shared.text import StudyText, study_text

log = logging.getLogger(__name__)
COLUMNS_FACTOR = 2  # tokens that are read, as a multiple of the hidden size, where all log-probabilities are known
FACTS = "bottleneck.json"  # of an exported head
RANKED = ("low_rank", "low_rank_bias", "full")  # kinds whose centred log-probabilities have the rank of the head
FLAT = 100.0  # ratio of the two smallest singular values from which hidden states lie in a plane


class Source(NamedTuple):
    """What log-probabilities are read from: a backbone, or a whole model with a head of its own code.

    Attributes:
        read: token ids [n, T] and which of their contexts count [n, T], to hidden states [N, D].
        logits: hidden states [n, D] to logits [n, V], float32.
    """

    name: str
    device: torch.device
    hidden_size: int
    vocab_size: int
    read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]


def of_backbone(backbone: Backbone) -> Source:
    """The original head of a backbone."""
    if backbone.head.softcap is not None:
        log.warning("%s: its head has a soft cap, so its logits are not linear and show no rank", backbone.name)
    device = backbone.lm_head.weight.device
    sizes = backbone.hidden_size, backbone.vocab_size
    return Source(backbone.name, device, *sizes, lambda ids, used: backbone(ids)[used], backbone.head.float_logits)


@torch.no_grad()
def of_export(model: Any, name: str, vocab_size: int) -> Source:
    """An export with a head of its own code: what the head is given, and what the model makes of its output."""
    head = model.lm_head
    width = model.config.get_text_config(decoder=True).hidden_size
    device = next(model.parameters()).device

    def read(ids: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        return head_input(lambda: model(input_ids=ids, use_cache=False), head)[used]

    ids = torch.arange(8, device=device)[None]
    whole = model(input_ids=ids, use_cache=False).logits[0].float()
    given = head(read(ids, torch.ones_like(ids, dtype=torch.bool))).float()[:, : whole.shape[-1]]  # without padding
    scale = float((given * whole).sum() / given.square().sum().clamp(min=1e-30))  # some families scale the logits
    return Source(name, device, width, vocab_size, read, lambda h: head(h)[:, :vocab_size].float() * scale)


@torch.no_grad()
def log_probabilities(
    source: Source, text: StudyText, micro_batch: int, top: Optional[int], progress: StudyProgress
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [N, k] and token ids [N, k] of log-probabilities, float32 on the CPU, as an interface would return them,
    and hidden states [N, D].

    Args:
        top: the k most likely tokens of each context; None: the same tokens in every context, enough of them, see
            `chosen_columns`.
    """
    device, V = source.device, source.vocab_size
    wanted = min(V, COLUMNS_FACTOR * source.hidden_size + 64)
    values, ids, hidden, done = [], [], [], 0
    for inputs, targets in text.batches(micro_batch):
        hidden.append(source.read(inputs.to(device), targets.to(device) != IGNORE))
        done += len(inputs)
        progress.at(0.5 * done / len(text))
    h_ND = torch.cat(hidden)
    fixed = chosen_columns(source.logits, h_ND, vocab=V, columns=wanted) if top is None else None
    for h in h_ND.split(chunk_rows(V, device.type)):
        log_p = torch.log_softmax(source.logits(h), -1)
        found = log_p.topk(min(top or V, V)) if fixed is None else (log_p[:, fixed], fixed.expand(len(h), -1))
        values.append(found[0].cpu())
        ids.append(found[1].cpu())
        progress.at(0.5 + 0.5 * sum(map(len, ids)) / len(h_ND))
    return torch.cat(values), torch.cat(ids), h_ND.float().cpu()


def hidden_rank(h_ND: torch.Tensor) -> int:
    """D, or D − 1 where the hidden states lie in a plane of that dimension, as those of a final LayerNorm do."""
    x = h_ND.double()
    sigma = torch.linalg.svdvals(x - x.mean(0))
    D = x.shape[1]
    return D - 1 if len(x) > D > 1 and bool(sigma[-2] > FLAT * sigma[-1]) else D


def one(
    source: Source, text: StudyText, micro_batch: int, top: Optional[int], progress: StudyProgress
) -> dict[str, Any]:
    """The rank that a model's log-probabilities reveal, and the singular values it is read from."""
    values, ids, h_ND = log_probabilities(source, text, micro_batch, top, progress)
    contexts, tokens = len(values), values.shape[1]
    if top is not None:
        chosen, block = common_block(ids, source.vocab_size)
        full = torch.full((len(chosen), source.vocab_size), torch.nan).scatter_(1, ids[chosen], values[chosen])
        values = full[:, block]
        contexts, tokens = values.shape
    found = recovered_rank(values)
    return {
        "rank": found.rank,
        "gap": found.gap,
        "limit": found.limit,
        "contexts": contexts,
        "tokens_of_block": tokens,
        "hidden_size": source.hidden_size,
        "hidden_rank": hidden_rank(h_ND),
        "vocab_size": source.vocab_size,
        "effective_rank": summary(found.sigma)["effective_rank"],
        "singular_values": found.sigma.tolist(),
    }


def at(
    cp: Checkpoint, device: torch.device, shapes: Shapes, work: Callable[[Source], dict[str, Any]]
) -> dict[str, Any]:
    """`work` on a checkpoint's log-probabilities."""
    if export_form(load_config(cp.backbone)) is None:
        return visit(cp, device, shapes, lambda backbone: work(of_backbone(backbone)))
    model = load_model(cp.backbone, device.type).to(device)
    check_numbers(model, cp.label)
    return work(of_export(model, cp.label, shapes[cp.model][1]))


def known_rank(cp: Checkpoint) -> Optional[int]:
    """The rank that an exported head states in its folder; None for other models, and for kinds that have none."""
    file = Path(cp.backbone.path).expanduser() / FACTS
    try:
        facts = json.loads(file.read_text()) if file.is_file() else {}
        return int(facts["rank"]) if facts.get("head", {}).get("kind", "low_rank") in RANKED else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
    settings = {"top": top, "dtype": c.backbone.dtype}
    if top is None:
        settings["choice"] = "half likeliest"  # parts that were measured on evenly spaced tokens are not used again
    parts = PartialResults(folder, c.study.name, {**text.identity, **settings})
    out = []
    with StudyProgress(len(series), c.trainer.progress) as progress:
        for cp in series:
            progress.begin(cp.label)
            part = parts.get(cp.key)
            kept = part is not None and "hidden_rank" in part  # of an earlier version: not
            if part is None or not kept:
                part = at(cp, device, shapes, lambda source: one(source, text, micro_batch, top, progress))
                check(part["effective_rank"] is not None, f"{cp.where}: its logits are all equal; they show no rank")
                part = parts.put(cp.key, part)
            out.append({"model": cp.model, "step": cp.step, "known_rank": known_rank(cp), **part})
            progress.end(f"rank {part['rank']}", kept)
    return {"data": text.corpus.name, "tokens": text.tokens, "top": top, "checkpoints": out}

"""Details beyond perplexity: the registered metrics, and the loss by frequency of the target and by place in the text.

Every metric (`bottleneck.core.extensions.METRICS`) is a mean over all validation tokens, or over windows of them,
computed a chunk of logits at a time.

Precision: logits and their log-softmax are float32, so each token's value carries their rounding. Sums over tokens are
float64 and add no error that matters. Against float64 throughout, losses come out 8e-7 nats low at V = 8,192 and 8.4e-6
nats low at V = 49,152; KL comes out up to 2.6e-5 nats high.

Dims: N blocks, T tokens of a block, n tokens of a chunk, D hidden size, V vocabulary, H heads, K metrics, G groups of
blocks.
"""

from __future__ import annotations

import math
from typing import Any, Iterable, Optional, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bottleneck.backbone.model import Backbone
from bottleneck.backbone.target import Target
from bottleneck.core.extensions import Metric, Predictions, metrics
from bottleneck.heads.bank import HeadBank
from bottleneck.losses.chunked import chunk_rows

# Places in the order of frequency, from 1. The last band has all further tokens and those missing in the training text.
BANDS = ((1, 10), (11, 100), (101, 1_000), (1_001, 10_000), (10_001, None))
COUNTED = 200_000_000  # training tokens whose frequencies are counted, at most
GROUPS = 100  # stretches of validation text whose losses curve.json keeps, at most
SUMMED = 4  # metrics summed in one reduction: the built-in twelve have the same bits whatever plugins add


def bands_of(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """The band of every token id, int64 [V], by its count in a text. Of equal counts the smaller id comes first."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, min(len(tokens), COUNTED), 1 << 24):
        counts += np.bincount(tokens[start : min(start + (1 << 24), COUNTED)], minlength=vocab_size)
    place = np.empty(vocab_size, np.int64)
    place[np.argsort(-counts, kind="stable")] = np.arange(1, vocab_size + 1)
    return torch.from_numpy(np.searchsorted([first for first, _ in BANDS[1:]], place, side="right"))


def band_names() -> list[str]:
    """Names of the bands in curve.json: 1–10, 11–100, …"""
    return [f"{first}–{last}" if last else f"{first}–" for first, last in BANDS]


def metric_sums(original: Predictions, head: Predictions, wanted: Sequence[Metric]) -> Tensor:
    """Each metric summed over the tokens of a chunk: [K], float64."""
    measured = _measured(original, head, wanted)
    return _summed([measured[m.measure] for m in wanted])


def _measured(original: Predictions, head: Predictions, wanted: Sequence[Metric]) -> dict[Any, Tensor]:
    """The values [n] of each measure, computed once for all metrics that share it."""
    return {measure: measure(original, head) for measure in dict.fromkeys(m.measure for m in wanted)}


def _summed(values: list[Tensor]) -> Tensor:
    """Sums [K] of K metrics' values [n] of a chunk, float64."""
    parts = [torch.stack(values[i : i + SUMMED], -1).sum(0, dtype=torch.float64) for i in range(0, len(values), SUMMED)]
    return torch.cat(parts)


class _Sums:
    """Sums over this process's validation tokens, on the device; float64."""

    def __init__(self, heads: int, wanted: Sequence[Metric], device: torch.device):
        self.wanted = wanted
        # H heads, then the original head, which is compared with the target if there is one
        self.metrics_HK = torch.zeros(heads + 1, len(wanted), dtype=torch.float64, device=device)
        self.numbers_HK = torch.zeros_like(self.metrics_HK)  # of tokens or windows in these sums
        self.by_token_K = torch.tensor([m.along is None for m in wanted], device=device)
        self.target = torch.zeros((), dtype=torch.float64, device=device)
        self.parts: dict[tuple[int, Any], list[Tensor]] = {}  # values of the batch in hand, for metrics along blocks
        # H heads, then the original head
        self.bands = torch.zeros(heads + 1, len(BANDS), dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(BANDS), dtype=torch.float64, device=device)
        self.blocks: list[Tensor] = []  # [H + 1, N] of each batch
        self.block_tokens: list[Tensor] = []  # [N] of each batch

    def compare(self, i: int, original: Predictions, head: Predictions) -> None:
        """Add a chunk of tokens to the metrics of head i."""
        measured = _measured(original, head, self.wanted)
        sums = _summed([measured[m.measure] for m in self.wanted])
        self.metrics_HK[i] += torch.where(self.by_token_K, sums, 0.0)
        self.numbers_HK[i] += self.by_token_K * len(head.targets_n)
        for measure in {m.measure for m in self.wanted if m.along is not None}:
            self.parts.setdefault((i, measure), []).append(measured[measure])

    def finish_batch(self, keep_NT: Tensor) -> None:
        """Add the metrics along the blocks of a batch, whose validation tokens have all been compared."""
        for (i, measure), values in self.parts.items():
            whole_NT = torch.zeros(keep_NT.shape, dtype=torch.float64, device=keep_NT.device)
            whole_NT[keep_NT] = torch.cat(values).double()
            for k, m in enumerate(self.wanted):
                if m.along is not None and m.measure is measure:
                    total, number = m.along(whole_NT, keep_NT)
                    self.metrics_HK[i, k] += total
                    self.numbers_HK[i, k] += number
        self.parts = {}

    def add_losses(self, i: int, q: Predictions, member_nB: Tensor) -> Tensor:
        """Add a head's losses to its bands. Returns the losses [n], float64."""
        loss_n = -q.log_p_nV.gather(1, q.targets_n[:, None]).squeeze(1).double()
        # as a product, because index_add on a GPU adds in a varying order and so gives varying bits
        self.bands[i] += loss_n @ member_nB
        return loss_n

    def add_blocks(self, losses: Tensor, keep: Tensor, shape: torch.Size) -> None:
        """Add the losses [H + 1, tokens kept] of a batch, as sums over its blocks."""
        whole = losses.new_zeros(len(losses), keep.numel())
        whole[:, keep] = losses
        self.blocks.append(whole.view(len(losses), *shape).sum(-1))
        self.block_tokens.append(keep.view(shape).sum(-1))

    def reduce(self) -> None:
        """Add the sums of all processes."""
        if dist.is_available() and dist.is_initialized():
            for t in (self.metrics_HK, self.numbers_HK, self.target, self.bands, self.counts):
                dist.all_reduce(t)

    def gathered_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Loss sums [H + 1, N] and tokens [N] of all blocks of all processes, in the order of the text."""
        mine = torch.cat(self.blocks, 1).cpu().numpy(), torch.cat(self.block_tokens).cpu().numpy()
        parts: list[Any] = [mine]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)
        # block i of process p is block p + i * processes of the text
        order = np.argsort(np.concatenate([np.arange(len(t)) * len(parts) + p for p, (_, t) in enumerate(parts)]))
        sums = np.concatenate([s for s, _ in parts], 1)[:, order]
        tokens = np.concatenate([t for _, t in parts])[order]
        return sums[:, tokens > 0], tokens[tokens > 0]


@torch.no_grad()
def compare(
    backbone: Backbone,
    bank: HeadBank,
    batches: Iterable[tuple[Tensor, Tensor]],
    band_V: Tensor,
    target: Optional[Target] = None,
    domains: Sequence[tuple[str, int]] = (),
    ignore_index: int = -100,
) -> dict[str, Any]:
    """The registered metrics, losses by band and losses by group of blocks of every head, over all tokens of all
    processes.

    Args:
        batches: this process's (inputs [N, T], targets [N, T]), as `TextData.validation_batches` gives them: together
        the
            processes hold every block once.
        band_V: from `bands_of`.
        target: metrics then compare the heads, and the original head, with it.
        domains: name and number of blocks of each text that the validation text consists of, if it is a mix.
    Returns: heads: {name: {METRIC: value or None, bands: [{band, tokens, loss}], group_losses: [G]}};
        reference: {bands, group_tokens: [G], group_losses: [G]} of the original head; with a target also target:
        {name, hash, loss, original: {METRIC: value or None}}. With domains, heads and reference have domains:
        [{domain, tokens, loss}].
    """
    device = backbone.lm_head.weight.device
    band_V = band_V.to(device)
    heads = [(bank[key], read) for key, read in zip(bank.keys, bank.cast(backbone.dtype, "chunked"))]
    H, rows = len(bank), chunk_rows(len(band_V), device.type)
    sums = _Sums(H, metrics(), device)
    for inputs, goals in batches:
        ids = inputs.to(device, non_blocking=True)
        h = backbone(ids).flatten(0, 1)
        y = goals.to(device, non_blocking=True).flatten()
        keep = y != ignore_index
        t = h if target is None else target(ids).flatten(0, 1)
        h, t, y = h[keep], t[keep], y[keep]
        losses: list[Tensor] = []
        for h_nD, t_nD, y_n in zip(h.split(rows), t.split(rows), y.split(rows)):
            member_nB = torch.nn.functional.one_hot(band_V[y_n], len(BANDS)).double()
            sums.counts += member_nB.sum(0)
            original = Predictions(torch.log_softmax(backbone.head.float_logits(h_nD), -1), y_n)
            judge, chunk = original, []
            if target is not None:
                judge = Predictions(torch.log_softmax(target.float_logits(t_nD), -1), y_n)
                sums.target -= judge.log_p_nV.gather(1, y_n[:, None]).sum(dtype=torch.float64)
                sums.compare(H, judge, original)
            for i, (head, read) in enumerate(heads):
                found = Predictions(torch.log_softmax(head.float_logits(h_nD, read), -1), y_n)
                sums.compare(i, judge, found)
                chunk.append(sums.add_losses(i, found, member_nB))
            chunk.append(sums.add_losses(H, original, member_nB))
            losses.append(torch.stack(chunk))
        if losses:
            sums.add_blocks(torch.cat(losses, 1), keep, goals.shape)
            sums.finish_batch(keep.view(goals.shape))
    sums.reduce()
    return _described(sums, [key.name for key in bank.keys], target, domains)


def _described(
    sums: _Sums, names: list[str], target: Optional[Target], domains: Sequence[tuple[str, int]]
) -> dict[str, Any]:
    """What `compare` returns."""
    tokens = [int(c) for c in sums.counts.tolist()]
    means, bands = (sums.metrics_HK / sums.numbers_HK).tolist(), (sums.bands / sums.counts).tolist()
    block_sums, block_tokens = sums.gathered_blocks()
    group_tokens, group_losses = grouped(block_sums, block_tokens)
    by_domain = domain_losses(block_sums, block_tokens, domains)

    def described(i: int) -> dict[str, Any]:
        rows = zip(band_names(), tokens, bands[i])
        table = [{"band": name, "tokens": t, "loss": x if math.isfinite(x) else None} for name, t, x in rows]
        own = {"domains": [row[i] for row in by_domain]} if by_domain else {}
        return {"bands": table, "group_losses": group_losses[i]} | own

    def metrics_of(i: int) -> dict[str, Any]:
        return {m.name: x if x == x else None for m, x in zip(sums.wanted, means[i])}

    heads = {name: metrics_of(i) | described(i) for i, name in enumerate(names)}
    found = {"heads": heads, "reference": described(len(names)) | {"group_tokens": group_tokens}}
    if target is not None:
        loss = sums.target.item() / sum(tokens)
        found["target"] = {"name": target.name, "hash": target.hash, "loss": loss, "original": metrics_of(len(names))}
    return found


def domain_losses(
    sums: np.ndarray, tokens: np.ndarray, domains: Sequence[tuple[str, int]]
) -> list[list[dict[str, Any]]]:
    """Mean losses of each text of a mix: for each domain, and each of the H rows, {domain, tokens, loss}.

    Args: sums: summed losses [H, N] of blocks, nats; tokens: of each block [N]; domains: (name, number of blocks).
    """
    found, at = [], 0
    for name, blocks in domains:
        mine = slice(at, at + blocks)
        count = int(tokens[mine].sum())
        means = (sums[:, mine].sum(1) / count).tolist()
        found.append([{"domain": name, "tokens": count, "loss": x if math.isfinite(x) else None} for x in means])
        at += blocks
    return found


def grouped(sums: np.ndarray, tokens: np.ndarray) -> tuple[list[int], list[list[float | None]]]:
    """Losses of groups of consecutive blocks, for confidence intervals. There are at most `GROUPS` groups.

    Args: sums: summed losses [H, N] of blocks, nats; tokens: of each block [N].
    Returns: tokens of each group [G]; mean losses, one list of G for each of the H rows, nats to 7 decimals, None where
        they are not finite.
    """
    parts = np.array_split(np.arange(len(tokens)), min(GROUPS, len(tokens)))
    counts = [int(tokens[p].sum()) for p in parts]
    means = [[float(row[p].sum()) / n for p, n in zip(parts, counts)] for row in sums]
    return counts, [[round(x, 7) if math.isfinite(x) else None for x in row] for row in means]

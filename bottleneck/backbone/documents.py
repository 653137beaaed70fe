"""Documents that share a sequence: attention kept to each document, and positions that begin again with each.

In a sequence of joined documents, end-of-text begins a document: it is the first token of the document after it. Where
the tokenizer puts another token before every text (Llama, Gemma), a document that sees none before it begins with that
one instead; a text that holds this token already, such as a token file, begins its documents there. So a document in a
sequence sees what it would see alone.

Dims: N sequences, T sequence length, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Callable, Mapping, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad

from bottleneck.backbone.proof import MOVE_TOLERANCE, MOVE_TOLERANCE_16, probe_ids, relative_error

Windows = Mapping[str, Optional[int]]


@dataclass(frozen=True)
class Documents:
    """How documents of one sequence are kept apart.

    Args:
        eos: id of end-of-text.
        reset: positions are counted from each document's start (data.reset_positions).
        mask: attention sees only the own document (data.mask_documents).
        bos: id that the tokenizer puts before every text; None: nothing, and end-of-text begins a document.
    """

    eos: int
    reset: bool
    mask: bool
    bos: Optional[int] = None

    @property
    def keys(self) -> str:
        """The keys that ask for it."""
        return " and ".join(["data.reset_positions"] * self.reset + ["data.mask_documents"] * self.mask)

    def begins(self, ids_NT: Tensor) -> Tensor:
        """Where documents begin [N, T]."""
        ends = ids_NT == self.eos
        if self.bos is None:
            return ends
        starts = ids_NT == self.bos
        return starts | (ends & ~pad(starts[:, 1:], (0, 1)))

    def begun(self, ids_NT: Tensor) -> Tensor:
        """The ids [N, T] that a model reads: those given, with each document's beginning as it would be alone."""
        return ids_NT if self.bos is None or not self.mask else torch.where(self.begins(ids_NT), self.bos, ids_NT)

    def arguments(self, ids_NT: Tensor, dtype: torch.dtype, windows: Windows = MappingProxyType({})) -> dict[str, Any]:
        """Arguments of a Transformers model: position_ids [N, T]; attention_mask [N, 1, T, T], 0 or the lowest number.

        Both are always given: from positions alone Transformers would guess where documents begin.

        Args: windows: see `windows_of`. Where one is shorter than T, and layers differ, attention_mask is a mask for
                each type of layer, as families with such layers take it.
        """
        T = ids_NT.shape[1]
        places = torch.arange(T, device=ids_NT.device)
        begins = self.begins(ids_NT)
        back = places[:, None] - places
        allowed = (back >= 0)[None]
        if self.mask:
            number = begins.cumsum(1)
            allowed = allowed & (number[:, :, None] == number[:, None, :])
        positions = places.expand_as(ids_NT)
        if self.reset:
            positions = positions - torch.where(begins, positions, 0).cummax(1).values

        def mask(window: Optional[int]) -> Tensor:
            seen = allowed if window is None else allowed & (back < window)
            lowest = torch.zeros((), dtype=dtype, device=ids_NT.device).masked_fill(~seen, torch.finfo(dtype).min)
            return lowest[:, None].expand(len(ids_NT), 1, -1, -1)

        kinds = windows if any(w is not None and w < T for w in windows.values()) else {"": None}
        masks = {kind: mask(window) for kind, window in kinds.items()}
        return {"position_ids": positions, "attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def windows_of(config: Any) -> dict[str, Optional[int]]:
    """How many tokens, its own included, each type of a model's layers attends to; None: all before it.

    By `layer_types` and `sliding_window` of a Transformers config. A model without types of layers has one; one with
    types that are not known here has none: `fault` then tells whether a mask of all tokens serves.
    """
    window = getattr(config, "sliding_window", None)
    window = window if isinstance(window, int) and getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None)
    if not types:
        return {"": window}
    known = {"full_attention": None, "sliding_attention": window}
    return {kind: known[kind] for kind in types} if set(types) <= known.keys() else {}


@torch.no_grad()
def fault(run: Callable[[Tensor, Optional[Documents]], Tensor], documents: Documents, tokens: int, block: int,
          device: torch.device) -> Optional[str]:  # fmt: skip
    """What a backbone does wrong with documents in one sequence, or None.

    Args:
        run: (ids [N, T], documents or None) -> hidden states [N, T, D].
        tokens: ids are below this; block: tokens in a sequence of the run.
    """
    ids = probe_ids(tokens, (2, block), device)
    marks = {documents.eos} if documents.bos is None else {documents.eos, documents.bos}
    other_id = next(i % tokens for i in range(documents.eos, documents.eos + 3) if i % tokens not in marks)
    for mark in marks:
        ids = torch.where(ids == mark, other_id, ids)
    plain = run(ids, None)
    near = MOVE_TOLERANCE.get(plain.dtype, MOVE_TOLERANCE_16)

    def apart(got: Tensor, wanted: Tensor) -> bool:
        return not relative_error(got, wanted) < near

    if apart(run(ids, documents), plain):
        return "a sequence of one document has other hidden states than without them"
    start = block // 2
    packed = ids.clone()
    packed[:, start] = documents.eos
    other = packed.clone()
    other[:, :start] = other[:, :start].flip(0)
    second = run(packed, documents)[:, start:]
    if documents.mask and apart(run(other, documents)[:, start:], second):
        return "a document depends on the one before it"
    if documents.mask and documents.reset and apart(second, run(documents.begun(packed)[:, start:], None)):
        return "a document has other hidden states than alone"
    if documents.reset and not documents.mask and not apart(second, run(packed, None)[:, start:]):
        return "hidden states do not depend on the positions that are given"
    return None

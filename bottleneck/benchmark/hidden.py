"""Real tensors for `benchmark heads`: a backbone's hidden states on a text, and the best low-rank heads for them.

Random logits are flat, a language model's are peaked; this changes the work of kernels and the errors of gradients.

Dims: N tokens, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from bottleneck.benchmark.peers import Case
from bottleneck.core.errors import check
from bottleneck.core.paths import ROOT

SAMPLE = ROOT / "data/sample/train.jsonl"
BLOCK = 512


class Real(NamedTuple):
    """Hidden states h [N, D], the next tokens y [N], and the original head W [V, D]."""

    h_ND: Tensor
    y_N: Tensor
    W_VD: Tensor

    def case(self, R: int) -> Case:
        """The rank-R head nearest to W on these hidden states, ‖h (W − A B)ᵀ‖: principal components of W h."""
        h, W = self.h_ND.float(), self.W_VD.float()
        moment = h.T @ h / len(h)
        values, vectors = torch.linalg.eigh(moment)
        root = vectors * values.clamp(min=values.max() * 1e-6).sqrt()  # h = root x with x of variance 1
        inverse = torch.linalg.inv(root)
        _, _, Vt = torch.linalg.svd(root.T @ W.T @ W @ root)
        basis = Vt[:R]
        A, B = W @ root @ basis.T, basis @ inverse
        dtype = self.h_ND.dtype
        return Case(self.h_ND, A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_(), self.y_N)


def read(folder: Path, text: Optional[Path], tokens: int, device: str) -> Real:
    """Run a backbone over the first tokens of a text. Raises UserError if one of them is missing or too short."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check((folder / "config.json").is_file(), f"--backbone {folder}: no folder of a backbone (config.json is missing)")
    path = text or SAMPLE
    check(path.is_file(), f"--text {path}: no such file")
    words = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        words = "\n\n".join(json.loads(line)["text"] for line in words.splitlines() if line.strip())
    ids = AutoTokenizer.from_pretrained(folder)(words[: 16 * tokens])["input_ids"]
    check(len(ids) > tokens, f"--text {path}: {len(ids)} tokens; give {tokens + 1} or a smaller --tokens")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    row = torch.tensor(ids[: tokens + 1], device=device)
    with torch.no_grad():
        parts = [model.base_model(part[None], use_cache=False).last_hidden_state[0] for part in row[:-1].split(BLOCK)]
    return Real(torch.cat(parts), row[1:], model.get_output_embeddings().weight.detach())

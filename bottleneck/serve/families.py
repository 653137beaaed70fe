"""Which causal LMs of Transformers are supported, tried with tiny random models.

    python -m bottleneck.serve.families [--write docs/families.md] [FAMILY ...]

For each family a model of two layers is saved and loaded as a backbone in float32 and in bfloat16. Its reference loss
is compared with that of the plain model. A head is trained on it for a few steps, exported, loaded again and compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import multiprocessing
import re
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from bottleneck.backbone.model import DTYPES, Backbone, load_model, load_shape
from bottleneck.backbone.tiny_configs import FAMILIES, VOCABULARY, tiny_config
from bottleneck.config.schema import BackboneConfig, OptimConfig
from bottleneck.core.environment import cores
from bottleneck.core.errors import UserError, check
from bottleneck.core.files import write_atomic
from bottleneck.evaluation.sums import full_head_loss
from bottleneck.heads.bank import HeadBank, HeadKey
from bottleneck.serve.export import write_dense
from bottleneck.serve.folder import check_same, read_back, see
from bottleneck.training.optim import build_optimizer

BLOCK, BATCH, STEPS, RANK = 24, 4, 6, 4
SUPPORTED = "yes"
UNTRIED = "untried"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one family: `SUPPORTED`, `UNTRIED`, or the reason, in each dtype; and whether it can be
    exported."""

    family: str
    float32: str
    bfloat16: str
    export: str
    between: str  # what the family does to h Wᵀ to get the logits

    def row(self) -> str:
        cells = (self.family, self.float32, self.bfloat16, self.export, self.between)
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def walk(family: str, folder: Path) -> Outcome:
    """Try one family in an empty folder."""
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
        _spread(model)
        model.save_pretrained(folder / "source")
    except Exception as error:  # a config that cannot be shrunk, or a package that is not installed
        reason = f"{UNTRIED}: {_short(error)}"
        return Outcome(family, reason, reason, "", "")
    told: dict[str, str] = {}
    exported, between = "", ""
    for dtype in ("float32", "bfloat16"):
        cfg = BackboneConfig(path=str(folder / "source"), dtype=dtype, name=family)
        try:
            backbone, W = _train(cfg, dtype)
            told[dtype] = SUPPORTED
        except UserError as error:
            told[dtype] = _short(error)
            continue
        between = between or _between(backbone)
        try:
            _export(cfg, backbone, W, folder / dtype)
            exported = exported or SUPPORTED
        except Exception as error:  # may also be a defect of ours: the table shows it, and the test of the table fails
            exported = _short(error)
    return Outcome(family, told["float32"], told["bfloat16"], exported, between)


@torch.no_grad()
def _spread(model: Any) -> None:
    """Make the logits as far apart as a trained model's, so that a cap or scale has an effect."""
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "weight", None), Tensor):
        head.weight.mul_(0.5 / head.weight.std().clamp(min=1e-6))


def _train(cfg: BackboneConfig, dtype: str) -> tuple[Backbone, Tensor]:
    """Load, compare the reference loss with the plain model's, train a head. Returns: the backbone and W [V, D]."""
    width, context, vocabulary = load_shape(cfg)
    check(context is None or context >= BLOCK, f"its context is {context}")
    backbone = Backbone.load(cfg, block_size=BLOCK)
    shape = (backbone.hidden_size, backbone.vocab_size)
    check(shape == (width, vocabulary), f"its config says {(width, vocabulary)}, its head is {shape}")
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(2, min(VOCABULARY, backbone.vocab_size), (BATCH, BLOCK + 1), generator=g)
    h = backbone(ids[:, :-1]).flatten(0, 1)
    y = ids[:, 1:].flatten()
    with torch.no_grad():
        logits = load_model(cfg)(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1).float()
    want, got = F.cross_entropy(logits, y).item(), full_head_loss(h, backbone.head, y).item() / len(y)
    near = 1e-5 if dtype == "float32" else 2e-2
    check(abs(got - want) < near * max(1.0, want), f"its reference loss is {got:.6f}, the plain model's {want:.6f}")
    bank = HeadBank([HeadKey(RANK, 1e-2, 0)], backbone.vocab_size, backbone.hidden_size, "reference")
    g = torch.Generator().manual_seed(4)
    A, B = torch.randn(backbone.vocab_size, RANK, generator=g), torch.randn(RANK, backbone.hidden_size, generator=g)
    bank[bank.keys[0]].set(A / RANK, B / backbone.hidden_size**0.5)
    optimizer = build_optimizer(bank, OptimConfig(weight_decay=0.0))
    losses = []
    for _ in range(STEPS):
        bank.zero_gradients()
        losses.append(float(bank.accumulate(h, y, bank.cast(backbone.dtype), 1 / len(y))) / len(y))
        bank.finish_gradients()
        optimizer.step()
    check(losses[-1] < losses[0], f"a head does not learn: {losses[0]:.4f} to {losses[-1]:.4f}")  # false for NaN
    A, B = (t.detach() for t in bank.factors(bank.keys[0]))
    return backbone, A.float() @ B.float()


def _export(cfg: BackboneConfig, backbone: Backbone, W_VD: Tensor, part: Path) -> None:
    model = load_model(cfg)
    dtype = next(name for name, d in DTYPES.items() if d == backbone.dtype)
    seen = see(model, backbone, dtype)
    write_dense(model, backbone, W_VD, fresh=lambda: load_model(cfg), part=part)
    check_same(read_back(part, seen, attention=None, code=False), W_VD, seen)


def _between(backbone: Backbone) -> str:
    head = backbone.head
    parts = [f"scale {head.scale:.4g}"] if head.scale != 1 else []
    parts += [f"cap {head.softcap:g}"] if head.softcap else []
    parts += ["bias"] if head.bias_V is not None else []
    parts += ["cut"] if backbone.vocab_size < len(backbone.lm_head.weight) else []
    return ", ".join(parts)


def _short(error: Exception) -> str:
    """An error as a cell of the table: without names of models and folders."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    text = re.sub(r"backbone(\.path=)? ?\S*: |family \S+ |/tmp/\S+", "", " ".join(text.split()))
    text = re.sub(r"moves earlier hidden states by .*", "moves earlier hidden states", text)
    return text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " …"


def table(outcomes: list[Outcome]) -> str:
    """The page docs/families.md."""
    good = sum(o.float32 == SUPPORTED for o in outcomes)
    untried = sum(o.float32.startswith(UNTRIED) for o in outcomes)
    lines = [
        "# Families of backbones",
        "",
        "<!-- Written by `python -m bottleneck.serve.families --write docs/families.md`; do not edit. -->",
        "",
        f"Transformers {transformers.__version__} maps {len(outcomes)} model types to a causal LM. Each was tried with "
        "a tiny random model: loaded as a backbone in float32 and bfloat16, its reference loss compared with the plain "
        "model's, a head trained on it, exported as a dense model, loaded again and compared. "
        f"{good} are supported, {untried} could not be tried (their config cannot be shrunk, or a package they need is "
        "not installed), the others are refused on loading, for the reason given. *Between* is the measured map from "
        "the product h Wᵀ to the logits of the tried model.",
        "",
        "| model_type | float32 | bfloat16 | dense export | between |",
        "| --- | --- | --- | --- | --- |",
        *(o.row() for o in outcomes),
    ]
    return "\n".join(lines) + "\n"


def _walk(family: str) -> Outcome:
    """`walk` in a folder of its own, without the libraries' warnings; also in a worker process."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return walk(family, Path(folder))


def walk_all(families: Iterable[str], processes: int = 1) -> Iterator[Outcome]:
    """The outcomes of some families, in alphabetical order, as they are found."""
    if processes == 1:
        yield from map(_walk, sorted(families))
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_walk, sorted(families), chunksize=4)


def main(argv: Optional[list[str]] = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bottleneck.serve.families", description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types (default: all)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    args = parser.parse_args(argv)
    outcomes = []
    for outcome in walk_all(args.families or FAMILIES, cores()):
        outcomes.append(outcome)
        print(outcome.row(), flush=True)
    if args.write:
        write_atomic(args.write, lambda part: part.write_text(table(outcomes), encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Variants of the low-rank kernels that were considered, beside the kernels as they are, on the same tensors.

Each replaces a line of `losses.kernels` in a temporary copy: the comparison of every tile with its targets, and a share
of the exponentials by a polynomial on the FMA units (as FlashAttention-4 has it), of relative error 1.1e-4.

Dims: N tokens, R rank, V vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from bottleneck.benchmark.clock import seconds
from bottleneck.benchmark.heads import as_graph, ours, random_case, whole_numbers
from bottleneck.benchmark.table import Row, row
from bottleneck.core.errors import check

NAME = "variants"
EXPONENTIAL = "tl.exp2(s * LOG2E - base[:, None])"
IN_FEW_TILES = "if tl.max(((y >= v0) & (y < v0 + BV)).to(tl.int32), 0) > 0:"
# 2^x for -126 <= x <= 0: x = n + f with |f| <= 1/2, a cubic in f, and n added to the exponent
CUBIC = """ {{ .reg .f32 x, t, f, p; .reg .b32 i, j;
max.f32 x, ${x}, 0fC2FC0000; add.rn.f32 t, x, 0f4B400000; sub.rn.f32 f, t, 0f4B400000; sub.rn.f32 f, x, f;
fma.rn.f32 p, f, 0f3D61502B, 0f3E7805AF; fma.rn.f32 p, p, f, 0f3F317AFC; fma.rn.f32 p, p, f, 0f3F800000;
mov.b32 i, t; shl.b32 i, i, 23; mov.b32 j, p; add.s32 i, i, j; mov.b32 ${out}, i; }}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--repeats", type=int, default=20)


def run(args: argparse.Namespace) -> list[Row]:
    check(torch.cuda.is_available(), "benchmark variants: needs a CUDA GPU")
    from bottleneck.losses import fused

    rows, own = [], fused.kernels
    for R in whole_numbers("--ranks", args.ranks):
        c = random_case(args.tokens, 768, R, args.vocab, "cuda")
        with tempfile.TemporaryDirectory() as folder:
            for name, module in _variants(own, Path(folder)):
                fused.kernels = module
                times = seconds(as_graph(ours(c, "fused")), "cuda", args.repeats)
                rows.append(row(NAME, f"V={args.vocab} r={R}", name, times))
        fused.kernels = own
    return rows


def polynomial(pack: int) -> str:
    """Inline assembly for `pack` exponentials, the last of them by the cubic."""
    fast = " ".join(f"ex2.approx.ftz.f32 ${i}, ${pack + i};" for i in range(pack - 1))
    return fast + CUBIC.format(x=2 * pack - 1, out=pack - 1)


def _variants(own: ModuleType, folder: Path) -> Iterator[tuple[str, ModuleType]]:
    yield "as it is", own
    source = Path(str(own.__file__)).read_text(encoding="utf-8")
    yield "every tile compared", _changed(source, folder / "compared.py", IN_FEW_TILES, "if BV > 0:")
    for pack in (8, 4):
        operands = ",".join(["=f"] * pack + ["f"] * pack)
        call = (
            f"tl.inline_asm_elementwise(ASM, {operands!r}, [s * LOG2E - base[:, None]], "
            f"dtype=tl.float32, is_pure=True, pack={pack})"
        )
        text = source.replace("LOG2E =", f"ASM = tl.constexpr({polynomial(pack)!r})\nLOG2E =", 1)
        yield f"1 of {pack} exponentials by the cubic", _changed(text, folder / f"cubic{pack}.py", EXPONENTIAL, call)


def _changed(source: str, path: Path, old: str, new: str) -> ModuleType:
    check(old in source, f"benchmark variants: {old} is no longer in losses/kernels.py")
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

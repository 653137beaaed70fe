"""The head's step inside vLLM: the dense head of a model against the two matrices of `--form serve`.

    OMP_NUM_THREADS=1 .venv/vllm/bin/python -m bottleneck.benchmark vllm --shape pythia-160m

Runs in vLLM's Python. vLLM loads a model of the shape with random weights and one layer, once with its own head and
once for each rank; timed is its `compute_logits`. Before every call the caches are filled with other numbers, as the
body of a whole model fills them.

Dims: N sequences, D hidden size, R rank, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bottleneck.backbone.model import Backbone
from bottleneck.benchmark import shapes
from bottleneck.benchmark.decode import SWEPT
from bottleneck.benchmark.table import Row, row
from bottleneck.core.errors import UserError, check
from bottleneck.serve.served import write_served

NAME = "vllm"
WARM_UP = 3
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is then in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--shape", default="pythia-160m", help=f"one of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: a quarter and an eighth of the hidden size")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="sequences decoded side by side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=20)


def run(args: argparse.Namespace) -> list[Row]:
    """One row per batch and head; the note has the dense head's median time divided by this one's."""
    s = shapes.shape(args.shape)
    ranks = args.ranks or [s.hidden // 4, s.hidden // 8]
    check(all(0 < r <= s.hidden for r in ranks), f"--ranks: allowed are 1 to {s.hidden}, the hidden size")
    check(min(*args.batch, args.repeats) > 0, "--batch, --repeats: allowed are whole numbers from 1")
    os.environ.update(SETTINGS)
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise UserError("benchmark vllm: runs in a Python with vLLM, such as .venv/vllm/bin/python") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    with tempfile.TemporaryDirectory() as name:
        # all before the first engine, which changes Transformers' classes
        folders = {rank: _folder(args.shape, rank, Path(name) / str(rank)) for rank in (None, *ranks)}
        for rank, folder in folders.items():
            found[rank] = _seconds(folder, s.hidden, args.batch, dtype=args.dtype, repeats=args.repeats)
    rows = []
    for N in args.batch:
        case, dense = f"{args.shape} V={s.vocab} d={s.hidden} batch={N}", statistics.median(found[None][N])
        for rank, times in found.items():
            label = f"{'dense' if rank is None else f'r={rank}'} {args.dtype}"
            note = "" if rank is None else f"{dense / statistics.median(times[N]):.2f} x dense"
            rows.append(row(NAME, case, label, times[N], device=device, note=note))
    return rows


@torch.no_grad()
def _folder(shape: str, rank: int | None, folder: Path) -> Path:
    """A model with random weights and one layer; None: with its own head."""
    model = shapes.random_backbone(shape, "cpu", layers=1)
    if rank is None:
        model.save_pretrained(folder)
    else:
        backbone = Backbone(model, shape)
        V, D = backbone.vocab_size, backbone.hidden_size
        write_served(model, backbone, (torch.randn(V, rank), torch.randn(rank, D)), fresh=lambda: None, part=folder)
    shapes.save_tokenizer(folder)
    return folder


def _seconds(folder: Path, hidden: int, batches: list[int], *, dtype: str, repeats: int) -> dict[int, list[float]]:
    """Seconds of each call by batch; on a CPU those of the processor, so that other processes do not count."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(str(folder), dtype=dtype, max_model_len=64, enforce_eager=True, gpu_memory_utilization=0.2)

    def measure(model: Any) -> dict[int, list[float]]:
        weight = next(model.parameters())
        others = torch.ones(SWEPT // 4, device=weight.device)
        clock = time.process_time if weight.device.type == "cpu" else time.perf_counter
        times: dict[int, list[float]] = {}
        for N in batches:
            h_ND = torch.randn(N, hidden, device=weight.device, dtype=weight.dtype)
            for i in range(WARM_UP + repeats):
                others.add_(1)
                _wait()
                began = clock()
                model.compute_logits(h_ND)
                _wait()
                if i >= WARM_UP:
                    times.setdefault(N, []).append(clock() - began)
        return times

    with torch.inference_mode():
        (times,) = engine.apply_model(measure)
    del engine
    cleanup_dist_env_and_memory()
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Results of a benchmark: rows with percentiles, hardware and versions, as a table on the terminal and as CSV."""

from __future__ import annotations

import csv
import datetime
import io
import platform
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
from rich.console import Console
from rich.table import Table

from bottleneck.core.environment import commit, cores, versions
from bottleneck.core.files import write_atomic

PACKAGES = ("bottleneck", "torch", "transformers", "triton", "datasets", "tokenizers")


@dataclass
class Row:
    """One case of one implementation. `p20`, `p50` and `p80` are percentiles over the repeats, in `unit`."""

    benchmark: str
    case: str
    implementation: str
    p20: float
    p50: float
    p80: float
    unit: str = "s"
    throughput: Optional[float] = None  # at p50, in throughput_unit
    throughput_unit: str = ""
    peak_mib: Optional[float] = None  # most memory in use, in MiB: of the device, or of the process and its children
    device: str = "cpu"  # cpu | cuda: the hardware that the row names
    loss_error: Optional[float] = None  # relative to float32, if the benchmark also compares results
    dA_error: Optional[float] = None
    dB_error: Optional[float] = None
    note: str = ""
    slowed: str = ""  # which GPUs were slowed down by heat or a lack of power, if any were


def row(
    benchmark: str,
    case: str,
    implementation: str,
    seconds: list[float],
    amount: Optional[float] = None,
    what: str = "",
    **more: Any,
) -> Row:
    """A row from the seconds of its repeats; one repeat processes `amount` of `what` (such as tokens)."""
    p20, p50, p80 = (float(p) for p in np.percentile(seconds, [20, 50, 80]))
    rate = (amount / p50, f"{what}/s") if amount is not None else (None, "")
    return Row(benchmark, case, implementation, p20, p50, p80, "s", *rate, **more)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of wall-clock time, and the result of the work."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def hardware(device: str = "cpu") -> str:
    """Model and number of cores of the CPU, or name of the GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            model,
        )
    return f"{model}, {cores()} cores"


def measured_with() -> dict[str, str]:
    """Versions, commit (with + if files were changed since) and date: the same for all rows of a run."""
    return versions(PACKAGES) | {
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def _records(rows: list[Row]) -> list[dict[str, Any]]:
    about = measured_with()
    return [asdict(r) | {"hardware": hardware(r.device)} | about for r in rows]


def write_csv(rows: list[Row], path: Path) -> None:
    """Write every row with hardware, versions, commit and date. Raises OSError, and leaves no file in that case."""
    columns = [f.name for f in fields(Row)] + ["hardware", *measured_with()]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_records(rows))
    write_atomic(path, lambda part: part.write_text(text.getvalue()))


def show(rows: list[Row], console: Console) -> None:
    """The rows as a table, below it hardware and versions, and a warning if a GPU was slowed down."""
    about = {k: v for k, v in measured_with().items() if v}
    places = "; ".join(sorted({hardware(r.device) for r in rows}))
    table = Table(
        title=", ".join(dict.fromkeys(r.benchmark for r in rows)),
        caption=f"{places}; {', '.join(f'{k} {v}' for k, v in about.items())}",
        caption_justify="left",
    )
    for name in ("case", "implementation"):
        table.add_column(name)
    compared = any(r.dA_error is not None for r in rows)
    rated, peaked = any(r.throughput is not None for r in rows), any(r.peak_mib is not None for r in rows)
    measured = ["p50 (p20 to p80)", *["throughput"] * rated, *["peak MiB"] * peaked]
    for name in measured + ["error: loss", "dA", "dB"] * compared:
        table.add_column(name, justify="right")
    noted = any(r.note for r in rows)
    if noted:
        table.add_column("")
    times = [r.p50 for r in rows if r.unit == "s"]
    short = len(times) == len(rows) > 0 and (max(times) < 1 or (min(times) < 0.01 and max(times) < 10))
    scale, unit = (1e3, "ms") if short else (1.0, "")
    for r in rows:
        p20, p50, p80 = (f"{value * scale:.4g}" for value in (r.p20, r.p50, r.p80))
        rate = "" if r.throughput is None else f"{r.throughput / 1e6:,.3f}M {r.throughput_unit}"
        errors = ["" if e is None else f"{e:.1e}" for e in (r.loss_error, r.dA_error, r.dB_error)]
        time_ = f"{p50} {unit or r.unit} ({p20} to {p80})"
        table.add_row(
            r.case,
            r.implementation,
            time_,
            *[rate] * rated,
            *["" if r.peak_mib is None else f"{r.peak_mib:,.0f}"] * peaked,
            *errors * compared,
            *[r.note] * noted,
        )
    console.print(table)
    for line in dict.fromkeys(r.slowed for r in rows if r.slowed):
        console.print(f"warning: {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)

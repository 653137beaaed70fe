"""Notice GPUs that heat or a lack of power slows down during a benchmark: their times are too long, in silence."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from typing import NamedTuple, Optional

from bottleneck.core.errors import check

# bits of NVML's nvmlClocksEventReasons; the power cap, 0x4, is normal at full load
REASONS = {
    0x08: "HW slowdown",
    0x20: "SW thermal slowdown",
    0x40: "HW thermal slowdown",
    0x80: "HW power brake",
}
FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second is of older drivers
EVERY = 5.0  # seconds between two readings
PATIENCE = 10.0  # seconds for nvidia-smi, which can hang if a card is broken


_watched: list[list[Reading]] = []  # what the blocks that are running now have read


class Reading(NamedTuple):
    """State of a GPU at one moment: its number, temperature in degrees C, clock of its multiprocessors in MHz, and the
    bits of the reasons for that clock."""

    gpu: int
    uuid: str
    temperature: int
    clock: int
    reasons: int


@contextlib.contextmanager
def watch() -> Iterator[list[Reading]]:
    """Read the state of the visible GPUs at the start of the block, every few seconds, and at its end.

    The list that it yields fills while the block runs. It stays empty without a GPU or `nvidia-smi`. A reading is a
    process of its own; this one loses a few milliseconds while it is started.
    """
    readings: list[Reading] = []
    _watched.append(readings)
    over = threading.Event()
    thread = threading.Thread(target=_read_until, args=(over, readings), daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        over.set()
        thread.join()
        _watched.pop()


def check_times(what: str) -> None:
    """Raise UserError if a GPU was slowed so far: times that others rely on, such as `what`, are then not written."""
    now = visible(_ask(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    said = warning([r for readings in [*_watched, now] for r in readings])
    check(not said, f"{what}: not written, {said}; run it again when the card is cool")


def warning(readings: list[Reading]) -> str:
    """Return a sentence that names the slowed GPUs, their temperatures and clocks; "" if none was slowed."""
    said = []
    for gpu in sorted({r.gpu for r in readings}):
        own = [r for r in readings if r.gpu == gpu]
        slowed = [r for r in own if any(r.reasons & bit for bit in REASONS)]
        if not slowed:
            continue
        why = ", ".join(name for bit, name in REASONS.items() if any(r.reasons & bit for r in slowed))
        low, high = (pick(r.clock for r in slowed) for pick in (min, max))
        clocks = f"{low} to {high}" if low < high else f"{low}"
        hottest = max(r.temperature for r in slowed)
        said.append(f"GPU {gpu} in {len(slowed)} of {len(own)} readings ({why}; {hottest} °C, {clocks} MHz)")
    return f"the times are too long, because the hardware was slowed down: {'; '.join(said)}" if said else ""


def _read_until(over: threading.Event, readings: list[Reading]) -> None:
    while True:
        last = over.is_set()
        readings += visible(_ask(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        if last or not readings:
            return
        over.wait(EVERY)


def visible(readings: list[Reading], devices: Optional[str]) -> list[Reading]:
    """Return the readings of the GPUs that CUDA_VISIBLE_DEVICES selects, by index or by the start of their UUID.

    As in CUDA, a word that names no GPU hides those after it.
    """
    if devices is None:
        return readings
    found: list[Reading] = []
    for word in (w.strip() for w in devices.split(",")):
        named = [r for r in readings if str(r.gpu) == word or (word.startswith("GPU-") and r.uuid.startswith(word))]
        if not named:
            break
        found += named
    return found


def _ask() -> list[Reading]:
    """Return one reading of each GPU of the machine; nothing if `nvidia-smi` is missing or does not answer."""
    for field in FIELDS:
        query = f"--query-gpu=index,uuid,temperature.gpu,clocks.sm,{field}"
        try:
            done = subprocess.run(
                ["nvidia-smi", query, "--format=csv,noheader,nounits"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE,
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        if done.returncode == 0:
            return _parse(done.stdout)
    return []


def _parse(text: str) -> list[Reading]:
    """Return the readings in lines of `nvidia-smi`, none of a line that lacks a number, such as that of a lost card."""
    readings = []
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]
        with contextlib.suppress(ValueError):
            index, uuid, temperature, clock, reasons = words
            readings.append(Reading(int(index), uuid, int(temperature), int(clock), int(reasons, 16)))
    return readings

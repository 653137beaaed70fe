"""How much memory a head step may take on a GPU beyond its inputs and gradients: `head.loss_memory`.

At high ranks a step holds a chunk of V-wide rows. Few large chunks are faster, because each chunk adds to all of dA in
float32. The number of chunks decides the order of that sum, and so the last bits of a run. The number of bytes is
therefore decided once, by the card and not by the number of heads, and is stored with the run.
"""

from __future__ import annotations

import functools

import torch

SHARE = 32  # auto: one part in 32 of the card's memory, 2.5 GiB of 80 GB
FREE_SHARE = 4  # but at most a quarter of what is free once the bank is built, halved until it fits
LEAST = 256 << 20  # bytes, below which auto does not go
BEFORE = 240 << 20  # bytes, in runs that began before the key existed


@functools.cache
def of_card(device: torch.device) -> int:
    """Return the bytes that auto asks for on a device; 0 on a CPU, where the cache size decides the chunks."""
    if device.type != "cuda":
        return 0
    total = torch.cuda.get_device_properties(device).total_memory
    return max(LEAST, total // SHARE >> 20 << 20)


def decide(device: torch.device, setting: str | int) -> int:
    """Return the bytes for `head.loss_memory` on a device, given what is free there now: the least of all processes.

    Args: setting: auto, or a number of bytes, which is returned as it is.
    """
    if setting != "auto":
        return int(setting)
    wanted = _free_to_take(device)
    if torch.distributed.is_initialized():
        least = torch.tensor(wanted, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        wanted = int(least)
    return wanted


def _free_to_take(device: torch.device) -> int:
    wanted = of_card(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        while wanted > max(LEAST, free // FREE_SHARE):
            wanted = max(LEAST, wanted // 2)
    return wanted

"""Which version of the code this is, and what it runs on."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from typing import Any, Iterable

import torch

from bottleneck.core.paths import ROOT


@functools.cache
def commit() -> str:
    """Short hash of the git commit, followed by + if tracked files have changed since; "" without git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):  # no git, or an installed copy
        return ""


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of each package; "" if it is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and kind of machine, as results record them. Nothing in it names a person or a place."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        **versions(("bottleneck", "torch", "transformers", "pytorch-lightning")),
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        "device": kind,
    }

"""Which code this is."""

from __future__ import annotations

import functools
import subprocess

from bottleneck.config import ROOT


@functools.cache
def commit() -> str:
    """Short hash of the git commit, + where tracked files were changed since; "" without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or an installed copy
        return ""

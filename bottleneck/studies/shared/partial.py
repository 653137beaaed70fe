"""Partial results of a study, so that a study that was interrupted resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Callable, Optional

from bottleneck.core.errors import UserError
from bottleneck.core.files import write_atomic
from bottleneck.core.held_log import write_held_logs
from bottleneck.studies.shared.output import SCHEMA, plain


class PartialResults:
    """Results of single checkpoints or heads, one file each, in FOLDER/NAME.parts.

    Args:
        identity: everything besides its key that a result depends on; results with another identity are refused.
    """

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]):
        self.folder, self.name = folder / f"{name}.parts", name
        self.identity = json.loads(json.dumps(plain({"schema": SCHEMA, **identity}), sort_keys=True))

    def _path(self, key: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9.@-]+", "-", key.split()[0])[-60:].lstrip("-.")
        return self.folder / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"

    def get(self, key: str) -> Optional[dict[str, Any]]:
        """The stored result, or None. Raises: UserError for a damaged file and for one computed with other settings."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text())
            identity, content = stored["identity"], stored["content"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: damaged ({reason}); delete it, and it is computed again") from error
        differs = sorted(k for k in identity.keys() | self.identity.keys() if identity.get(k) != self.identity.get(k))
        if differs:
            k = differs[0]
            raise UserError(
                f"{path}: was computed with {k} {identity.get(k)}, now it is {self.identity.get(k)}; "
                f"give another hydra.run.dir, or delete {self.folder}"
            )
        return content

    def put(self, key: str, content: dict[str, Any]) -> dict[str, Any]:
        """Store a result. Returns: the result as `get` will return it."""
        content = plain(content)
        raw = json.dumps({"key": key, "identity": self.identity, "content": content}, allow_nan=False).encode()
        write_held_logs()  # with a first result the study is accepted
        write_atomic(self._path(key), lambda part: part.write_bytes(raw))
        return content

    def get_or(self, key: str, compute: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """The stored result, else the computed one, stored. Returns: the result, and whether it was stored before."""
        stored = self.get(key)
        return (stored, True) if stored is not None else (self.put(key, compute()), False)

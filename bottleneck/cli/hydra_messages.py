"""Turn errors of Hydra and OmegaConf into one line. Their messages take several lines and do not name our keys.

Hydra has no error codes, so this module matches the text of its messages. tests/config/test_config.py raises each error
through Hydra and fails if a new version words it differently.
"""

from __future__ import annotations

import re

from hydra.errors import HydraException, OverrideParseException

from bottleneck.cli.quoting import unreadable
from bottleneck.config.schema import unknown_key


def explain(error: BaseException) -> str:
    """One line that says what is wrong, where, and what is allowed."""
    return " ".join(_explain(error).split())


def _explain(error: BaseException) -> str:
    if isinstance(error, OverrideParseException):
        return unreadable(error.override, str(error).split("See https")[0].strip())
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    found = _known("\n".join(chain))
    if found is not None:
        return found
    if not isinstance(error, HydraException):
        return chain[-1]
    merging = len(chain) > 1 and "merging override" in chain[0]
    return f"{chain[0]}: {chain[-1].splitlines()[0]}" if merging else chain[0]


def _known(text: str) -> str | None:
    """The one-line message for a known error, or None. `text` holds the messages of the error and of its causes."""
    if "Could not override 'study'" in text:
        return "study: is for python -m bottleneck.study, which computes the paper's other figures"
    if "hydra/launcher/submitit" in text:
        return "hydra/launcher: Slurm's launcher is not installed; pip install -e '.[slurm]' (hydra-submitit-launcher)"
    unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in '\w+')[\s\S]*?full_key: (\S+)", text)
    unknown = unknown or re.search(r"Could not override '(([^']+))'[\s\S]*append to your config", text)
    if unknown:
        return unknown_key(unknown.group(2).lstrip("+~"))
    pattern = r"(Value '[^\n]+|Cannot convert [^\n]+|[^\n]*could not be converted[^\n]*)\n[\s\S]*?full_key: (\S+)"
    value = re.search(pattern, text)
    if value:
        return f"{value.group(2)}: {value.group(1).strip()}"
    inner = re.search(r"UserError raised while resolving interpolation: ([^\n]+)", text)
    if inner:
        return inner.group(1)
    pattern = r"Could not find '([^']+)'\s*(?:Available options in '[^']+':\s*([\s\S]*?))?(?:\n\n|Config search path|$)"
    missing = re.search(pattern, text)
    if missing:
        group, _, name = missing.group(1).rpartition("/")
        options = " ".join((missing.group(2) or "").split())
        return f"{group}={name}: no such choice; allowed are {options or 'the files in conf/' + group}"
    return None

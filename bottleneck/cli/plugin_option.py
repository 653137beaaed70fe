"""`plugin=PATH` on the command line: import the plugin, and search its folder `conf`, before Hydra composes the config.

Hydra composes before it runs any code of the command, but a plugin may bring choices such as `head=NAME`. So the option
is read from the command line first. The composed config carries it as the key `plugin`, from which workers and cluster
jobs load it (`config.checks`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Sequence

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin

from bottleneck.core import plugins

OPTION = re.compile(r"\+{0,2}(plugin=.*)", re.DOTALL)
_paths: list[str] = []


class PluginFolders(SearchPathPlugin):
    """Puts the `conf` folders of the loaded plugins on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry in plugins.search_path(_paths):
            search_path.append("plugin", entry)


def load_plugins(words: Sequence[str]) -> list[str]:
    """Load the plugins that a command line names and those of installed packages.

    Args: words: of the command line, such as `plugin=mine.py`, `+plugin=mine.py`, `plugin=[a.py,folder]`.
    Returns: the words for Hydra: `plugin` is a key of the config, so a `+` before it goes, and its paths are absolute.
    Raises: UserError where a plugin does not exist or does not import.
    """
    out: list[str] = []
    given: list[str] = []
    for word in words:
        match = OPTION.fullmatch(word)
        try:
            value = OverridesParser.create().parse_override(match.group(1)).value() if match else None
        except OverrideParseException:
            value = None  # Hydra reports it
        named = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        paths = [str(Path(str(p)).expanduser().absolute()) for p in named]
        given += paths
        out.append(f"plugin=[{','.join(map(_quoted, paths))}]" if paths else word)
    plugins.load(given)
    plugins.load_installed()
    _paths[:] = given
    if PluginFolders not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(PluginFolders)
    return out


def _quoted(path: str) -> str:
    text = path.replace('"', '\\"')
    return f'"{text}"'

"""`plugin=PATH` on the command line: import the plugin and add its folder `conf` to Hydra's search path.

Hydra composes the config before it runs any code of the command, but a plugin may add choices such as `head=NAME`.
Therefore the option is read from the command line first. The composed config keeps it as the key `plugin`, from which
worker processes and cluster jobs load the plugin (`config.checks`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Sequence

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin

from bottleneck.cli.quoting import check_choices, unreadable
from bottleneck.config.literal import in_quotes
from bottleneck.core import plugins
from bottleneck.core.errors import UserError

OPTION = re.compile(r"\+{0,2}(plugin=.*)", re.DOTALL)
_paths: list[str] = []


class PluginFolders(SearchPathPlugin):
    """Puts the `conf` folders of the loaded plugins on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry in plugins.search_path(_paths):
            search_path.append("plugin", entry)


def load_plugins(words: Sequence[str]) -> list[str]:
    """Load the plugins named on a command line and those of installed packages.

    Args: words: the command line's arguments, such as `plugin=mine.py`, `+plugin=mine.py`, `plugin=[a.py,folder]`.
    Returns: the arguments for Hydra. `plugin` is a key of the config, so a `+` before it is removed; paths become
        absolute.
    Raises: UserError if a plugin does not exist or cannot be imported, or if a choice of a group is not a name.
    """
    out: list[str] = []
    given: list[str] = []
    for word in words:
        match = OPTION.fullmatch(word)
        paths = [str(Path(p).expanduser().absolute()) for p in _named(match.group(1))] if match else []
        given += paths
        out.append(f"plugin=[{','.join(map(in_quotes, paths))}]" if paths else word)
    check_choices(out)
    plugins.load(given)
    plugins.load_installed()
    _paths[:] = given
    if PluginFolders not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(PluginFolders)
    return out


def _named(option: str) -> list[str]:
    """The paths that `plugin=…` names; none where the value is no path."""
    try:
        value = OverridesParser.create().parse_override(option).value()
    except HydraException as error:
        path = option.partition("=")[2]
        if Path(path).expanduser().exists():  # a path that Hydra reads only in quotes, such as one with an apostrophe
            return [path]
        raise UserError(unreadable(option, " ".join(str(error).split("See https")[0].split()))) from error
    if isinstance(value, list):
        return [str(p) for p in value]
    return [value] if isinstance(value, str) else []

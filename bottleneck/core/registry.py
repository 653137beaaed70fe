"""Registries: name -> one declared object. Checks, defaults, plots, help and docs read them instead of lists of names.

A registry belongs to a folder of the package, for example `bottleneck/heads/starts`: every module in it declares its
objects with `register` when it is imported, and the registry imports them all when it is first read. So an extension is
one file. Plugins (`bottleneck.core.plugins`) call the same `register`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from bottleneck.core import plugins
from bottleneck.core.errors import check


class Declared(Protocol):
    """What every declared object has: the name it is chosen by, and one line of help."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...


T = TypeVar("T", bound=Declared)


class Registry(Generic[T]):
    """The declared objects of one kind, by name.

    Args:
        key: the config key that chooses one, for messages: `head.init`.
        noun: what one is called: `start`.
        package: dotted name of the folder whose modules declare the built-in ones.
    """

    def __init__(self, key: str, noun: str, package: str):
        self.key, self.noun, self.package = key, noun, package
        self._items: dict[str, T] = {}
        self._state = "unread"

    def register(self, item: T) -> T:
        """Declare an object. Raises ValueError where the name is taken by another one."""
        known = self._items.get(item.name)
        if known is not None and known != item:
            raise ValueError(f"{self.key}: the {self.noun} {item.name!r} is declared twice")
        self._items[item.name] = item
        return item

    def _read(self) -> None:
        if self._state != "unread":
            return
        self._state = "reading"  # a module that is imported here may look something up itself
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        plugins.load_installed()
        self._state = "read"

    def names(self) -> tuple[str, ...]:
        """Every name, sorted."""
        self._read()
        return tuple(sorted(self._items))

    def __iter__(self) -> Iterator[T]:
        return (self._items[name] for name in self.names())

    def __contains__(self, name: object) -> bool:
        self._read()
        return name in self._items

    def __getitem__(self, name: str) -> T:
        """The object of a name. Raises UserError with the allowed names if there is none."""
        self._read()
        known = name in self._items
        check(known, f"{self.key}={name}: no such {self.noun}; allowed are {', '.join(self.names())}")
        return self._items[name]

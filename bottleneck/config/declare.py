"""Declare config keys with their types, defaults and one sentence each; derive the classes that Hydra composes with.

A schema is a frozen dataclass with real types: `Literal`, unions, lists. OmegaConf accepts neither `Literal` nor unions
with lists (omegaconf 2.3), so `composable` derives a mutable dataclass of the same keys in OmegaConf's types. Hydra
composes that one; once the checks have passed, `freeze` turns it into the schema and compares every value with its
declared type.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
import typing
from typing import Any, Literal, Optional, TypeVar, Union

from bottleneck.core.errors import check

T = TypeVar("T")


def key(default: Any, sentence: str, *, read: Any = None, registry: str = "") -> Any:
    """Declare a key of a config: its default and what it means.

    Args:
        read: type under which Hydra reads it, where the command line may give another form than the schema holds:
            `Any` for counts (150e6 stands for 150000000) and for lists that may be given as a single value.
        registry: name of the registry in `core.extensions` that holds the allowed values.
    """
    meta = {"sentence": sentence, "read": read, "registry": registry}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def group(schema: type) -> Any:
    """Declare a group of keys: a schema inside a schema."""
    return dataclasses.field(default_factory=schema)


def composable(schema: type) -> type:
    """The class that Hydra composes `schema` with: mutable, the same keys, types that OmegaConf accepts.

    It is added to the module of `schema` as NAMENode so that pickle finds it: composed configs are sent to workers.
    """
    name, module = f"{schema.__name__.removesuffix('Config')}Node", sys.modules[schema.__module__]
    if hasattr(module, name):
        return getattr(module, name)
    hints = typing.get_type_hints(schema)
    fields: list[Any] = []
    for f in dataclasses.fields(schema):
        read = f.metadata.get("read") or _composed_type(hints[f.name])
        inner = hints[f.name]
        factory = read if dataclasses.is_dataclass(inner) else f.default_factory
        default = {"default": f.default} if factory is dataclasses.MISSING else {"default_factory": factory}
        fields.append((f.name, read, dataclasses.field(**default)))
    node = dataclasses.make_dataclass(name, fields, namespace={"__doc__": schema.__doc__})
    node.__module__ = schema.__module__  # workers unpickle configs by this name; from Python 3.12 on it would be ours
    setattr(module, name, node)
    return node


def _composed_type(hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return composable(typing.cast(type, hint))
    if origin is Literal:
        return str if all(isinstance(a, str) for a in args) else Any
    if origin in (Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        return Optional[_composed_type(inner[0])] if len(inner) == 1 and len(args) == 2 else Any
    return Any if origin is dict else hint


def freeze(schema: type[T], composed: Any, prefix: str = "") -> T:
    """`schema` with the values of an instance of its composable class. Raises UserError where a value does not fit."""
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for f in dataclasses.fields(typing.cast(Any, schema)):
        value, hint, name = getattr(composed, f.name), hints[f.name], f"{prefix}{f.name}"
        if dataclasses.is_dataclass(hint):
            values[f.name] = freeze(typing.cast(type, hint), value, f"{name}.")
            continue
        check(fits(hint, value), f"{name}={value}: must be {'one of ' * (', ' in described(hint))}{described(hint)}")
        values[f.name] = value
    return schema(**values)


def fits(hint: Any, value: Any) -> bool:
    """Whether a value has a declared type. An int is accepted as a float; a bool is not a number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(a, value) for a in args)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is list:
        return isinstance(value, list) and all(fits(args[0], v) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(args[0], k) and fits(args[1], v) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


NAMES = {str: "text", int: "whole number", float: "number", type(None): "null"}


def described(hint: Any) -> str:
    """A declared type in words: `auto, cpu, gpu`; `number, list of number, null`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return ", ".join(described(a) for a in args)
    if origin is Literal:
        return ", ".join(str(a) for a in args)
    if origin is list:
        return f"list of {described(args[0])}"
    if origin is dict:
        return f"{{{described(args[0])}: {described(args[1])}}}"
    if hint is bool:
        return "true, false"
    return NAMES.get(hint, "any value")

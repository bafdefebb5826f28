"""Configurations as plain values: what YAML and JSON hold, and the dataclasses that they stand for.

One way in both directions, for recipes and for saved models, so that a mistake in either is told alike.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from engram_lab.errors import UserError, nearest

Section = TypeVar("Section")


def to_plain(value: Any) -> Any:
    """Return dataclasses and tuples as dicts and lists, all the way down."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def from_plain(cls: type[Section], values: Mapping[str, Any], of: str) -> Section:
    """Build the dataclass `cls`, sections within it included, from plain values.

    Args:
        cls: whose `to_plain` the values are, or a part of it; what is left out takes its default.
        values: by field name.
        of: what the fields are those of, for messages, such as "recipe".

    Raises:
        UserError: a field that does not exist, or a value of the wrong type or range.
    """
    check_names(cls, values, of)
    return _build(cls, values, "")


def check_value(cls: type, dotted: str, value: Any) -> None:
    """Refuse a value that the field `dotted` of `cls`, sections passed through, cannot hold."""
    *path, last = dotted.split(".")
    owner = cls
    for name in path:
        inner = section_of(get_type_hints(owner).get(name))
        if inner is None:
            return  # inside a mapping, which holds anything
        owner = inner
    if last in get_type_hints(owner):
        _read(owner, last, value, dotted.removesuffix(last))


def check_names(cls: type, values: Mapping[str, Any], of: str, prefix: str = "") -> None:
    """Refuse names that no field of `cls` has, with the nearest one, and sections that are no sections."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"unknown {of} field {prefix + str(name)!r}.{nearest(str(name), hints)}")
        section = section_of(hints[name])
        if section is not None and isinstance(value, Mapping):
            check_names(section, value, of, f"{prefix}{name}.")


def field_names(cls: type, prefix: str = "") -> set[str]:
    """Return the dotted names of all fields, sections included; for suggestions."""
    found: set[str] = set()
    for name, hint in get_type_hints(cls).items():
        found.add(prefix + name)
        section = section_of(hint)
        if section is not None:
            found |= field_names(section, f"{prefix}{name}.")
    return found


def section_of(hint: Any) -> type | None:
    """Return the dataclass that a field holds, alone or as `X | None`."""
    for candidate in (hint, *get_args(hint)):
        if isinstance(candidate, type) and is_dataclass(candidate):
            return candidate
    return None


def _build(cls: type[Section], values: Mapping[str, Any], prefix: str) -> Section:
    return cls(**{name: _read(cls, name, value, prefix) for name, value in values.items()})


def _read(cls: type, name: str, value: Any, prefix: str) -> Any:
    """Return what the field `name` of `cls` holds for a plain value."""
    hint = get_type_hints(cls)[name]
    section = section_of(hint)
    if section is not None:
        if isinstance(value, Mapping):
            return _build(section, value, f"{prefix}{name}.")
        optional = NoneType in get_args(hint)
        if value is None and optional:
            return None
        or_null = ", or null" if optional else ""
        raise UserError(f"{prefix}{name} is {value!r}; it must be a section with fields{or_null}.")
    try:
        return _leaf_parser(cast(Hashable, cls)).parse_object({name: value}, defaults=False)[name]
    except (ArgumentError, TypeError, ValueError):
        allowed = get_args(hint) if isinstance(value, str) else ()
        close = nearest(str(value), [choice for choice in allowed if isinstance(choice, str)])
        raise UserError(f"{prefix}{name} is {value!r}; it must be {_spell(hint)}.{close}") from None


@functools.cache
def _leaf_parser(cls: Hashable) -> ArgumentParser:
    """A parser of the fields of one section that are no sections themselves; jsonargparse knows the types."""
    parser = ArgumentParser(exit_on_error=False)
    for name, hint in get_type_hints(cast(type, cls)).items():
        if section_of(hint) is None:
            parser.add_argument(f"--{name}", type=hint)
    return parser


def _spell(hint: Any) -> str:
    """A type in a user's words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_spell(h) for h in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_plural(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        return "a mapping of names to mappings of fields" if get_origin(inner) is dict else "a mapping"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false", NoneType: "null"}.get(
        hint, str(hint)
    )


def _plural(hint: Any) -> str:
    return {int: "integers", float: "numbers", str: "texts"}.get(hint, f"values, each {_spell(hint)}")

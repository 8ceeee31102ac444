"""What the attributes of a `config.json` do: `data/config_attributes.toml`, typed.

The file says of every attribute that a release of `transformers` writes whether a forward pass
depends on it, and what a config without it means. Its head explains the fields.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import msgspec


class Attribute(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One attribute; the fields are explained in the file."""

    versions: str | None = None
    default: str | None = None
    was: str | None = None
    only: str = ""
    read: str | None = None
    why: str = ""

    def neutral(self) -> tuple[Any, ...]:
        """The values of `only`."""
        return tuple(msgspec.json.decode(self.only)) if self.only else ()


class Generation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    names: list[str]


class FamilyTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    used: dict[str, Attribute] = {}
    inert: dict[str, Attribute] = {}


class AttributeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file. base: by group, then by name. families: by `model_type`."""

    transformers: list[str]
    base: dict[str, dict[str, Attribute]]
    generation: Generation
    families: dict[str, FamilyTable]


@functools.cache
def table() -> AttributeTable:
    """The whole file."""
    text = resources.files("qkattr").joinpath("data/config_attributes.toml").read_text("utf-8")
    return msgspec.toml.decode(text, type=AttributeTable)


def used(family: str) -> Mapping[str, Attribute]:
    """What is part of the family's arithmetic, beside `[base.arithmetic]`."""
    return table().families[family].used


@functools.cache
def inert(family: str) -> frozenset[str]:
    """What changes nothing in configs of the family, at any value."""
    return frozenset(n for n, attribute in _unused(family).items() if not attribute.only)


@functools.cache
def fixed(family: str) -> Mapping[str, tuple[Any, ...]]:
    """What changes nothing at some values alone, with these values."""
    return {n: attribute.neutral() for n, attribute in _unused(family).items() if attribute.only}


@functools.cache
def defaults(family: str) -> Mapping[str, Any]:
    """What `used` attributes mean where a config does not have them; None: as if it were null."""
    found = used(family).items()
    return {n: msgspec.json.decode(a.default) for n, a in found if a.default is not None}


def _unused(family: str) -> dict[str, Attribute]:
    """What changes nothing at some or all values."""
    base, own = table().base, table().families[family]
    found = dict.fromkeys(table().generation.names, Attribute())
    for group, attributes in base.items():
        found |= {n: a for n, a in attributes.items() if group != "arithmetic" or a.only}
    return {n: a for n, a in (found | own.inert).items() if n not in own.used}

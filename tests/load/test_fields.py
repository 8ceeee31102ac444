"""Every field of a struct has its line in the docstring: `name: [B, N] meaning`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re

import pytest

import qkattr.config
import qkattr.graph
import qkattr.model
import qkattr.qk
import qkattr.sources
import qkattr.types

ROOMS = (qkattr.model, qkattr.sources, qkattr.qk, qkattr.graph)


def structs() -> list[type]:
    """The dataclasses of the method's rooms, and those on the ground that they share."""
    modules = [qkattr.types, qkattr.config]
    for room in ROOMS:
        for found in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
            modules.append(importlib.import_module(found.name))
    return [
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value)
        and dataclasses.is_dataclass(value)
        and value.__module__ == module.__name__
    ]


@pytest.mark.parametrize("struct", structs(), ids=lambda struct: struct.__qualname__)
def test_every_field_has_its_line(struct):
    text = inspect.getdoc(struct) or ""
    lines = re.findall(r"^([a-z]\w*(?:, \w+)*): \S", text, re.MULTILINE)
    said = [name for line in lines for name in line.split(", ")]
    assert sorted(said) == sorted(f.name for f in dataclasses.fields(struct))


def test_structs_are_found():
    assert len(structs()) > 35

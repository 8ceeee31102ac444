"""Names of a package that are imported when they are first used: some commands need no JAX, and do
not wait for it."""

from __future__ import annotations

import importlib
from typing import Any


def offer(package: dict[str, Any], **homes: str) -> None:
    """Let a package offer names of its modules.

    package: its `globals()`. homes: by module, the names that it has, between blanks.
    """
    found = {name: module for module, names in homes.items() for name in names.split()}
    said = package["__name__"]

    def get(name: str) -> Any:
        if name not in found:
            raise AttributeError(f"module {said!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{said}.{found[name]}"), name)

    package["__all__"] = sorted(found)
    package["__getattr__"] = get
    package["__dir__"] = lambda: sorted({*package, *found})

"""Libraries that are installed only where someone asked for them."""

from __future__ import annotations

import importlib
from types import ModuleType

from qkattr.errors import InputError


def need(library: str, use: str) -> ModuleType:
    """A library, by its name. use: what needs it, as the error has it.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as e:
        raise InputError(f"{use} {library}, which is not installed; pip install {library}") from e

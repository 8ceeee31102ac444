"""qkattr: attribution graphs that explain attention, in JAX.

    bundle = qkattr.load("smollm2", saes)             a model and an SAE after every block
    result = qkattr.trace(bundle, prompt)             features acting on features, and through which heads
    qkattr.qk_attribution(result, layer=, head=, query=, key=)     why a head looked where it did

The pure functions below it take arrays and small frozen structs; `docs/embedding.md` shows them in someone else's code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "InputError": "qkattr.errors",
    "load": "qkattr.load.bundle",
    "Bundle": "qkattr.load.bundle",
    "run": "qkattr.analysis",
    "trace": "qkattr.analysis",
    "qk_attribution": "qkattr.scores",
    "Result": "qkattr.result",
    "open": "qkattr.export.folder",
}

if TYPE_CHECKING:
    from qkattr.analysis import run, trace
    from qkattr.errors import InputError
    from qkattr.export.folder import open_result as open
    from qkattr.load.bundle import Bundle, load
    from qkattr.result import Result
    from qkattr.scores import qk_attribution

__all__ = ["Bundle", "InputError", "Result", "load", "open", "qk_attribution", "run", "trace"]


def __getattr__(name: str):
    """Public names are imported when they are first used: `qkattr --help` should not wait for JAX."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qkattr' has no attribute {name!r}")
    value = getattr(
        importlib.import_module(_PUBLIC[name]), "open_result" if name == "open" else name
    )
    globals()[name] = value
    return value

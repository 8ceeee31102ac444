"""qkattr: attribution graphs that explain attention, in JAX.

    bundle = qkattr.load("smollm2", saes)       a model and an SAE after every block
    result = qkattr.trace(bundle, prompt)       features acting on features, and through which heads
    qkattr.effects(result)                      what the prediction is made of, signed
    qkattr.qk_attribution(result, layer=, head=, query=, key=)     why a head looked where it did
    qkattr.steer(result, None, edits, scales=)  is it true? scale features in the QK circuit only

The pure functions below it take arrays and small frozen structs; `docs/embedding.md` shows them in
someone else's code.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qkattr.version import __version__ as __version__

if TYPE_CHECKING:
    from qkattr.analyses.effects import TargetEffects, effects
    from qkattr.analysis import run, trace
    from qkattr.errors import InputError
    from qkattr.experiments.choose import choose_edits
    from qkattr.experiments.edits import Edit
    from qkattr.experiments.steer import Steering, steer
    from qkattr.export.folder import open_result as open
    from qkattr.load.bundle import Bundle
    from qkattr.load.opening import load
    from qkattr.options import TraceOptions
    from qkattr.result import HeadLoadings, Result
    from qkattr.scores import qk_attribution

#: Where each public name comes from. They are imported when they are first used, so that a command
#: that needs no JAX does not wait for it.
_HOMES = {
    "Bundle": "load.bundle",
    "Edit": "experiments.edits",
    "HeadLoadings": "result",
    "InputError": "errors",
    "Result": "result",
    "Steering": "experiments.steer",
    "TargetEffects": "analyses.effects",
    "TraceOptions": "options",
    "choose_edits": "experiments.choose",
    "effects": "analyses.effects",
    "load": "load.opening",
    "open": "export.folder",
    "qk_attribution": "scores",
    "run": "analysis",
    "steer": "experiments.steer",
    "trace": "analysis",
}
_CALLED = {"open": "open_result"}  # where it has another name at home

__all__ = [
    "Bundle",
    "Edit",
    "HeadLoadings",
    "InputError",
    "Result",
    "Steering",
    "TargetEffects",
    "TraceOptions",
    "choose_edits",
    "effects",
    "load",
    "open",
    "qk_attribution",
    "run",
    "steer",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"qkattr.{_HOMES[name]}")
    return getattr(home, _CALLED.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _Package(ModuleType):
    """`qkattr.load` is the function, although the modules below it lie in a folder of that name,
    which the import system would put here."""

    @property
    def load(self) -> Any:
        return __getattr__("load")

    @load.setter
    def load(self, folder: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package

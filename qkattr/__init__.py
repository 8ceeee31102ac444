"""qkattr: attribution graphs that explain attention, in JAX.

    bundle = qkattr.load("smollm2", saes)       a model and an SAE after every block
    result = qkattr.trace(bundle, prompt)       features acting on features, and through which heads
    qkattr.effects(result)                      what the prediction is made of, signed
    qkattr.qk_attribution(result, layer=, head=, query=, key=)     why a head looked where it did
    qkattr.steer(result, edits, scales=)        is it true? scale features in the QK circuit only

Every analysis takes a subject first: a result, or `qkattr.subject(bundle, prompt)`. The pure
functions below take arrays and small frozen structs; `docs/embedding.md` shows them in someone
else's code.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qkattr.version import __version__ as __version__

if TYPE_CHECKING:
    from qkattr.analyses.distance import distance
    from qkattr.analyses.effects import TargetEffects, effects
    from qkattr.analyses.marginals import marginals
    from qkattr.analyses.mechanisms import mechanisms
    from qkattr.analyses.pairs import pairs
    from qkattr.analyses.weights import weight_pairs
    from qkattr.analyses.why import why
    from qkattr.api import Result, choose_edits, figure, open, qk_attribution, run, trace
    from qkattr.errors import InputError
    from qkattr.experiments.edits import Edit
    from qkattr.experiments.faithfulness import faithfulness
    from qkattr.experiments.steer import Steering, steer
    from qkattr.load.bundle import Bundle
    from qkattr.load.opening import load
    from qkattr.options import SubjectOptions, TraceOptions
    from qkattr.result import HeadLoadings
    from qkattr.subject import Subject, subject

#: Where each public name comes from. They are imported when they are first used, so that a command
#: that needs no JAX does not wait for it.
_HOMES = {
    "Bundle": "load.bundle",
    "Edit": "experiments.edits",
    "HeadLoadings": "result",
    "InputError": "errors",
    "Result": "api",
    "Steering": "experiments.steer",
    "Subject": "subject",
    "SubjectOptions": "options",
    "TargetEffects": "analyses.effects",
    "TraceOptions": "options",
    "choose_edits": "api",
    "distance": "analyses.distance",
    "effects": "analyses.effects",
    "faithfulness": "experiments.faithfulness",
    "figure": "api",
    "load": "load.opening",
    "marginals": "analyses.marginals",
    "mechanisms": "analyses.mechanisms",
    "open": "api",
    "pairs": "analyses.pairs",
    "qk_attribution": "api",
    "run": "api",
    "steer": "experiments.steer",
    "subject": "subject",
    "trace": "api",
    "weight_pairs": "analyses.weights",
    "why": "analyses.why",
}

__all__ = [
    "Bundle",
    "Edit",
    "HeadLoadings",
    "InputError",
    "Result",
    "Steering",
    "Subject",
    "SubjectOptions",
    "TargetEffects",
    "TraceOptions",
    "choose_edits",
    "distance",
    "effects",
    "faithfulness",
    "figure",
    "load",
    "marginals",
    "mechanisms",
    "open",
    "pairs",
    "qk_attribution",
    "run",
    "steer",
    "subject",
    "trace",
    "weight_pairs",
    "why",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"qkattr.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _Package(ModuleType):
    """`qkattr.load` and `qkattr.subject` are functions, although modules of these names lie in the
    package, which the import system would put here."""

    @property
    def load(self) -> Any:
        return __getattr__("load")

    @load.setter
    def load(self, folder: ModuleType) -> None:
        pass

    @property
    def subject(self) -> Any:
        return __getattr__("subject")

    @subject.setter
    def subject(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package

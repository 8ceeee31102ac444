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

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from qkattr.lazy import offer
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

# Imported when they are first used, so that a command that needs no JAX does not wait for it.
offer(
    globals(),
    **{
        "analyses.distance": "distance",
        "analyses.effects": "TargetEffects effects",
        "analyses.marginals": "marginals",
        "analyses.mechanisms": "mechanisms",
        "analyses.pairs": "pairs",
        "analyses.weights": "weight_pairs",
        "analyses.why": "why",
        "api": "Result choose_edits figure open qk_attribution run trace",
        "errors": "InputError",
        "experiments.edits": "Edit",
        "experiments.faithfulness": "faithfulness",
        "experiments.steer": "Steering steer",
        "load.bundle": "Bundle",
        "load.opening": "load",
        "options": "SubjectOptions TraceOptions",
        "result": "HeadLoadings",
        "subject": "Subject subject",
    },
)


class _Package(ModuleType):
    """`qkattr.load` and `qkattr.subject` are functions, although modules of these names lie in the
    package, which the import system would put here."""

    load = property(lambda self: self.__getattr__("load"), lambda self, folder: None)
    subject = property(lambda self: self.__getattr__("subject"), lambda self, module: None)


sys.modules[__name__].__class__ = _Package

"""qkattr: attribution graphs that explain attention, in JAX.

    bundle = qkattr.load("smollm2", saes)       a model and an SAE after every block
    result = qkattr.trace(bundle, prompt)       features acting on features, and through which heads
    qkattr.qk_attribution(result, layer=, head=, query=, key=)     why a head looked where it did
    qkattr.steer(result, None, edits, scales=)  is it true? scale features in the QK circuit only

The pure functions below it take arrays and small frozen structs; `docs/embedding.md` shows them in
someone else's code.
"""

__version__ = "0.1.0"

from qkattr.analysis import run, trace
from qkattr.errors import InputError
from qkattr.experiments.choose import choose_edits
from qkattr.experiments.edits import Edit
from qkattr.experiments.steer import Steering, steer
from qkattr.export.folder import open_result as open
from qkattr.load.bundle import Bundle, load
from qkattr.options import TraceOptions
from qkattr.result import HeadLoadings, Result
from qkattr.scores import qk_attribution

__all__ = [
    "Bundle",
    "Edit",
    "HeadLoadings",
    "InputError",
    "Result",
    "Steering",
    "TraceOptions",
    "choose_edits",
    "load",
    "open",
    "qk_attribution",
    "run",
    "steer",
    "trace",
]

"""Options of `qkattr.trace`, checked when they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qkattr.errors import InputError, one_of, quoted
from qkattr.graph.sweep import SweepConfig
from qkattr.model.mlp import LINEARISATIONS

#: Of rows, edges, slots and logits; more of them overflow XLA's sizes.
MOST = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Options of `trace`. Every output names them.

    target: tokens (text or ids) to explain instead of the likeliest. contrast: two tokens; the
      difference of their logits is the target. score: (layer, head, query, key); that attention
      score is the target, read on both sides.
    through_qk: also trace the scores behind the so many strongest edges.
    linearisation: of the MLP, "jacobian", "frozen-gate" or "half". read: features as targets are
      read by their "decoder" direction or "encoder". through_errors: errors are targets too. keep:
      share of each boundary's influence that is kept. max_rows: kept nodes a boundary. max_edges:
      edges of one target. max_slots: features a position.
    sinks: see `sources.components`. bos: None as the SAEs or the tokenizer say. max_logits,
      logit_mass: the likeliest tokens up to this probability are targets. qk: how many QK
      attributions go along. precision: of all matmuls.
    """

    target: tuple[str | int, ...] = ()
    contrast: tuple[str | int, str | int] | None = None
    score: tuple[int, int, int | str, int | str] | None = None
    through_qk: int = 0
    linearisation: str = "jacobian"
    read: str = "decoder"
    through_errors: bool = True
    keep: float = 0.95
    max_rows: int = 256
    max_edges: int = 64
    max_slots: int = 256
    sinks: bool = True
    bos: bool | None = None
    max_logits: int = 10
    logit_mass: float = 0.95
    qk: int = 8
    precision: str = "highest"

    def __post_init__(self):
        one_of("linearisation", self.linearisation, LINEARISATIONS)
        one_of("read", self.read, ("decoder", "encoder"))
        one_of("precision", self.precision, ("default", "high", "highest"))
        for name in ("keep", "logit_mass"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"{name} should lie in (0, 1], got {getattr(self, name)}; give a share"
                )
        for name in ("max_rows", "max_edges", "max_slots", "max_logits"):
            if not 1 <= getattr(self, name) <= MOST:
                raise InputError(f"{name} should lie in 1..{MOST}, got {getattr(self, name)}")
        for name in ("through_qk", "qk"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} should be at least 0, got {getattr(self, name)}")
        if self.contrast and self.contrast[0] == self.contrast[1]:
            raise InputError(
                f"contrast compares two tokens, both given are {quoted(str(self.contrast[0]))}; "
                f"give two different ones"
            )
        chosen = [n for n in ("target", "contrast", "score") if getattr(self, n)]
        if len(chosen) > 1:
            raise InputError(
                f"{' and '.join(chosen)} were both given; a trace has one kind of target, "
                f"choose one"
            )

    @property
    def sweep(self) -> SweepConfig:
        names = [field.name for field in dataclasses.fields(SweepConfig)]
        return SweepConfig(**{name: getattr(self, name) for name in names})


def saved_options(settings: Mapping[str, Any]) -> TraceOptions:
    """The options among the settings of a result, which may have been saved as JSON."""
    names = {field.name for field in dataclasses.fields(TraceOptions)}
    given = {name: value for name, value in settings.items() if name in names}
    return TraceOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def make_options(options: dict) -> TraceOptions:
    """`TraceOptions`, naming what is not one.

    Raises:
      InputError: an option is not known, or its value cannot be used.
    """
    known = [field.name for field in dataclasses.fields(TraceOptions)]
    for name in options:
        if name not in known:
            raise InputError(f"option {name!r} is not known; the options are {', '.join(known)}")
    return TraceOptions(**options)

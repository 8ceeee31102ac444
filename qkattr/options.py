"""Options of a prompt's components and of `qkattr.trace`, checked when they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from qkattr.config import LINEARISATIONS, SweepConfig
from qkattr.errors import InputError, one_of, quoted

OptionsT = TypeVar("OptionsT", "SubjectOptions", "TraceOptions")

#: The largest allowed value of `max_rows`, `max_edges`, `max_slots` and `max_logits`; XLA's sizes
#: overflow beyond it.
MOST = 2**16

READS = ("decoder", "encoder")
PRECISIONS = ("default", "high", "highest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubjectOptions:
    """How a prompt becomes components.

    bos: whether text begins with a BOS; None: as the SAEs or the tokenizer say.
    sinks: see `sources.components`.
    read: features as targets are read by their "decoder" direction or "encoder".
    max_slots: features a position.
    precision: of all matmuls, "default", "high" or "highest".
    """

    bos: bool | None = None
    sinks: bool = True
    read: str = "decoder"
    max_slots: int = 256
    precision: str = "highest"

    def __post_init__(self):
        one_of("read", self.read, READS)
        one_of("precision", self.precision, PRECISIONS)
        _check_sizes(self, "max_slots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Options of `trace`: those of its `SubjectOptions`, and its own. Every output names them.

    target: tokens (text or ids) to explain instead of the likeliest.
    contrast: two tokens; the difference of their logits is the target.
    score: (layer, head, query, key); that attention score is the target, read on both sides.
    through_qk: also trace the scores behind the so many strongest edges.
    linearisation: of the MLP, "jacobian", "frozen-gate" or "half".
    through_errors: errors are targets too.
    keep: share of each boundary's influence that is kept.
    max_rows: kept nodes a boundary.
    max_edges: edges of one target.
    max_logits, logit_mass: the likeliest tokens up to this probability are targets.
    qk: how many QK attributions go along.
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
        _ = self.subject
        for name in ("keep", "logit_mass"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"{name} should lie in (0, 1], got {getattr(self, name)}; give a share"
                )
        _check_sizes(self, "max_rows", "max_edges", "max_logits")
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
    def subject(self) -> SubjectOptions:
        """Those of the prompt's components."""
        return SubjectOptions(**_fields(self, SubjectOptions))

    @property
    def sweep(self) -> SweepConfig:
        """Those of the backward sweep."""
        return SweepConfig(**_fields(self, SweepConfig))

    def to_json(self) -> dict[str, Any]:
        """As results keep them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> TraceOptions:
        """The options among the settings of a result, which may have been saved as JSON."""
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in settings.items() if name in names}
        made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**made)


def _fields(options: TraceOptions, of: type) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(of)}


def _check_sizes(options: Any, *names: str) -> None:
    for name in names:
        if not 1 <= getattr(options, name) <= MOST:
            raise InputError(f"{name} should lie in 1..{MOST}, got {getattr(options, name)}")


def make_options(kind: type[OptionsT], options: Mapping[str, Any]) -> OptionsT:
    """Options of a kind, naming what is not one.

    Raises:
      InputError: an option is not known, or its value cannot be used.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name not in known:
            raise InputError(f"option {name!r} is not known; the options are {', '.join(known)}")
    return kind(**options)

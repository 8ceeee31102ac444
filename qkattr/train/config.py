"""What a training run is: a flat TOML file.

Every field that changes what is computed is compared when a run is resumed.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkattr.errors import InputError, quoted
from qkattr.files import read_toml

ACTIVATIONS = ("topk", "batchtopk", "jumprelu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Hashable: a static argument of the jitted functions.

    width: features of a dictionary. k: active features a position (topk, batchtopk), or the L0 that
      jumprelu is pulled to. activation: topk, batchtopk or jumprelu. slots: the most features a
      position may have in batchtopk and jumprelu; 0: 4 k.
    tokens: positions to train on, over several passes if need be. batch: positions of a step.
    buffer: rows of text whose activations are shuffled together. row: tokens of a row. held_out:
      rows at the end of the text that are never trained on.
    lr: of Adam, in units of inputs with norm sqrt(d_model); it rises over the first `warmup` and
      falls to zero over the last `decay` of the steps. clip: of the gradient's norm, per SAE.
    aux_k: dead features that account for a position's error, aux_weight: what that counts;
      dead_after: positions without firing after which a feature is dead.
    l0_weight, bandwidth, threshold: of jumprelu: what the L0 penalty counts, the width of its
      straight-through rectangle, and the first threshold.
    start: a folder of SAEs, or a packed file, to go on from; "": random rows.
    bits: of a weight in the packed file that the run is to end in, 4 or 8; 0: none. wide:
      boundaries that get 8. round_from: the share of the steps after which products see rounded
      weights.
    sparse: read and write only active rows; "auto": on a CPU. compute: dtype of the products,
      "float32" or "bfloat16".
    checkpoint_every: steps; keep: checkpoints. seed: of everything drawn.
    """

    width: int
    k: int = 32
    activation: str = "topk"
    slots: int = 0
    tokens: int = 10_000_000
    batch: int = 2032
    buffer: int = 128
    row: int = 128
    held_out: int = 64
    lr: float = 1e-3
    warmup: float = 0.02
    decay: float = 0.4
    clip: float = 1.0
    aux_k: int = 32
    aux_weight: float = 1 / 32
    dead_after: int = 100_000
    l0_weight: float = 0.05
    bandwidth: float = 0.05
    threshold: float = 0.05
    start: str = ""
    bits: int = 0
    wide: tuple[int, ...] = ()
    round_from: float = 0.5
    sparse: bool | str = "auto"
    compute: str = "float32"
    checkpoint_every: int = 200
    keep: int = 2
    seed: int = 0

    def __post_init__(self):
        set_ = object.__setattr__  # frozen: what is derived is filled in once, here
        if self.sparse == "auto":
            import jax

            set_(self, "sparse", jax.default_backend() == "cpu")
        if self.activation == "topk":
            set_(self, "slots", self.k)
        elif self.slots == 0:
            set_(self, "slots", min(self.width, 4 * self.k))
        set_(self, "aux_k", min(self.aux_k, self.width))
        set_(self, "wide", tuple(self.wide))  # TOML has lists
        _check(self)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(1, round(self.tokens / self.batch))

    @property
    def round_at(self) -> int:
        """The step before which the grid is fitted, with `bits`."""
        return round(self.round_from * self.steps)

    @property
    def batches(self) -> int:
        """Steps that one buffer lasts: position 0 of every row is left out."""
        return self.buffer * (self.row - 1) // self.batch


#: Field: the least and the most it may be.
_RANGES: dict[str, tuple[float, float]] = {
    "width": (1, 2**24),
    "k": (1, 2**16),
    "slots": (1, 2**16),
    "tokens": (1, 2**50),
    "batch": (1, 2**24),
    "buffer": (1, 2**20),
    "row": (16, 2**20),
    "held_out": (0, 2**20),
    "lr": (0, 10),
    "warmup": (0, 1),
    "decay": (0, 1),
    "clip": (1e-12, 1e12),
    "aux_k": (0, 2**16),
    "aux_weight": (0, 1e6),
    "dead_after": (1, 2**50),
    "l0_weight": (0, 1e6),
    "bandwidth": (1e-9, 1e3),
    "threshold": (1e-9, 1e3),
    "round_from": (0, 1),
    "checkpoint_every": (1, 2**31),
    "keep": (1, 1000),
    "seed": (0, 2**31 - 1),
}


def _check(cfg: TrainConfig) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(cfg, name)
        if not low <= value <= high:  # also where it is nan
            raise InputError(f"{name} should lie in {low:g}..{high:g}, got {value}; change it")
    for name, known in (("activation", ACTIVATIONS), ("compute", ("float32", "bfloat16"))):
        if getattr(cfg, name) not in known:
            raise InputError(
                f"{name} is {quoted(str(getattr(cfg, name)))}; known are {', '.join(known)}"
            )
    if cfg.bits not in (0, 4, 8):
        raise InputError(f"bits is {cfg.bits}; give 4 or 8, or 0 for no packed file")
    if not all(type(boundary) is int and boundary > 0 for boundary in cfg.wide):
        raise InputError(f"wide should be a list of boundaries from 1 on, got {list(cfg.wide)}")
    if cfg.wide and not cfg.bits:
        raise InputError(
            "wide names boundaries of the packed file, and with bits = 0 "
            "none is written; give bits = 4, or leave wide out"
        )
    if cfg.bits and cfg.round_at >= cfg.steps:
        raise InputError(
            f"round_from={cfg.round_from} leaves none of the {cfg.steps} steps for rounded "
            "weights; lower it, or leave bits out"
        )
    if cfg.warmup + cfg.decay > 1 + 1e-9:
        raise InputError(
            f"warmup={cfg.warmup} and decay={cfg.decay} are shares of the steps, expected at most "
            "1 together; lower one"
        )
    if not isinstance(cfg.sparse, bool):
        raise InputError(f'sparse is {cfg.sparse!r}; give true, false or "auto"')
    if not cfg.k <= cfg.slots <= cfg.width:
        raise InputError(
            f"k={cfg.k}, slots={cfg.slots}, width={cfg.width}: each should be at most the next"
        )
    if cfg.batches < 1:
        held = cfg.buffer * (cfg.row - 1)
        raise InputError(
            f"a batch of {cfg.batch} does not fit a buffer of {held} positions ({cfg.buffer} rows "
            f"of {cfg.row}, without the first of each); raise buffer"
        )


def config_from(values: Mapping[str, Any], where: str) -> TrainConfig:
    """A `TrainConfig` from names and values; `where` names their source in errors.

    Raises:
      InputError: a name is not known, width is missing, or a value is not what it should be.
    """
    hints = typing.get_type_hints(TrainConfig)
    for name, value in values.items():
        if name not in hints:
            raise InputError(f"{where}: {quoted(name)} is not known; known are {', '.join(hints)}")
        kinds = typing.get_args(hints[name]) if _is_union(hints[name]) else (hints[name],)
        kinds = (list,) if name == "wide" else (*kinds, int) if float in kinds else kinds
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{where}: {name} should be {wanted}, got {value!r:.40}; change it")
    if "width" not in values:
        raise InputError(f"{where} has no width; give the number of features, as in width = 2304")
    return TrainConfig(**values)


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType)


def read_config(path: str | Path, **changes: Any) -> TrainConfig:
    """The run that a TOML file describes, with changes.

    Raises:
      InputError: it cannot be read, or is not a run.
    """
    return config_from({**read_toml(path), **changes}, str(path))

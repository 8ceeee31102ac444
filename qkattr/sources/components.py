"""A residual stream as a sum of components.

    x[t] = sum_f coefficient[t, f] * rows[row[t, f]]  +  bias[t]  +  error[t]

Slots of a position, in this order: A features (a boundary without a dictionary at b = 0: the token
and the position embedding), one bias, one error (or sink). Empty slots are exact zeros, and the
slots always sum to x[t].
A sink is a position whose norm is out of all proportion, position 0 before all: it is one
component, the whole residual. Directions are kept once (`rows`), so a linear map of all components
costs one matmul over the U directions in use and one over the T biases and T errors, never one over
T * C vectors.
Axes: T position, A feature slots, C = A + 2 slots, U directions, D d_model. Exact to float32
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from qkattr.kinds import Kind
from qkattr.model.layers import f32
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.sources.dictionary import Dictionary, Encoding, encode

#: A position whose norm exceeds this many times the median over real positions >= 1 is a sink.
SINK_RATIO = 10.0


@struct.dataclass
class Components:
    """The components of one boundary, or of all of them stacked on a leading axis.

    rows: `[U, D]` directions.
    row: `[T, A]` which of them each slot's is.
    coefficient: `[T, A]` what multiplies it.
    bias, error: `[T, D]` the last two slots.
    kind: `[T, C]` of `Kind`.
    index: `[T, C]` feature id, token id, position, or -1.
    activation: `[T, A]` in the SAE's own units.
    left_out: `[T]` share of the activation that found no slot and so lies in `error`.
    read: `[U, D]` encoder directions, in the SAE's own units, when covectors are read through the
      encoder; None: a component's own vector is its covector.
    """

    rows: Float[Array, "U D"]
    row: Int[Array, "T C-2"]
    coefficient: Float[Array, "T C-2"]
    bias: Float[Array, "T D"]
    error: Float[Array, "T D"]
    kind: Int[Array, "T C"]
    index: Int[Array, "T C"]
    activation: Float[Array, "T C-2"]
    left_out: Float[Array, "T"]
    read: Float[Array, "U D"] | None = None

    @property
    def n_slots(self) -> int:
        """C: the feature slots, one bias, one error."""
        return self.kind.shape[-1]

    @property
    def bias_slot(self) -> int:
        """The slot of the bias, which the constants of a projection join; the error's is next."""
        return self.n_slots - 2

    @property
    def activations(self) -> Float[Array, "*L T C"]:
        """`activation` of all slots: 0 of the bias and the error."""
        rest = self.n_slots - self.activation.shape[-1]
        return jnp.pad(self.activation, ((0, 0),) * (self.activation.ndim - 1) + ((0, rest),))

    def map(self, f: Callable[[Array], Array]) -> Float[Array, "T C ..."]:
        """`f` of every component, for a linear `f` from `[..., D]` to `[..., X]`."""
        features = f(self.rows)[self.row]
        coefficient = self.coefficient.reshape(*self.coefficient.shape, *(1,) * (features.ndim - 2))
        parts = [features * coefficient, f(self.bias)[:, None], f(self.error)[:, None]]
        return jnp.concatenate(parts, axis=1)

    def vectors(self) -> Float[Array, "T C D"]:
        """All components as vectors. Large: meant for small prompts and for tests."""
        return self.map(lambda x: x)

    def at(
        self,
        position: Int[Array | np.ndarray, "*R"],
        slot: Int[Array | np.ndarray, "*R"],
        *leading: Int[Array | np.ndarray, "*R"],
    ) -> Float[Array, "*R D"]:
        """The vectors of R chosen components (R: any shape).

        leading: of stacked components, their boundaries.
        """
        direction, coefficient, n_features = self._slot(position, slot, *leading)
        feature = self.rows[(*leading, direction)] * coefficient[..., None]
        bias, error = (rest[(*leading, position)] for rest in (self.bias, self.error))
        rest = jnp.where((slot == n_features)[..., None], bias, error)
        return jnp.where((slot < n_features)[..., None], feature, rest)

    def covectors(self, position: Int[Array, "R"], slot: Int[Array, "R"]) -> Float[Array, "R D"]:
        """What reads each of R chosen components: its own vector,
        or a feature's encoder direction.
        """
        own = self.at(position, slot)
        if self.read is None:
            return own
        direction, coefficient, n_features = self._slot(position, slot)
        is_feature = (slot < n_features) & (coefficient != 0)
        # The encoder reads the normalised residual stream: its gain is activation / coefficient.
        activation = self.activation[position, jnp.minimum(slot, n_features - 1)]
        gain = activation / jnp.where(coefficient == 0, 1.0, coefficient)
        return jnp.where(is_feature[:, None], self.read[direction] * gain[:, None], own)

    def _slot(
        self, position: Array | np.ndarray, slot: Array | np.ndarray, *leading: Any
    ) -> tuple[Array, Array, int]:
        n_features = self.row.shape[-1]
        at = (*leading, position, jnp.minimum(slot, n_features - 1))
        return self.row[at], self.coefficient[at], n_features


#: The components of all boundaries, stacked on a leading axis.
ComponentStack = Annotated[Components, "L+1"]


def find_slots(
    components: Components,
    boundary: int,
    position: np.ndarray,
    kind: np.ndarray | np.integer | int,
    index: np.ndarray | np.integer | int | None = None,
) -> np.ndarray:
    """Where R named components of a boundary are, on the host: their slots `[R]`, -1 for one that
    is not there.

    position: `[R]`. kind, index: `[R]`, or one for all; index None: any.
    """
    kinds, indices = (np.asarray(a)[boundary] for a in (components.kind, components.index))
    match = kinds[position] == np.reshape(kind, (-1, 1))
    if index is not None:
        match &= indices[position] == np.reshape(index, (-1, 1))
    return np.where(match.any(-1), match.argmax(-1), -1)


@checked
def sink_positions(x: Float[Array, "T D"], n_real: Int[Array, ""] | int) -> Bool[Array, "T"]:
    """Position 0, and every real position whose norm exceeds `SINK_RATIO` times
    the lower median of positions >= 1.

    The second rule looks at the whole prompt: whether t is a sink can depend on tokens after t.
    """
    norm = jnp.linalg.norm(x, axis=-1)
    position = jnp.arange(x.shape[0])
    counted = (position >= 1) & (position < n_real)
    ordered = jnp.sort(jnp.where(counted, norm, jnp.inf))
    median = ordered[jnp.maximum((n_real - 2) // 2, 0)]  # the lower middle of n_real - 1 norms
    return (position == 0) | (counted & (norm > SINK_RATIO * median))


@checked
def assemble(
    x: Float[Array, "T D"],
    encoding: Encoding,
    rows: Float[Array, "U D"],
    row: Int[Array, "T A"],
    *,
    sink: Bool[Array, "T"],
    real: Bool[Array, "T"],
    slot_kind: Int[Array, "A"],
    error_kind: Int[Array, ""] | int = Kind.ERROR,
    read: Float[Array, "U D"] | None = None,
) -> Components:
    """Components from encoded features: the error slot takes what they leave, a sink all of it."""
    keep = real & ~sink
    active = keep[:, None] & (encoding.coefficient != 0)
    coefficient = jnp.where(active, encoding.coefficient, 0.0)
    bias = jnp.where(keep[:, None], encoding.bias, 0.0)
    features = jnp.einsum("TA,TAD->TD", coefficient, rows[row], precision="highest")
    error = jnp.where(real[:, None], x - features - bias, 0.0)
    last = jnp.where(sink, int(Kind.SINK), error_kind)
    kind = [
        jnp.where(active, slot_kind[None], int(Kind.NONE)),
        jnp.where(real, int(Kind.BIAS), int(Kind.NONE))[:, None],
        jnp.where(real, last, int(Kind.NONE))[:, None],
    ]
    n_positions = x.shape[0]
    index = [jnp.where(active, encoding.index, -1), jnp.full((n_positions, 2), -1)]
    return Components(
        rows=rows,
        row=row,
        coefficient=coefficient,
        bias=bias,
        error=error,
        kind=jnp.concatenate(kind, axis=1).astype(jnp.int32),
        index=jnp.concatenate(index, axis=1).astype(jnp.int32),
        activation=jnp.where(active, encoding.activation, 0.0),
        left_out=jnp.where(keep, encoding.left_out, 0.0),
        read=read,
    )


@partial(jax.jit, static_argnames=("slots", "precision", "sinks"))
@on_any_mesh
@checked
def decompose(
    dictionary: Dictionary,
    x: Float[Array, "T D"],
    *,
    slots: int,
    sinks: bool = True,
    precision: str = "highest",
) -> Components:
    """The components of one boundary (b >= 1) of an unpadded prompt; for use inside other programs.

    Args:
      dictionary: the SAE of this boundary.
      x: its residual stream.
      slots: how many features a position may have; more go into the error slot, the smallest first.
      sinks: make position 0 and positions of massive norm one component each.
    """
    encoding = encode(dictionary, x, slots=slots, precision=precision)
    real = jnp.ones(x.shape[0], bool)
    sink = sink_positions(x, x.shape[0]) if sinks else ~real
    kinds = jnp.full(encoding.index.shape[1], int(Kind.FEATURE))
    rows = f32(dictionary.w_dec_MD)
    return assemble(x, encoding, rows, encoding.index, sink=sink, real=real, slot_kind=kinds)

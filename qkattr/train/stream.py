"""Text to shuffled activations of every boundary.

Rows of a pass are permuted; `buffer` rows at a time go through the model, their positions (but the
first of each row) are permuted and cut into batches. All of it follows from (seed, step), so that a
run can go on from any step: the buffer of that step is made again. Positions whose norm exceeds 10
times the median of their row at a boundary get weight 0 there.
Axes: L boundary 1..n_blocks, P positions of a buffer, B of a batch, R rows, T tokens, D d_model.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from qkattr.config import ModelConfig
from qkattr.model.transformer import residual_stream
from qkattr.sharding import shard
from qkattr.sources.components import sink_positions
from qkattr.train.config import TrainConfig
from qkattr.types import Params

#: Rows that go through the model at once.
ROWS = 16


@struct.dataclass
class Buffer:
    """x: `[L, P, D]` activations, unscaled; weight: `[L, P]` 0 where a position is left out."""

    x_LBD: Float[Array, "L P D"]
    weight_LB: Float[Array, "L P"]


@partial(jax.jit, static_argnames=("cfg",), donate_argnames=("buffer",))
def _fill(buffer: Buffer, params: Params, tokens, first, *, cfg: ModelConfig) -> Buffer:
    """Put the activations of some rows into the buffer, beginning at a position."""

    def row(tokens_T):
        _, trace = residual_stream(
            params, tokens_T, cfg=cfg, capture=("boundaries",), precision="default"
        )
        x = cast(Array, trace.boundaries)[1:]
        sink = jax.vmap(lambda of_boundary: sink_positions(of_boundary, tokens_T.shape[0]))(x)
        return x[:, 1:], 1.0 - sink[:, 1:]

    x, weight = jax.vmap(row, out_axes=1)(tokens)  # [L, R, T - 1, ...]
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    weight = weight.reshape(x.shape[:2])
    return Buffer(
        x_LBD=jax.lax.dynamic_update_slice(buffer.x_LBD, x, (0, first, 0)),
        weight_LB=jax.lax.dynamic_update_slice(buffer.weight_LB, weight, (0, first)),
    )


@jax.jit
def _batch(buffer: Buffer, order: Int[Array, "B"], scale: Float[Array, "L"]):
    return buffer.x_LBD[:, order] * scale[:, None, None], buffer.weight_LB[:, order]


@dataclasses.dataclass
class Stream:
    """The batches of a run, by step. `rows` is text to train on, `[n, row]` token ids."""

    params: Params
    rows: np.ndarray
    model: ModelConfig
    cfg: TrainConfig
    mesh: Mesh | None = None
    scale: Array | None = None
    _buffer: Buffer | None = dataclasses.field(default=None, repr=False)
    _held: int = -1

    def batch(self, step: int) -> tuple[Float[Array, "L B D"], Float[Array, "L B"]]:
        """The activations of a step, scaled, and their weights."""
        number, within = divmod(step, self.cfg.batches)
        buffer = self.buffer(number)
        order = np.random.default_rng((self.cfg.seed, 1, number)).permutation(self.positions)
        some = order[within * self.cfg.batch :][: self.cfg.batch].astype(np.int32)
        x, weight = _batch(buffer, jnp.asarray(some), self.scale)
        return x, weight

    @property
    def positions(self) -> int:
        """Positions of a buffer."""
        return self.cfg.buffer * (self.cfg.row - 1)

    def buffer(self, number: int) -> Buffer:
        """The activations of the number-th buffer of rows."""
        if number != self._held:
            rows = self._rows(number)
            buffer, self._buffer = self._buffer or self._empty(), None
            for first in range(0, len(rows), ROWS):
                tokens = shard(_Rows(jnp.asarray(rows[first : first + ROWS])), self.mesh)
                at = first * (self.cfg.row - 1)
                buffer = _fill(buffer, self.params, tokens.tokens_BT, at, cfg=self.model)
            self._buffer, self._held = buffer, number
        return cast(Buffer, self._buffer)

    def measure(self) -> tuple[Float[Array, "L D"], Float[Array, "L"]]:
        """The mean of every boundary and what scales it to norm sqrt(D), from the first buffer.
        From then on batches are scaled."""
        mean, scale = _measure(self.buffer(0))
        self.scale = scale
        return mean * scale[:, None], scale

    def _empty(self) -> Buffer:
        n, p, d = self.model.n_blocks, self.positions, self.model.d_model
        return shard(Buffer(x_LBD=jnp.zeros((n, p, d)), weight_LB=jnp.zeros((n, p))), self.mesh)

    def _rows(self, number: int) -> np.ndarray:
        """The rows of a buffer: a window of the endless sequence of permuted passes."""
        n = len(self.rows)
        at = np.arange(number * self.cfg.buffer, (number + 1) * self.cfg.buffer)
        passes, within = np.divmod(at, n)
        chosen = np.empty(len(at), np.int64)
        for p in np.unique(passes):
            order = np.random.default_rng((self.cfg.seed, 0, int(p))).permutation(n)
            chosen[passes == p] = order[within[passes == p]]
        return np.asarray(self.rows[chosen], np.int32)


@struct.dataclass
class _Rows:
    tokens_BT: Int[Array, "R T"]


@jax.jit
def _measure(buffer: Buffer) -> tuple[Float[Array, "L D"], Float[Array, "L"]]:
    def one(of_boundary):
        x, weight = of_boundary
        n = jnp.maximum(weight.sum(), 1)
        norm = (weight * jnp.linalg.norm(x, axis=-1)).sum() / n
        return (weight[:, None] * x).sum(0) / n, jnp.sqrt(x.shape[1]) / norm

    return jax.lax.map(one, (buffer.x_LBD, buffer.weight_LB))

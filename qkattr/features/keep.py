"""The best K of a stream, for every segment at once: what lets a scan of any length keep contexts.

    best_K(a + b) = best_K(best_K(a) + best_K(b))

so batches can be merged one after the other, and the result depends neither on their size nor, but
for equal keys (the earlier place wins), on their order. With the activation as key it is the top
contexts; with a hash of the place as key it is a uniform sample of all active places.
Axes: S segments (features, or features by split), K kept, Q of them with a window of W positions.
Exact.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

NONE = -jnp.inf


@struct.dataclass
class KeptContexts:
    """The best entries of each segment, the best first.

    key: `[S, K]`, -inf where there is none. place: `[S, K]` row * T + position, -1 where there is
    none. value: `[S, K]` activation there. window: `[S, Q, W]` activations around the first Q.
    """

    key: Float[Array, "S K"]
    place: Int[Array, "S K"]
    value: Float[Array, "S K"]
    window: Float[Array, "S Q W"]


def empty(n_segments: int, size: int, n_windows: int, width: int) -> KeptContexts:
    """Nothing kept yet."""
    nothing: dict[str, Any] = dict(
        key=np.full((n_segments, size), -np.inf, np.float32),
        place=np.full((n_segments, size), -1, np.int32),
        value=np.zeros((n_segments, size), np.float32),
        window=np.zeros((n_segments, min(n_windows, size), width), np.float32),
    )
    return KeptContexts(**nothing)


def best(
    segment: Int[Array, "n"], key: Float[Array, "n"], *, n_segments: int, size: int
) -> Int[Array, "S K"]:
    """Which of n entries are the best of their segment, the best first; n where there is none.

    key: -inf leaves an entry out. Of equal keys the first goes first.
    """
    n = key.shape[0]
    place = jnp.arange(n, dtype=jnp.int32)
    segment = jnp.where(key > NONE, segment, n_segments)
    segment, _, entry = jax.lax.sort((segment, -key, place), num_keys=2, is_stable=True)
    first = jnp.searchsorted(segment, jnp.arange(n_segments + 1))
    rank = place - first[segment]
    # Ranks beyond `size`, and the segment of what is left out, fall outside and are dropped.
    return jnp.full((n_segments, size), n).at[segment, rank].set(entry, mode="drop")


def merge(a: KeptContexts, b: KeptContexts) -> KeptContexts:
    """The best of both; of equal keys, those of `a` go first."""
    size, n_windows = a.key.shape[1], a.window.shape[1]
    key, at = jax.lax.top_k(jnp.concatenate([a.key, b.key], axis=1), size)

    def pick(x: Array, y: Array) -> Array:
        return jnp.take_along_axis(jnp.concatenate([x, y], axis=1), at, axis=1)

    # The first Q of the whole are among the first Q of each part.
    windows = jnp.concatenate([a.window, b.window], axis=1)
    of = at[:, :n_windows]
    of = jnp.where(of < size, of, of - size + n_windows)
    return KeptContexts(
        key=key,
        place=pick(a.place, b.place),
        value=pick(a.value, b.value),
        window=jnp.take_along_axis(windows, of[..., None], axis=1, mode="clip"),
    )


def priority(place: Int[Array, "n"]) -> Float[Array, "n"]:
    """A number in [0, 1) for each place, as good as random and always the same: murmur3's mixer."""
    x = place.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return ((x ^ (x >> 16)) >> 8).astype(jnp.float32) / 2**24

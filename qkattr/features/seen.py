"""What a scan keeps of one boundary, and how a batch is added to it.

Everything is a sum or a best-of-K, so batches can be added one after the other (see `keep`).
Axes: B rows, T position, P = B * T, A features active at a position, M dictionary width, S
segments, W positions of a window. Exact, but for sums (float32).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.features.keep import NONE, KeptContexts, best, empty, merge, priority

#: Half octaves of activation, counted apart, around 1; the outermost take all beyond them.
BINS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """top: strongest contexts kept of each feature. samples: active places sampled of each feature
    and split. shown: how many of these keep a window. before, after: positions of a window around
    its own. batch: rows at a time. precision: of matmuls."""

    top: int = 4
    samples: int = 250
    shown: int = 10
    before: int = 9
    after: int = 4
    batch: int = 32
    precision: str = "highest"

    @property
    def window(self) -> int:
        return self.before + 1 + self.after


@struct.dataclass
class Seen:
    """What one boundary's features did so far.

    count: `[2, M]` active positions of rows to choose on, and of held-out rows. total: `[M]` sum of
    activations. histogram: `[M, BINS]`. top: segments are features. sample: segments are features
    of rows to choose on, then features of held-out rows.
    """

    count: Int[Array, "2 M"]
    total: Float[Array, "M"]
    histogram: Int[Array, "M bins"]
    top: KeptContexts
    sample: KeptContexts


def nothing_seen(width: int, config: ScanConfig) -> Seen:
    """Of a dictionary, before the first batch."""
    nothing: dict[str, Any] = dict(
        count=np.zeros((2, width), np.int32),
        total=np.zeros(width, np.float32),
        histogram=np.zeros((width, BINS), np.int32),
        top=empty(width, config.top, config.top, config.window),
        sample=empty(2 * width, config.samples, config.shown, config.window),
    )
    return Seen(**nothing)


def add(seen: Seen, value, feature, place, split, shape, cfg: ScanConfig) -> Seen:
    """`seen` with a batch added.

    value, feature: `[P, A]` activations (0: none) of which features. place, split: `[P]` where, and
    in which half. shape: (B, T).
    """
    width, (P, A) = seen.total.shape[0], value.shape
    active = (value > 0).astype(jnp.int32)
    split = jnp.broadcast_to(split[:, None], (P, A))
    dense = jnp.zeros((P, width)).at[jnp.arange(P)[:, None], feature].set(value)
    dense = dense.reshape(*shape, width)

    def keep_best(kept: KeptContexts, segment, key):
        entry = best(segment.ravel(), key.ravel(), n_segments=len(kept.key), size=kept.key.shape[1])
        return merge(kept, _entries(entry, key.ravel(), value.ravel(), place, dense, kept, cfg))

    chance = jnp.broadcast_to(priority(place)[:, None], (P, A))
    return Seen(
        count=seen.count.at[split, feature].add(active),
        total=seen.total.at[feature].add(value),
        histogram=seen.histogram.at[feature, half_octave(value)].add(active),
        top=keep_best(seen.top, feature, jnp.where(value > 0, value, NONE)),
        sample=keep_best(seen.sample, split * width + feature, jnp.where(value > 0, chance, NONE)),
    )


def _entries(entry, key, value, place, dense, kept: KeptContexts, cfg: ScanConfig) -> KeptContexts:
    """Entries of a batch, by their number in `key`, with windows for the first of them."""
    B, T, width = dense.shape
    n = len(key)
    exists = entry < n
    position = jnp.minimum(entry, n - 1) // (n // len(place))
    of = position[:, : kept.window.shape[1]]
    segment = jnp.arange(len(kept.key)) % width
    t = of[..., None] % T + jnp.arange(-cfg.before, cfg.after + 1)[None, None]
    around = dense[of[..., None] // T, jnp.clip(t, 0, T - 1), segment[:, None, None]]
    return KeptContexts(
        key=jnp.where(exists, key[jnp.minimum(entry, n - 1)], NONE),
        place=jnp.where(exists, place[position], -1),
        value=jnp.where(exists, value[jnp.minimum(entry, n - 1)], 0.0),
        window=jnp.where((t >= 0) & (t < T) & exists[:, : of.shape[1], None], around, 0.0),
    )


def half_octave(value: Float[Array, "..."]) -> Int[Array, "..."]:
    """The bin of an activation: bin i counts those in [2^((i - 32) / 2), 2^((i - 31) / 2))."""
    exponent = jnp.floor(2 * jnp.log2(jnp.maximum(value, 1e-30))).astype(jnp.int32)
    return jnp.clip(exponent + BINS // 2, 0, BINS - 1)

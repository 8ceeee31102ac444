"""Distance profile: a pair's value as a function of how far back the key lies.

    value(d) = scale * R(d) q[a] . k[c]        d = t - s

with q[a], k[c] the components after the norms and before rotary, everything else held as it is on
the prompt: only the rotation changes. What a pair is worth whatever the distance is its mean over
d = 0..max; the rest of its value at the true distance is what position added:

    value(t - s) = mean + positional

Without rotary, profiles are flat and position acts through components alone (`Kind.POSITION`).
Axes: D distance, P pairs, H head_dim. Exact given the frozen scales.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig
from qkattr.model.layers import rotate
from qkattr.model.transformer import block
from qkattr.qk.terms import apart, key_components, query_components
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import Components
from qkattr.types import BlockWeights


@struct.dataclass
class Profile:
    """What some pairs, and the score, are worth at every distance.

    values_DP: `[D, P]` of the pairs asked for.
    score_D: `[D]` of the whole score, before the softcap.
    """

    values_DP: Float[Array, "D P"]
    score_D: Float[Array, "D"]


@partial(jax.jit, static_argnames=("distances", "cfg", "precision"))
@on_any_mesh
@checked
def distance_profile(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    components: Components,
    pairs: Int[Array, "P pair=2"],
    *,
    head: Int[Array, ""] | int,
    query: Int[Array, ""] | int,
    key: Int[Array, ""] | int,
    distances: int,
    cfg: BlockConfig,
    precision: str = "highest",
) -> Profile:
    """The values of some pairs (query slot, key slot) of one place at distances 0 to
    `distances` - 1; `head`, `query`, `key` and `pairs` may be traced."""
    weights, head = apart(weights, head)
    _, seen = block(weights, x, cfg=cfg, precision=precision)
    how: dict[str, Any] = dict(cfg=cfg, precision=precision)
    q = query_components(weights, components, seen, head, query, at=0, **how)
    still = jnp.zeros(x.shape[0], jnp.int32)
    k = key_components(weights, components, seen, head, at=still, **how)[key]
    q_P, k_P = q[pairs[:, 0]], k[pairs[:, 1]]

    def turned(vectors: Array) -> Array:
        """`[D, P, H]`: each vector at every distance."""
        shape = (distances, *vectors.shape)
        return rotate(jnp.broadcast_to(vectors, shape), jnp.arange(distances), weights.inv_freq)

    dots = partial(jnp.einsum, precision=precision)
    values = dots("DPH,PH->DP", turned(q_P), k_P) * cfg.scale
    score = dots("DPH,PH->D", turned(q.sum(0)[None]), k.sum(0)[None]) * cfg.scale
    return Profile(values_DP=values, score_D=score)

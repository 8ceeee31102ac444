"""All QK marginals of a block: what each component of a query or of a key is worth everywhere.

    query side   m[t, a, s] = scale * q[t, a] . k_total[s]      sum over a = the score at (t, s)
    key side     m[t, s, c] = scale * q_total[t] . k[s, c]      sum over c = the score at (t, s)

(paper, "QK attributions", marginalised over the other side), for all heads and all pairs that the
head sees, the largest few by |value| of each. Tiles of queries x keys are one matmul each, and
those without a pair in sight are skipped; within a tile the largest are found plane by plane, all
places side by side: float32 magnitudes order like integers, so a magnitude with the plane's number
in its last bits is one integer, and the next largest below the last one is a running maximum.
Values are exact given the frozen scales; the *choice* is by magnitudes cut by the bits that hold
the number (5 to 8 of 23), so that two within 2^-15 of each other may come in either order.
Axes: T query position, S key position, N heads, A/C slots, P kept, H head_dim.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig
from qkattr.model.forward import block
from qkattr.qk.terms import every_query_component, key_components
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import Components
from qkattr.types import BlockWeights, Kind

#: Queries and keys of a tile.
TILE = 64
#: Planes compared in one fused pass.
PLANES = 64


@struct.dataclass
class Marginals:
    """The P largest marginals of every place, by falling |value|; slot -1 and value 0 where there
    are fewer, or the query does not see the key.

    query_value, query_slot, key_value, key_slot: `[N, P, T, S]`. score, pattern: `[N, T, S]`.
    """

    query_value: Float[Array, "N P T S"]
    query_slot: Int[Array, "N P T S"]
    key_value: Float[Array, "N P T S"]
    key_slot: Int[Array, "N P T S"]
    score: Float[Array, "N T S"]
    pattern: Float[Array, "N T S"]


@partial(jax.jit, static_argnames=("top", "tile", "cfg", "precision"))
@on_any_mesh
def marginals(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    components: Components,
    *,
    top: int = 5,
    tile: int = TILE,
    cfg: BlockConfig,
    precision: str = "highest",
) -> Marginals:
    """The largest marginals of all heads of a block at all (t, s).

    Args:
      weights: the block's. x: the residual stream it reads. components: of it.
      top: how many of either side at each place (static).
      tile: queries and keys of a tile (static).
    """
    _, seen = block(weights, x, cfg=cfg, precision=precision)
    n_positions, n_heads = x.shape[0], weights.wq_DNH.shape[1]
    group, how = n_heads // weights.wk_DKH.shape[1], dict(cfg=cfg, precision=precision)
    tile = min(tile, n_positions)
    n_tiles = -(-n_positions // tile)
    more = n_tiles * tile - n_positions
    real = jnp.pad((components.kind != int(Kind.NONE)).any(-1), (0, more))

    def planes(parts: Float[Array, "T C H"]) -> Float[Array, "C T H"]:
        return jnp.pad(parts.swapaxes(0, 1), ((0, 0), (0, more), (0, 0)))

    def whole(total: Float[Array, "T H"]) -> Float[Array, "T H"]:
        return jnp.pad(total, ((0, more), (0, 0)))

    def of_head(head: Array):
        parts_q = planes(every_query_component(weights, components, seen, head, **how)) * cfg.scale
        parts_k = planes(key_components(weights, components, seen, head, **how)) * cfg.scale
        q, k = whole(seen.q_TNH[:, head]), whole(seen.k_SKH[:, head // group])
        cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=tile)

        def of_tile(i: Array, j: Array):
            t, s = i * tile + jnp.arange(tile)[:, None], j * tile + jnp.arange(tile)[None]
            dots = partial(jnp.einsum, "CXH,YH->CXY", precision=precision)

            def found():
                at_q = largest(dots(cut(parts_q, i * tile, axis=1), cut(k, j * tile)), top)
                at_k = largest(dots(cut(parts_k, j * tile, axis=1), cut(q, i * tile)), top)
                at_k = jax.tree.map(lambda a: a.swapaxes(1, 2), at_k)
                pair = (t >= s) & (t - s < weights.window) & cut(real, i * tile)[:, None]
                return [
                    (jnp.where(pair, value, 0.0), jnp.where(pair & (value != 0), slot, -1))
                    for value, slot in (at_q, at_k)
                ]

            empty = jnp.zeros((top, tile, tile)), jnp.full((top, tile, tile), -1, jnp.int16)
            near = (j + 1) * tile - 1 - i * tile > -weights.window
            return jax.lax.cond((j <= i) & near, found, lambda: [empty, empty])

        each = jnp.arange(n_tiles)
        tiles = jax.lax.map(lambda i: jax.lax.map(lambda j: of_tile(i, j), each), each)
        return jax.tree.map(untiled, tiles)

    def untiled(a: Float[Array, "I J P X Y"]) -> Float[Array, "P T S"]:
        joined = a.transpose(2, 0, 3, 1, 4).reshape(top, n_tiles * tile, n_tiles * tile)
        return joined[:, :n_positions, :n_positions]

    (query_value, query_slot), (key_value, key_slot) = jax.lax.map(of_head, jnp.arange(n_heads))
    return Marginals(
        query_value=query_value,
        query_slot=query_slot,
        key_value=key_value,
        key_slot=key_slot,
        score=seen.scores_NTS,
        pattern=seen.pattern_NTS,
    )


def largest(planes: Float[Array, "A X Y"], top: int) -> tuple[Array, Array]:
    """The `top` largest by |value| over the planes, for every (x, y): values `[top, X, Y]`, and
    their planes as int16."""
    n_planes = planes.shape[0]
    n_groups = -(-n_planes // PLANES)
    size = -(-n_planes // n_groups)
    padded = jnp.pad(planes, ((0, n_groups * size - n_planes), (0, 0), (0, 0)))
    groups = padded.reshape(n_groups, size, *planes.shape[1:])
    last_number = 2 ** max(1, (n_groups * size - 1).bit_length()) - 1

    def below(last: Array, _) -> tuple[Array, Array]:
        """The largest integers below `last`."""

        def of_group(best: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
            group, first = inputs
            for a in range(size):
                bits = jax.lax.bitcast_convert_type(group[a], jnp.int32)
                number = (bits & (0x7FFFFFFF ^ last_number)) | (last_number - first - a)
                best = jnp.maximum(best, jnp.where(number < last, number, 0))
            return best, None

        firsts = jnp.arange(n_groups, dtype=jnp.int32) * size
        best, _ = jax.lax.scan(of_group, jnp.zeros_like(last), (groups, firsts))
        return best, best

    highest = jnp.full(planes.shape[1:], 0x7FFFFFFF, jnp.int32)
    _, found = jax.lax.scan(below, highest, length=top)
    plane = jnp.minimum(last_number - (found & last_number), n_planes - 1)
    # What is left when all planes are taken is no plane: it repeats one that was found.
    value = jnp.where(found > 0, jnp.take_along_axis(planes, plane, axis=0), 0.0)
    return value, plane.astype(jnp.int16)

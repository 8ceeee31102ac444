"""All QK marginals of a block: what each component of a query or of a key is worth everywhere.

    query side   m[t, a, s] = scale * q[t, a] . k_total[s]      sum over a = the score at (t, s)
    key side     m[t, s, c] = scale * q_total[t] . k[s, c]      sum over c = the score at (t, s)

(paper, "QK attributions", marginalised over the other side), for all heads and all pairs that the
head sees, the largest few by |value| of each. A few strips of queries are one matmul each with the
keys up to their end; in a strip the largest are found plane by plane, all places side by side.
float32 magnitudes order like integers, so a magnitude with its plane's number in the last bits is
one integer, and the next largest is a running maximum of those below the last one. Values are
exact given the frozen scales; the *choice* is by magnitudes less the bits that hold the number (5
to 9 of 23), so that of two within 2^-14 of each other either may come first.
Axes: T query position, S key position, N heads, A/C slots, P kept, H head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig
from qkattr.kinds import Kind
from qkattr.model.transformer import block
from qkattr.qk.terms import every_query_component, key_components
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import Components
from qkattr.types import BlockWeights

#: Strips of queries, each of which meets the keys up to its end.
STRIPS = 4
#: Planes compared in one fused pass.
PLANES = 64


@struct.dataclass
class Marginals:
    """The P largest marginals of every place, by falling |value|; slot -1 and value 0 where there
    are fewer, or the query does not see the key.

    query_value, key_value: `[N, P, T, S]` what the component of either side is worth there.
    query_slot, key_slot: `[N, P, T, S]` which component it is.
    score: `[N, T, S]` the head's, before the softcap.
    pattern: `[N, T, S]` its attention.
    """

    query_value: Float[Array, "N P T S"]
    query_slot: Int[Array, "N P T S"]
    key_value: Float[Array, "N P T S"]
    key_slot: Int[Array, "N P T S"]
    score: Float[Array, "N T S"]
    pattern: Float[Array, "N T S"]


@partial(jax.jit, static_argnames=("top", "n_strips", "cfg", "precision"))
@on_any_mesh
@checked
def block_marginals(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    components: Components,
    *,
    top: int = 5,
    n_strips: int = STRIPS,
    cfg: BlockConfig,
    precision: str = "highest",
) -> Marginals:
    """The largest marginals of all heads of a block at all (t, s).

    Args:
      weights: the block's. x: the residual stream it reads. components: of it.
      top: how many of either side at each place (static).
      n_strips: how the queries are cut up (static).
    """
    _, seen = block(weights, x, cfg=cfg, precision=precision)
    n_positions, n_heads = x.shape[0], weights.wq_DNH.shape[1]
    group = weights.group
    how: dict[str, Any] = dict(cfg=cfg, precision=precision)
    dots = partial(jnp.einsum, "CXH,YH->CXY", precision=precision)
    t, s = jnp.arange(n_positions)[:, None], jnp.arange(n_positions)[None]
    real = (components.kind != int(Kind.NONE)).any(-1)[:, None]
    pair = (t >= s) & (t - s < weights.window) & real

    def of_kv_head(kv: Array):
        parts_k = key_components(weights, components, seen, kv * group, **how) * cfg.scale
        parts_k, k = parts_k.swapaxes(0, 1), seen.k_SKH[:, kv]

        def of_head(head: Array):
            parts_q = every_query_component(weights, components, seen, head, **how) * cfg.scale
            parts_q, q = parts_q.swapaxes(0, 1), seen.q_TNH[:, head]
            strips = [
                strip(parts_q, q, parts_k, k, *ends) for ends in _strips(n_positions, n_strips)
            ]
            return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), *strips)

        return jax.lax.map(of_head, kv * group + jnp.arange(group))

    def strip(parts_q, q, parts_k, k, first: int, last: int):
        """Queries `first` to `last`, and the keys up to there."""
        at_q = largest(dots(parts_q[:, first:last], k[:last]), top)
        at_k = largest(dots(parts_k[:, :last], q[first:last]), top)
        found = []
        for value, slot in (at_q, [a.swapaxes(1, 2) for a in at_k]):
            here = pair[None, first:last, :last]
            value = jnp.where(here, value, 0.0)
            slot = jnp.where(here & (value != 0), slot, -1)
            later = ((0, 0), (0, 0), (0, n_positions - last))
            found.append((jnp.pad(value, later), jnp.pad(slot, later, constant_values=-1)))
        return found

    found = jax.lax.map(of_kv_head, jnp.arange(n_heads // group))
    found = jax.tree.map(lambda a: a.reshape(n_heads, *a.shape[2:]), found)
    (query_value, query_slot), (key_value, key_slot) = found
    return Marginals(
        query_value=query_value,
        query_slot=query_slot,
        key_value=key_value,
        key_slot=key_slot,
        score=seen.scores_NTS,
        pattern=seen.pattern_NTS,
    )


def _strips(n_positions: int, n_strips: int) -> list[tuple[int, int]]:
    """The first and last + 1 query of each strip."""
    size = -(-n_positions // n_strips)
    return [(i, min(i + size, n_positions)) for i in range(0, n_positions, size)]


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

"""QK pair effects: how much the match of two components moves a target, to first order.

With `term[a, c]` the pairs' terms of the score at (t, s) (`qk.terms`) and `d[s]` the derivative of
the target with respect to the head's score at (t, s) (`graph.effects`), DESIGN: effects,

    here[a, c]      = term[a, c] d[s]                                      sum = score(t, s) d[s]
    over_keys[a, c] = sum_s' term[a, the same key component at s'] d[s']

The first is what the match at this key alone does. The derivatives of a query's scores sum to 0
over the keys (without a softcap), so a term that is equal at all keys moves nothing, and the second
view says so: it is what the target loses, to first order, when the match of `a` with `c` is taken
out of the head's scores at all keys. The same component has the same kind and index; a key at which
it is not active adds nothing. Terms are exact given the frozen norm scales; `d` holds everything
behind the head's pattern frozen, and has the softcap's slope in it.
Axes: P places, R targets, T/S positions, A query-side slots, C key-side slots, H head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig
from qkattr.model.attention import apart
from qkattr.model.transformer import block
from qkattr.qk.terms import key_components, query_components, same_component
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import ComponentStack
from qkattr.types import BlockStack


@struct.dataclass
class PairEffects:
    """Effects of the pairs (query component, key component) of P places on R targets.

    here: `[P, R, A, C]` by the match at the place's own key.
    over_keys: `[P, R, A, C]` by the match at every key at which the component of that key is.
    """

    here: Float[Array, "P R A C"]
    over_keys: Float[Array, "P R A C"]


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
@checked
def pair_effects(
    blocks: BlockStack,
    boundaries: Float[Array, "L+1 T D"],
    components: ComponentStack,
    places: Int[Array, "P place=4"],
    derivative: Float[Array, "P R S"],
    *,
    cfg: BlockConfig,
    precision: str = "highest",
) -> PairEffects:
    """The pair effects of P places, one place after another.

    Args:
      blocks, boundaries, components: of the prompt, stacked.
      places: (block, head, query, key), key <= query.
      derivative: `PlaceEffects.derivative` of the places, or the rows of `Effects.derivative`.
      cfg: the block's configuration (static).
    """

    def one(inputs):
        (b, head, query, key), derivative_RS = inputs
        weights, parts = jax.tree.map(lambda a: a[b], (blocks, components))
        weights, head = apart(weights, head)
        _, seen = block(weights, boundaries[b], cfg=cfg, precision=precision)
        how: dict[str, Any] = dict(cfg=cfg, precision=precision)
        q = query_components(weights, parts, seen, head, query, **how) * cfg.scale
        k = key_components(weights, parts, seen, head, **how)
        terms = jnp.einsum("AH,CH->AC", q, k[key], precision=precision)
        elsewhere = jax.vmap(lambda d: same_component(parts, k, d, key))(derivative_RS)
        return PairEffects(
            here=terms[None] * derivative_RS[:, key, None, None],
            over_keys=jnp.einsum("AH,RCH->RAC", q, elsewhere, precision=precision),
        )

    return jax.lax.map(one, (places, derivative))

"""Effects: a target accounted for, signed, at every boundary.

Patterns, norm scales and MLPs are frozen at the prompt, so the model is linear and a target's
covector can be carried back densely through all blocks: `G_b [T, D]`, what the target reads of
boundary b, and `K_b`, the constants of blocks >= b and of the target itself (DESIGN: effects):

    target = sum_{t,c} G_b[t] . x_{b,t,c} + K_b                                   at every boundary
    node effect   (b, t, c)       = G_b[t] . x_{b,t,c}
    head effect   (b, n, t, s, c) = A_n[t,s] G_mid[t] . O_n V_n N'(x_{b,s,c})
    derivative    (b, n, t, s)    = slope[t,s] A_n[t,s] (e[t,s] - sum_s' A_n[t,s'] e[t,s'])
                                    e[t,s] = G_mid[t] . O_n V_n N'(x_{b,s})

`G_mid` is the covector on what attention adds to the residual stream: G_{b+1}, with its part
through the block's MLP unless the block is parallel. A derivative is that of the target with
respect to the attention score before the softcap (`slope` is the softcap's, 1 without one), when
nothing but that head's pattern at t moves; the head's constants (b_V, the norm's bias) are the same
for every key and drop out of it. All are in the target's unit, and nothing is pruned. Exact given
what is frozen; the derivative is first order. An effect is not the change under ablation.

Above its own boundary a target's effects are 0. Memory: G has R times the size of the boundaries,
the head arrays L * R * N * T * S numbers each; nothing has the size T * S * C.
Axes: R targets, P places, L blocks, T/S positions, C slots, N heads, D d_model, X kinds.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig
from qkattr.graph.live import masking
from qkattr.kinds import ACCOUNT_KINDS
from qkattr.model.attention import capped
from qkattr.model.linear import FrozenBlock, freeze, head_reads, pull, pull_stream, values
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import Components, ComponentStack
from qkattr.types import BlockStack

#: What an effect weighs beside a masking where places are ordered.
LAST = 1e-20

#: Positions whose component vectors are gathered together, at most.
POSITIONS_AT_ONCE = 16


@struct.dataclass
class HeadPlaces:
    """The K places of every block whose masking takes most from one target (or from a weighted sum
    of targets), by falling |masking|; places without any at the end.

    head, query, key: `[L, K]` the places.
    masking: `[L, K]` see `graph.live`.
    effect, derivative: `[L, K]` as `head` and `derivative` of `Effects`.
    score: `[L, K]` before the softcap.
    probability: `[L, K]` the attention.
    """

    head: Int[Array, "L K"]
    query: Int[Array, "L K"]
    key: Int[Array, "L K"]
    masking: Float[Array, "L K"]
    effect: Float[Array, "L K"]
    derivative: Float[Array, "L K"]
    score: Float[Array, "L K"]
    probability: Float[Array, "L K"]


@struct.dataclass
class Effects:
    """The account of R targets at every boundary.

    value: `[R]` the targets.
    covector: `[L+1, R, T, D]` G.
    constant: `[L+1, R, T]` what the block below the boundary adds at t that comes from no component
      (b >= 1), and at the target's own boundary and position the target's constant.
    node: `[L+1, R, T, C]` the effect of every component.
    account: `[L+1, R, X]` the effects summed by `ACCOUNT_KINDS`, the last being K; up to the
      target's own boundary its rows sum to the target.
    head: `[L, R, N, T, S]` the effect of every head from s to t, all components at s together; None
      when it was not asked for.
    derivative: `[L, R, N, T, S]` of the target with respect to every attention score, summing to 0
      over S without a softcap; None when it was not asked for.
    places: the strongest places of every block, where they were asked for.
    """

    value: Float[Array, "R"]
    covector: Float[Array, "L+1 R T D"]
    constant: Float[Array, "L+1 R T"]
    node: Float[Array, "L+1 R T C"]
    account: Float[Array, "L+1 R X"]
    head: Float[Array, "L R N T S"] | None = None
    derivative: Float[Array, "L R N T S"] | None = None
    places: HeadPlaces | None = None


@struct.dataclass
class PlaceEffects:
    """What lies behind P places (block, head, query, key), for R targets.

    head: `[P, R, C]` the head's effect from the key to the query, by component at the key.
    derivative: `[P, R, S]` of the target with respect to the head's scores at this query, all keys.
    """

    head: Float[Array, "P R C"]
    derivative: Float[Array, "P R S"]


@partial(jax.jit, static_argnames=("cfg", "linearisation", "precision", "heads", "strongest"))
@on_any_mesh
@checked
def target_effects(
    blocks: BlockStack,
    boundaries: Float[Array, "L+1 T D"],
    components: ComponentStack,
    target_boundary: Int[Array, "R"],
    target_position: Int[Array, "R"],
    covector: Float[Array, "R D"],
    constant: Float[Array, "R"],
    *,
    cfg: BlockConfig,
    linearisation: str = "jacobian",
    precision: str = "highest",
    heads: bool = True,
    weights: Float[Array, "R"] | None = None,
    live: Float[Array, "L T N H"] | None = None,
    strongest: int = 0,
) -> Effects:
    """Carry R targets back to the embeddings, one reversed scan over the blocks.

    Args:
      blocks: stacked weights.
      boundaries: the residual stream.
      components: of every boundary, stacked.
      target_boundary, target_position: where each target reads the stream; boundary -1: no target.
      covector, constant: `covector . x + constant` is its value (`graph.targets` makes them).
      cfg: the block's configuration (static).
      linearisation: of the MLP (static).
      heads: return head effects and derivatives as well (static).
      strongest: list so many places of every block (static), for the sum of the targets times
        `weights`. live: what that sum reads of every head's output in the live model
        (`graph.live`).
    """
    n_blocks, R = boundaries.shape[0] - 1, covector.shape[0]
    rows = jnp.arange(R)

    def enter(g: Array, b) -> Array:
        """The targets of this boundary join those that were carried down to it."""
        own = jnp.where((target_boundary == b)[:, None], covector, 0.0)
        return g.at[rows, target_position].add(own)

    def step(above, inputs):
        block, x, b, live_here = inputs
        frozen = freeze(block, x, cfg=cfg, linearisation=linearisation, precision=precision)
        pulled = pull_stream(frozen, above)
        g = enter(pulled.below, b)
        dense = _of_heads(frozen, pulled.heads, x) if heads else (None, None)
        places = None
        if strongest:
            one = jnp.einsum("R,RTNH->TNH", weights, pulled.heads, precision="highest")
            places = _strongest(frozen, one, live_here, x, strongest)
        return g, (g, pulled.constant, dense, places)

    top = enter(jnp.zeros((R, *boundaries.shape[1:])), n_blocks)
    with jax.named_scope("effects"):
        inputs = blocks, boundaries[:-1], jnp.arange(n_blocks), live
        _, (g, added, (head, derivative), places) = jax.lax.scan(step, top, inputs, reverse=True)
    g, added = jnp.concatenate([g, top[None]]), jnp.pad(added, ((1, 0), (0, 0), (0, 0)))
    node, by_kind = jax.lax.map(lambda inputs: _account(*inputs), (g, components))
    from_above = jax.lax.cumsum(added.sum(-1), axis=0, reverse=True)[1:]
    below_target = jnp.arange(n_blocks + 1)[:, None] <= target_boundary[None]
    constants = jnp.pad(from_above, ((0, 1), (0, 0))) + jnp.where(below_target, constant[None], 0.0)
    read = boundaries[target_boundary, target_position]
    value = jnp.einsum("RD,RD->R", covector, read, precision="highest") + constant
    is_target = target_boundary >= 0
    return Effects(
        value=jnp.where(is_target, value, 0.0),
        covector=g,
        constant=added.at[target_boundary, rows, target_position].add(is_target * constant),
        node=node,
        account=jnp.concatenate([by_kind, constants[..., None]], axis=-1),
        head=head,
        derivative=derivative,
        places=places,
    )


@partial(jax.jit, static_argnames=("cfg", "linearisation", "precision"))
@on_any_mesh
@checked
def effects_at(
    blocks: BlockStack,
    boundaries: Float[Array, "L+1 T D"],
    components: ComponentStack,
    covector: Float[Array, "L+1 R T D"],
    places: Int[Array, "P place=4"],
    *,
    cfg: BlockConfig,
    linearisation: str = "jacobian",
    precision: str = "highest",
) -> PlaceEffects:
    """Head effects by source component, and a query's score derivatives, at P places.

    Args:
      covector: `Effects.covector` of the same prompt and linearisation.
      places: (block, head, query, key), key <= query. They are mapped over one after another, and
        each computes its block anew, so that no array grows with all heads and positions.
    """
    slots = jnp.arange(components.n_slots)

    def one(place):
        b, head, query, key = place
        weights, parts = jax.tree.map(lambda a: a[b], (blocks, components))
        x, g = boundaries[b], covector[b + 1, :, query]
        frozen = freeze(weights, x, cfg=cfg, linearisation=linearisation, precision=precision)
        pulled = pull(frozen, g, jnp.full(g.shape[0], query))
        on_head, kv = pulled.heads[:, head], head // weights.group
        scale, pattern = frozen.seen.scale_attn_T, frozen.seen.pattern_NTS[head, query]
        dot = partial(jnp.einsum, "RH,XH->RX", on_head, precision=precision)
        sources = values(frozen, parts.at(jnp.full_like(slots, key), slots))[:, kv]
        reads = dot(values(frozen, x)[:, kv] * scale[:, None])
        slope = _cap_slope(frozen.seen.scores_NTS[head, query], cfg)
        return PlaceEffects(
            head=dot(sources * scale[key]) * pattern[key],
            derivative=_softmax_derivative(pattern[None], reads) * slope[None],
        )

    return jax.lax.map(one, places)


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
@checked
def masking_at(
    blocks: BlockStack,
    boundaries: Float[Array, "L+1 T D"],
    live: Float[Array, "L T N H"],
    query: Int[Array, ""],
    key: Int[Array, ""],
    *,
    cfg: BlockConfig,
    precision: str = "highest",
) -> Float[Array, "L N"]:
    """What masking the key takes from the target, for every head at one query (`graph.live`)."""

    def one(inputs):
        weights, x, g = inputs
        frozen = freeze(weights, x, cfg=cfg, precision=precision)
        reads = head_reads(frozen, g[None, query[None]], x)[0, :, 0]
        return masking(frozen.seen.pattern_NTS[:, query], reads)[:, key]

    return jax.lax.map(one, (blocks, boundaries[:-1], live))


def _of_heads(frozen: FrozenBlock, heads: Array, x: Array) -> tuple[Array, Array]:
    """Head effects, and derivatives with respect to the scores: each `[R, N, T, S]`."""
    with jax.named_scope("head_effects"):
        reads, pattern = head_reads(frozen, heads, x), frozen.seen.pattern_NTS[None]
        slope = _cap_slope(frozen.seen.scores_NTS, frozen.cfg)[None]
        return pattern * reads, _softmax_derivative(pattern, reads) * slope


def _strongest(frozen: FrozenBlock, heads: Array, live: Array, x: Array, most: int):
    """`HeadPlaces` of one block. heads, live: `[T, N, H]` what is read of the heads' outputs."""
    effect, derivative = (of_one[0] for of_one in _of_heads(frozen, heads[None], x))
    pattern = frozen.seen.pattern_NTS
    masked = masking(pattern, head_reads(frozen, live[None], x)[0])
    # A query that sees one key has an effect and no masking: it comes before what has neither.
    size = jnp.abs(masked) + LAST * jnp.abs(effect)
    _, flat = jax.lax.top_k(size.ravel(), min(most, effect.size))
    place = jnp.unravel_index(flat, effect.shape)
    return HeadPlaces(
        *place,
        masking=masked[place],
        effect=effect[place],
        derivative=derivative[place],
        score=frozen.seen.scores_NTS[place],
        probability=pattern[place],
    )


def _softmax_derivative(pattern: Float[Array, "... S"], reads: Float[Array, "... S"]) -> Array:
    """Of `sum_s pattern[s] reads[s]` with respect to the capped scores."""
    mean = (pattern * reads).sum(-1, keepdims=True)
    return pattern * (reads - mean)


def _cap_slope(scores: Array, cfg: BlockConfig) -> Array:
    """d capped / d score."""
    return jax.jvp(partial(capped, cfg=cfg), (scores,), (jnp.ones_like(scores),))[1]


def _account(g: Float[Array, "R T D"], components: Components) -> tuple[Array, Array]:
    """The node effects of one boundary `[R, T, C]`, and their sums by kind `[R, X - 1]`."""
    with jax.named_scope("node_effects"):
        node = node_effects(g, components)
        kinds = jnp.array([int(kind) for kind in ACCOUNT_KINDS[:-1]])
        of_kind = (components.kind[None] == kinds[:, None, None]).astype(node.dtype)
        return node, jnp.einsum("RTC,XTC->RX", node, of_kind, precision="highest")


@checked
def node_effects(g: Float[Array, "R T D"], components: Components) -> Float[Array, "R T C"]:
    """`g[t] . x_{t,c}` for every component of one boundary.

    The features' vectors are gathered for a few positions at a time and never held whole.
    """
    R, T, _ = g.shape
    chunk = math.gcd(T, POSITIONS_AT_ONCE)
    cut = lambda a: a.reshape(T // chunk, chunk, *a.shape[1:])

    def few(inputs):
        g_TRD, row = inputs
        return jnp.einsum("TRD,TAD->TRA", g_TRD, components.rows[row], precision="highest")

    features = jax.lax.map(few, (cut(g.swapaxes(0, 1)), cut(components.row)))
    features = features.reshape(T, R, -1).swapaxes(0, 1) * components.coefficient[None]
    dot = partial(jnp.einsum, "RTD,TD->RT", g, precision="highest")
    rest = [dot(components.bias)[..., None], dot(components.error)[..., None]]
    return jnp.concatenate([features, *rest], axis=-1)

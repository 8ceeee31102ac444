"""Competition between keys: why a head looked here and not there, exactly.

With A the pattern of query t, s a key, A' = A renormalised over the other keys, c the score after
the softcap:

    odds         log(A[s] / (1 - A[s])) = c[s] - sum_{s'} A'[s'] c[s'] - entropy(A')
    log          log A[s]               = c[s] - sum_{s'} A[s'] c[s']  - entropy(A)
    difference   log(A[s] / A[r])       = c[s] - c[r]

Each is `sum_{s'} w[s'] c[s'] - entropy`, with a weight for every key; and c[s'] is a sum of terms
(see `qk.terms`), each scaled by capped / raw of its own key, so that the rows

    row[s', a, c] = w[s'] * (capped / raw)[s'] * term[a, c at s']

add up to the left side plus the entropy. A row at s with a negative value holds the head back; a
row at another key with a negative value is a competitor. The [A, S, C] rows of one place are
formed; nothing larger.
Axes: S key position, A query-side slots, C key-side slots, H head_dim. Exact given the frozen
scales.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from qkattr.config import BlockConfig
from qkattr.model.attention import capped, visible
from qkattr.model.transformer import block
from qkattr.qk.terms import apart, key_components, other_keys, query_components, used_slots
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import Components
from qkattr.types import BlockWeights

#: What is decomposed, see above.
FORMS = ("odds", "log", "difference")


@struct.dataclass
class Rows:
    """Some rows of a competition.

    value: `[R]` what each adds.
    query_slot, key_slot: `[R]` its components.
    key: `[R]` its key position.
    """

    value: Float[Array, "R"]
    query_slot: Int[Array, "R"]
    key: Int[Array, "R"]
    key_slot: Int[Array, "R"]


@struct.dataclass
class Nets:
    """Some sums of rows over the keys at which one key component is active.

    value: `[R]` the sums.
    query_slot: `[R]` the query's component.
    identity: `[R]` the key component's identity.
    """

    value: Float[Array, "R"]
    query_slot: Int[Array, "R"]
    identity: Int[Array, "R"]


@struct.dataclass
class Competition:
    """The rows of one place (head, query, key), summed in several ways.

    pattern_S: `[S]` attention.
    raw_S, capped_S: `[S]` scores before and after the softcap.
    seen_S: `[S]` keys that the query sees.
    weight_S: `[S]` w of the module's header.
    entropy: what is subtracted.
    total: the sum of all rows.
    value: the left side, from the pattern itself.
    pushes, pulls: the largest positive and the most negative rows.
    net_pushes, net_pulls: the same of their sums over keys, in which what is equal at all keys
      cancels.
    by_key_S, by_query_A, by_component_SC: sums of rows.
    by_kind, by_kind_absolute: `[I, I]` sums of rows and of |row| by kind (query side, key side).
    query_used, key_used_SC: slots that hold something.
    """

    pattern_S: Float[Array, "S"]
    raw_S: Float[Array, "S"]
    capped_S: Float[Array, "S"]
    seen_S: Bool[Array, "S"]
    weight_S: Float[Array, "S"]
    entropy: Float[Array, ""]
    total: Float[Array, ""]
    value: Float[Array, ""]
    pushes: Rows
    pulls: Rows
    net_pushes: Nets
    net_pulls: Nets
    by_key_S: Float[Array, "S"]
    by_query_A: Float[Array, "A"]
    by_component_SC: Float[Array, "S C"]
    by_kind: Float[Array, "I I"]
    by_kind_absolute: Float[Array, "I I"]
    query_used: Bool[Array, "A"]
    key_used_SC: Bool[Array, "S C"]


@partial(jax.jit, static_argnames=("form", "top", "kinds", "cfg", "precision"))
@on_any_mesh
@checked
def competition(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    components: Components,
    identity: Int[Array, "S C"],
    *,
    head: Int[Array, ""] | int,
    query: Int[Array, ""] | int,
    key: Int[Array, ""] | int,
    other: Int[Array, ""] | int = 0,
    listed: Bool[Array, "S C"] | None = None,
    form: str = "odds",
    top: int = 64,
    kinds: int = 10,
    cfg: BlockConfig,
    precision: str = "highest",
) -> Competition:
    """Decompose one place; `head`, `query`, `key` and `other` may be traced.

    Args:
      weights: the block's. x: the residual stream it reads. components: of it.
      identity: which component a slot holds, 0 to S C - 1: the same number for the same one.
      other: the second key of form "difference"; not read otherwise.
      listed: slots that rows among `pushes`, `pulls` and their nets may have; None: all. The sums
        are of all rows.
      form: one of `FORMS` (static). top: rows of either sign to keep (static). kinds: how many
        values `Kind` has (static).
    """
    weights, head = apart(weights, head)
    _, activations = block(weights, x, cfg=cfg, precision=precision)
    raw = activations.scores_NTS[head, query]
    pattern = activations.pattern_NTS[head, query]
    cap = capped(raw, cfg=cfg)
    seen = visible(x.shape[0], weights.window)[query]
    weight, entropy, value = _weights(
        weights, raw, jnp.where(seen, cap, 0.0), pattern, seen, query, key, other, form, cfg
    )
    ratio = jnp.where(jnp.abs(raw) > 1e-12, cap / jnp.where(raw == 0, 1.0, raw), 1.0)
    q = query_components(
        weights, components, activations, head, query, cfg=cfg, precision=precision
    )
    k = key_components(weights, components, activations, head, cfg=cfg, precision=precision)
    k = k * (weight * ratio * cfg.scale)[:, None, None]
    rows = jnp.einsum("AH,SCH->ASC", q, k, precision=precision)
    shown = rows
    if listed is not None:
        shown = jnp.where(listed[query][:, None, None] & listed[None], rows, 0.0)
    flat = shown.reshape(shown.shape[0], -1).T
    net = jax.ops.segment_sum(flat, identity.ravel(), num_segments=identity.size).T
    each = jax.vmap(lambda s: used_slots(components, s, weights.bk_KH, weights.norm_attn))
    hot_q = jax.nn.one_hot(components.kind[query], kinds)
    hot_k = jax.nn.one_hot(components.kind, kinds)
    by_kind = partial(jnp.einsum, "AI,ASC,SCJ->IJ", hot_q, precision="highest")
    return Competition(
        pattern_S=pattern,
        raw_S=raw,
        capped_S=cap,
        seen_S=seen,
        weight_S=weight,
        entropy=entropy,
        total=rows.sum(),
        value=value,
        pushes=_strongest(shown, top),
        pulls=_strongest(-shown, top, sign=-1.0),
        net_pushes=_nets(net, top),
        net_pulls=_nets(-net, top, sign=-1.0),
        by_key_S=rows.sum((0, 2)),
        by_query_A=rows.sum((1, 2)),
        by_component_SC=rows.sum(0),
        by_kind=by_kind(rows, hot_k),
        by_kind_absolute=by_kind(jnp.abs(rows), hot_k),
        query_used=used_slots(components, query, weights.bq_NH, weights.norm_attn),
        key_used_SC=each(jnp.arange(x.shape[0])),
    )


def _weights(weights, raw, cap, pattern, seen, query, key, other, form, cfg):
    """`(w [S], entropy, left side)` of a form."""
    here = jax.nn.one_hot(key, cap.shape[0])
    if form == "odds":
        others = other_keys(weights, raw, query, key, cfg=cfg)
        rest = jax.nn.logsumexp(jnp.where(seen & (here == 0), cap, -jnp.inf))
        return here - others, _entropy(others), cap[key] - rest
    if form == "log":
        total = jax.nn.logsumexp(jnp.where(seen, cap, -jnp.inf))
        return here - pattern, _entropy(pattern), cap[key] - total
    if form == "difference":
        return here - jax.nn.one_hot(other, cap.shape[0]), jnp.zeros(()), cap[key] - cap[other]
    raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")


def _entropy(p: Float[Array, "S"]) -> Float[Array, ""]:
    return -jax.scipy.special.xlogy(p, p).sum()


def _strongest(rows: Float[Array, "A S C"], top: int, sign: float = 1.0) -> Rows:
    """The largest rows, ties by the lowest (query slot, key, key slot)."""
    value, flat = jax.lax.top_k(rows.ravel(), min(top, rows.size))
    a, s, c = jnp.unravel_index(flat, rows.shape)
    return Rows(value=sign * value, query_slot=a, key=s, key_slot=c)


def _nets(net: Float[Array, "A U"], top: int, sign: float = 1.0) -> Nets:
    value, flat = jax.lax.top_k(net.ravel(), min(top, net.size))
    a, identity = jnp.unravel_index(flat, net.shape)
    return Nets(value=sign * value, query_slot=a, identity=identity)

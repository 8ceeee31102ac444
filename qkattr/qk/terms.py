"""QK attributions: one attention score as a sum over (query component, key component) pairs.

    q[a] = R(t) QN(W_Q N'(component a of t))      k[c] = R(s) KN(W_K N'(component c of s))
    term[a, c] = scale * q[a] . k[c]
    sum over a, c = the model's own score, before softcap and mask

(paper, "QK attributions"). N', QN and KN are the norms with their scales frozen at the prompt;
every additive constant (norm biases, b_Q, b_K) joins the bias slot. A term moves attention only as
far as it differs between keys, so each one carries its contrast:

    contrast[a, c] = term[a, c] - sum_{s' != s} A'[s'] * term[a, the same key component at s']

with A' the pattern renormalised over the other keys; a key component that is not active at s'
counts 0 there. A query component's contrast, likewise, is its marginal at s minus its mean marginal
over the other keys. Without another key to look at there is nothing to contrast, and contrasts
are 0.
Axes: T query position, S key position, A query-side slots, C key-side slots, H head_dim. Exact
given the frozen scales.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from qkattr.config import BlockConfig
from qkattr.kinds import Kind
from qkattr.model.attention import MASKED, apart, capped, finish_head, gain_of, visible
from qkattr.model.layers import f32, norm_bias, norm_direction
from qkattr.model.transformer import block
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import Components, ComponentStack
from qkattr.types import Activations, BlockStack, BlockWeights, Norm


@struct.dataclass
class QKTerms:
    """The score of one head at one (query, key), expanded.

    terms: `[A, C]` what each pair of components adds to the score.
    contrast: `[A, C]` what of it differs from other keys.
    query_contrast: `[A]` the same of the query marginals.
    score: the model's, after the scale and before the softcap.
    capped: the score after the softcap.
    slope: d capped / d score.
    probability: the attention there.
    query_used, key_used: `[A]`, `[C]` slots that hold something.
    query_kind, key_kind: `[A]`, `[C]` of `Kind`.
    query_index, key_index: `[A]`, `[C]` feature id, token id, position, or -1.
    query_activation, key_activation: `[A]`, `[C]` in the SAE's own units.
    """

    terms: Float[Array, "A C"]
    contrast: Float[Array, "A C"]
    query_contrast: Float[Array, "A"]
    score: Float[Array, ""]
    capped: Float[Array, ""]
    slope: Float[Array, ""]
    probability: Float[Array, ""]
    query_used: Bool[Array, "A"]
    key_used: Bool[Array, "C"]
    query_kind: Int[Array, "A"]
    key_kind: Int[Array, "C"]
    query_index: Int[Array, "A"]
    key_index: Int[Array, "C"]
    query_activation: Float[Array, "A"]
    key_activation: Float[Array, "C"]

    @property
    def query_marginals(self) -> Float[Array, "A"]:
        """Each query component's term summed over the key side."""
        return self.terms.sum(1)

    @property
    def key_marginals(self) -> Float[Array, "C"]:
        """Each key component's term summed over the query side."""
        return self.terms.sum(0)


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
@checked
def qk_terms(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    components: Components,
    *,
    head: Int[Array, ""] | int,
    query: Int[Array, ""] | int,
    key: Int[Array, ""] | int,
    cfg: BlockConfig,
    precision: str = "highest",
) -> QKTerms:
    """Expand the score of `head` at (`query`, `key`); the three may be traced,
    so this can be mapped over.

    Args:
      weights: the block's.
      x: the residual stream it reads.
      components: of that residual stream.
      head, query, key: query head, query position, key position (key <= query).
      cfg: the block's configuration.
    """
    weights, head = apart(weights, head)
    _, seen = block(weights, x, cfg=cfg, precision=precision)
    scores_TS = seen.scores_NTS[head]
    q = query_components(weights, components, seen, head, query, cfg=cfg, precision=precision)
    k = key_components(weights, components, seen, head, cfg=cfg, precision=precision)
    others = other_keys(weights, scores_TS[query], query, key, cfg=cfg)
    baseline = same_component(components, k, others, key)
    dots = partial(jnp.einsum, "AH,CH->AC", precision=precision)
    score = scores_TS[query, key]
    cap, slope = jax.jvp(lambda s: capped(s, cfg=cfg), (score,), (jnp.ones_like(score),))
    terms = dots(q, k[key]) * cfg.scale
    elsewhere = jnp.einsum("S,SCH->H", others, k, precision="highest")
    k_contrast = jnp.where(others.sum() > 0, k[key].sum(0) - elsewhere, 0.0)
    return QKTerms(
        terms=terms,
        contrast=jnp.where(others.sum() > 0, terms - dots(q, baseline) * cfg.scale, 0.0),
        query_contrast=q @ k_contrast * cfg.scale,
        score=score,
        capped=cap,
        slope=slope,
        probability=seen.pattern_NTS[head, query, key],
        query_used=used_slots(components, query, weights.bq_NH, weights.norm_attn),
        key_used=used_slots(components, key, weights.bk_KH, weights.norm_attn),
        query_kind=components.kind[query],
        key_kind=components.kind[key],
        query_index=components.index[query],
        key_index=components.index[key],
        query_activation=components.activations[query],
        key_activation=components.activations[key],
    )


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
@checked
def qk_terms_many(
    blocks: BlockStack,
    boundaries: Float[Array, "L+1 T D"],
    components: ComponentStack,
    places: Int[Array, "P place=4"],
    *,
    cfg: BlockConfig,
    precision: str = "highest",
) -> QKTerms:
    """`qk_terms` for P places (block, head, query, key) of one prompt;
    blocks and components are stacked.
    """

    def one(place):
        b, head, query, key = place
        weights, x, parts = jax.tree.map(lambda a: a[b], (blocks, boundaries[:-1], components))
        return qk_terms(
            weights, x, parts, head=head, query=query, key=key, cfg=cfg, precision=precision
        )

    return jax.lax.map(one, places)


def _project(
    norm: Norm | None, w_DH: Array, bias_H: Array | None, cfg: BlockConfig, precision: str
) -> tuple[Callable[[Array], Array], Array | float]:
    """The linear map of vectors to one head, before the norm's scale;
    and what it adds to a zero residual stream.
    """
    w_DH = f32(w_DH)
    dot = partial(jnp.einsum, "...D,DH->...H", precision=precision)
    beta = norm_bias(norm)
    constant = 0.0 if isinstance(beta, float) else dot(beta, w_DH)
    constant = constant if bias_H is None else constant + f32(bias_H)
    return lambda vectors: dot(norm_direction(norm, vectors, cfg=cfg), w_DH), constant


@checked
def query_components(
    weights: BlockWeights,
    components: Components,
    seen: Activations,
    head: Int[Array, ""] | int,
    query: Int[Array, ""] | int,
    *,
    cfg: BlockConfig,
    precision: str,
    at: Int[Array, ""] | int | None = None,
) -> Float[Array, "A H"]:
    """A head's query at one position, component by component; turned as at position `at`."""
    n_slots = components.n_slots
    bias = None if weights.bq_NH is None else weights.bq_NH[head]
    to_head, constant = _project(weights.norm_attn, weights.wq_DNH[:, head], bias, cfg, precision)
    vectors = components.at(jnp.full(n_slots, query), jnp.arange(n_slots))
    raw = to_head(vectors) * seen.scale_attn_T[query]
    raw = raw.at[components.bias_slot].add(constant)
    return finish_head(
        raw[None],
        seen.scale_q_TN[query, head][None, None],
        gain=gain_of(weights.norm_q, head),
        inv_freq=weights.inv_freq,
        positions=jnp.asarray(query if at is None else at)[None],
    )[0]


@checked
def key_components(
    weights: BlockWeights,
    components: Components,
    seen: Activations,
    head: Int[Array, ""] | int,
    *,
    cfg: BlockConfig,
    precision: str,
    at: Int[Array, "S"] | None = None,
) -> Float[Array, "S C H"]:
    """The keys that a head reads, component by component; turned as at positions `at`, `[S]`."""
    kv = head // weights.group
    bias = None if weights.bk_KH is None else weights.bk_KH[kv]
    side = (weights.wk_DKH[:, kv], bias, gain_of(weights.norm_k, kv), seen.scale_k_SK[:, kv])
    return _at_every_position(weights, components, seen, side, at, cfg=cfg, precision=precision)


@checked
def every_query_component(
    weights: BlockWeights,
    components: Components,
    seen: Activations,
    head: Int[Array, ""] | int,
    *,
    cfg: BlockConfig,
    precision: str,
) -> Float[Array, "T A H"]:
    """A head's queries at all positions, component by component."""
    bias = None if weights.bq_NH is None else weights.bq_NH[head]
    side = (weights.wq_DNH[:, head], bias, gain_of(weights.norm_q, head), seen.scale_q_TN[:, head])
    return _at_every_position(weights, components, seen, side, None, cfg=cfg, precision=precision)


def _at_every_position(weights, components, seen, side, at, *, cfg, precision):
    """side: weights, bias, QK-norm gain and its scale `[T]` of one head."""
    w_DH, bias_H, gain, scale_T = side
    to_head, constant = _project(weights.norm_attn, w_DH, bias_H, cfg, precision)
    raw = components.map(to_head) * seen.scale_attn_T[:, None, None]
    raw = raw.at[:, components.bias_slot].add(constant)
    positions = jnp.arange(raw.shape[0]) if at is None else at
    return finish_head(
        raw, scale_T[:, None], gain=gain, inv_freq=weights.inv_freq, positions=positions
    )


def other_keys(weights, scores_S, query, key, *, cfg) -> Float[Array, "S"]:
    """The pattern renormalised over the visible keys other than `key`; zeros when there is none."""
    position = jnp.arange(scores_S.shape[0])
    seen = visible(scores_S.shape[0], weights.window)[query] & (position != key)
    pattern = jax.nn.softmax(jnp.where(seen, capped(scores_S, cfg=cfg), MASKED))
    return jnp.where(seen, pattern, 0.0)


def same_component(
    components: Components, k: Float[Array, "S C H"], weight: Float[Array, "S"], key
) -> Float[Array, "C H"]:
    """Each key component of `key`, summed over the keys with their weights:
    matched by kind and index, and 0 where it is not active.
    """
    same = (components.kind[key][:, None, None] == components.kind[None]) & (
        components.index[key][:, None, None] == components.index[None]
    )
    matched = jnp.where(same, weight[None, :, None], 0.0)
    return jnp.einsum("CSX,SXH->CH", matched, k, precision="highest")


def used_slots(
    components: Components, position, bias: Array | None, norm: Norm | None
) -> Bool[Array, "C"]:
    """Slots that are components: the bias slot only where it carries a vector or constants."""
    kind = components.kind[position]
    constants = bias is not None or (norm is not None and norm.bias is not None)
    carries = constants | (components.bias[position] != 0).any()
    return (kind != Kind.NONE) & ((kind != Kind.BIAS) | carries)

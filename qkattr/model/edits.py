"""Edits of a forward pass: what to change inside it, as one pytree.

A read edit scales a component d (of a feature, an error, a token) in what W_Q or W_K of chosen
heads reads, and nowhere else; values, and what other heads read, stay:

    q_n[t] = R(t) QN(W_Q N(x[t] + (scale - 1) d) + b_Q)         on the query side of head n at t
    k_n[s] = R(s) KN(W_K N(x[s] + (scale - 1) d) + b_K)         on the key side of head n at s

(paper, "Examples"; DESIGN: interventions). With the norms' scales frozen at the unedited x, the
default, the score moves by exactly (scale - 1) times the component's QK marginal; with
`live_scales` the edited read is normalised by its own. Keys are edited per query head, so that with
grouped-query attention the group mates of an edited head see the key as it was. Edits at the same
place add up; an edit of scale 1 leaves every bit as it was.

Axes: L block, E edits a block, T/S positions, N heads, D d_model, H head_dim, Q query rows. Exact.
"""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from qkattr.config import BlockConfig
from qkattr.model.attention import finish_head, head_scale
from qkattr.model.layers import f32, lifted, norm_bias, norm_linear, norm_scale
from qkattr.types import Activations, BlockWeights


@struct.dataclass
class ReadEdits:
    """Components scaled in what one side of chosen heads reads: E of one block, or of L of them
    stacked on a leading axis.

    position_E: `[E]` where, 0..T-1.
    vector_ED: `[E, D]` the component as it was in the clean run.
    scale_E: `[E]` what it is multiplied by; an unused row has 1.
    heads_EN: `[E, N]` which heads read the edit.
    """

    position_E: Int[Array, "E"]
    vector_ED: Float[Array, "E D"]
    scale_E: Float[Array, "E"]
    heads_EN: Bool[Array, "E N"]


@struct.dataclass
class PatternEdits:
    """Patterns put in the place of the computed ones.

    With the clean run's patterns and every head but the edited ones, this is "other heads frozen".

    pattern_NTS: `[N, T, S]` the patterns to put in.
    rows_NT: `[N, T]` of which head, at which query.
    """

    pattern_NTS: Float[Array, "N T S"]
    rows_NT: Bool[Array, "N T"]


@struct.dataclass
class ResidualEdits:
    """Vectors added to the residual stream (ordinary steering).

    boundary_E: `[E]` where; a boundary outside 0..L edits nothing, so edits can be padded.
    position_E: `[E]` at which position.
    delta_ED: `[E, D]` what is added.
    """

    boundary_E: Int[Array, "E"]
    position_E: Int[Array, "E"]
    delta_ED: Float[Array, "E D"]


@struct.dataclass
class BlockEdits:
    """What to change inside one block, or in L of them stacked on a leading axis; None: nothing.

    query, key: what W_Q and W_K read.
    patterns: put in place of the computed ones.
    head_scale_TN: `[T, N]` what each head's output (before W_O) is multiplied by (0: ablated).
    head_add_TNH: `[T, N, H]` what is added to it after that.
    frozen: norm scales measured in another run, used instead of this run's own (edited reads with
      live_scales excepted).
    live_scales: an edited read is normalised by its own scale, not by that of the residual stream.
    """

    query: ReadEdits | None = None
    key: ReadEdits | None = None
    patterns: PatternEdits | None = None
    head_scale_TN: Float[Array, "T N"] | None = None
    head_add_TNH: Float[Array, "T N H"] | None = None
    frozen: Activations | None = None
    live_scales: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Edits:
    """What to change in a forward pass. Empty: nothing. All of it composes.

    residual: what is added to the residual stream.
    blocks: what changes inside blocks, stacked on a leading axis L.
    """

    residual: ResidualEdits | None = None
    blocks: Annotated[BlockEdits, "L"] = BlockEdits()  # noqa: RUF009  (an immutable, empty pytree)


def edited_residual(
    edits: ResidualEdits | None, x: Float[Array, "T D"], boundary: Int[Array, ""] | int
) -> Float[Array, "T D"]:
    """The residual stream of a boundary with its edits added."""
    if edits is None:
        return x
    here = (edits.boundary_E == boundary)[:, None]
    return x.at[edits.position_E].add(jnp.where(here, edits.delta_ED, 0.0))


def edited_queries(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    seen: tuple[Array, Array, Array],
    edits: BlockEdits,
    *,
    cfg: BlockConfig,
    precision: str,
) -> Float[Array, "T N H"]:
    """Queries with the block's query-side edits made.

    seen: the queries `[T, N, H]`, and the scales of norm `[T]` and QK-norm `[T, N]` of the unedited
    read.
    """
    q, *scales = seen
    if edits.query is None:
        return q
    how: dict[str, Any] = dict(live=edits.live_scales, cfg=cfg, precision=precision)
    new, changed = _edited_reads(weights, x, scales, edits.query, "query", **how)
    at = edits.query.position_E
    return q.at[at].set(jnp.where(changed[..., None], new, q[at]))


def edited_scores(
    weights: BlockWeights,
    x: Float[Array, "S D"],
    q_TNH: Float[Array, "T N H"],
    seen: tuple[Array, Array, Array],
    edits: BlockEdits,
    *,
    cfg: BlockConfig,
    precision: str,
) -> Float[Array, "N T S"]:
    """Scores with the block's key-side edits made.

    q: edited already. seen: the scores without them, and the scales of norm `[S]` and QK-norm
    `[S, K]` of the unedited read.
    """
    scores, *scales = seen
    if edits.key is None:
        return scores
    how: dict[str, Any] = dict(live=edits.live_scales, cfg=cfg, precision=precision)
    new, changed = _edited_reads(weights, x, scales, edits.key, "key", **how)
    at = edits.key.position_E
    columns = jnp.einsum("TNH,ENH->NTE", q_TNH, new, precision=precision) * cfg.scale
    return scores.at[:, :, at].set(jnp.where(changed.T[:, None], columns, scores[:, :, at]))


def edited_pattern(edits: BlockEdits, pattern: Float[Array, "N T S"]) -> Float[Array, "N T S"]:
    """Patterns with the overridden rows put in."""
    if edits.patterns is None:
        return pattern
    return jnp.where(edits.patterns.rows_NT[..., None], edits.patterns.pattern_NTS, pattern)


def edited_outputs(edits: BlockEdits, heads: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
    """Heads' outputs, scaled and added to."""
    if edits.head_scale_TN is not None:
        heads = heads * edits.head_scale_TN[..., None]
    return heads if edits.head_add_TNH is None else heads + edits.head_add_TNH


def _edited_reads(
    weights: BlockWeights, x, scales, made: ReadEdits, side: str, *, live: bool, cfg, precision
) -> tuple[Float[Array, "E N H"], Bool[Array, "E N"]]:
    """What every head makes of the edited read at every edit's position, and which heads are
    edited there. Rows at the same position agree: each sees all of the position's edits.

    side: the half of the QK circuit that is edited, "query" or "key"; X is its N or K. live: an
    edited read is normalised by its own scale.
    """
    if side == "query":
        w_DXH, bias_XH, gain = weights.wq_DNH, weights.bq_NH, weights.norm_q
    else:
        w_DXH, bias_XH, gain = weights.wk_DKH, weights.bk_KH, weights.norm_k
    position, (n_edits, n_heads) = made.position_E, made.heads_EN.shape
    together = position[:, None] == position[None]
    factor = (made.scale_E - 1.0)[:, None] * made.heads_EN
    delta = jnp.einsum("EF,FN,FD->END", together, factor, made.vector_ED, precision="highest")
    changed = (together[..., None] & (factor != 0)[None]).any(1)
    read = x[position][:, None] + delta
    scale, scale_head = (s[position] for s in scales)
    scale = norm_scale(weights.norm_attn, read, cfg=cfg) if live else scale[:, None]
    y = norm_linear(weights.norm_attn, read, scale, cfg=cfg) + lifted(
        norm_bias(weights.norm_attn), read
    )
    n_projections = w_DXH.shape[1]
    grouped = y.reshape(n_edits, n_projections, n_heads // n_projections, -1)
    raw = jnp.einsum("EXGD,DXH->EXGH", grouped, f32(w_DXH), precision=precision)
    raw = raw if bias_XH is None else raw + lifted(f32(bias_XH)[:, None], raw)
    if not live:
        scale_head = scale_head[..., None]
    elif gain is None or gain.ndim == 1:
        scale_head = head_scale(gain, raw, cfg=cfg)
    else:  # a QK-norm of all heads: each is normalised as if all of them read what it reads
        every = jnp.einsum("EXGD,DYH->EXGYH", grouped, f32(w_DXH), precision=precision)
        every = every if bias_XH is None else every + lifted(f32(bias_XH), every)
        scale_head = head_scale(gain, every, cfg=cfg)[..., 0]
    new = finish_head(
        raw,
        scale_head,
        gain=gain if gain is None or gain.ndim == 1 else gain[:, None],
        inv_freq=weights.inv_freq,
        positions=position,
    )
    return new.reshape(n_edits, n_heads, -1), changed


def batched_axes(edits: Edits) -> Edits:
    """Which leaves of `edits` carry a leading batch axis: 0 there, None elsewhere, for `jax.vmap`.

    A leaf is batched when it has one axis more than the letters that end its name say (and the L of
    `blocks`).
    """

    def axis(path, leaf: Array) -> int | None:
        names = [entry.name for entry in path]
        expected = len(names[-1].rsplit("_", 1)[-1]) + (names[0] == "blocks")
        return 0 if leaf.ndim == expected + 1 else None

    return jax.tree_util.tree_map_with_path(axis, edits)

"""Attention: projections to head space, scores, patterns.

    q[t] = R(t) QN(W_Q y[t] + b_Q)    k[s] = R(s) KN(W_K y[s] + b_K)    score = scale * q[t] . k[s]

with y the block's normed input, R rotary, QN and KN an optional RMSNorm (QK-norm) of each head, or
of all heads together: its gain is `[H]` or `[N, H]`, and its scale in the second case the same for
all heads. `finish_head` takes the QK-norm's scale as an argument, so that the forward pass (the
scale of the whole query) and the expansion of a score into components (the same scale, frozen) are
one piece of code.
Axes: T query position, S key position, D d_model, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qkattr.config import BlockConfig
from qkattr.model.layers import f32, lifted, rotate, softcap
from qkattr.types import BlockWeights

MASKED = -1e30  # a finite stand-in for -inf: exp of it is exactly 0 in float32, and it makes no NaN


def head_scale(
    gain: Array | None, q: Float[Array, "... N H"], *, cfg: BlockConfig
) -> Float[Array, "... N"]:
    """The QK-norm's scale at every head: 1 / rms of its query or key, or of those of all heads; 1
    where there is none."""
    if gain is None:
        return jnp.ones(q.shape[:-1], jnp.float32)
    square = jnp.mean(jnp.square(q), -1)
    if gain.ndim == 2:
        square = jnp.broadcast_to(square.mean(-1, keepdims=True), square.shape)
    return jax.lax.rsqrt(square + cfg.eps)


def gain_of(gain: Array | None, head: Int[Array, ""] | int) -> Float[Array, "H"] | None:
    """One head's gain of the QK-norm."""
    return gain if gain is None or gain.ndim == 1 else gain[head]


def apart(
    weights: BlockWeights, head: Int[Array, ""] | int
) -> tuple[BlockWeights, Int[Array, ""] | int]:
    """A block to run a head in, and its number there: with this query head and its key head alone,
    or the whole block where a QK-norm goes over all heads.
    """
    if weights.norm_q is not None and weights.norm_q.ndim == 2:
        return weights, head
    kv = head // weights.group

    def pick(w: Array | None, axis: int, n) -> Array | None:
        return None if w is None else jax.lax.dynamic_slice_in_dim(w, n, 1, axis)

    alone = dataclasses.replace(
        weights,
        wq_DNH=pick(weights.wq_DNH, 1, head),
        wk_DKH=pick(weights.wk_DKH, 1, kv),
        wv_DKH=pick(weights.wv_DKH, 1, kv),
        wo_NHD=pick(weights.wo_NHD, 0, head),
        bq_NH=pick(weights.bq_NH, 0, head),
        bk_KH=pick(weights.bk_KH, 0, kv),
        bv_KH=pick(weights.bv_KH, 0, kv),
    )
    return alone, 0


def finish_head(
    raw: Float[Array, "T ... H"],
    scale: Float[Array, "T ..."],
    *,
    gain: Array | None,
    inv_freq: Float[Array, "pairs"],
    positions: Int[Array, "T"],
) -> Float[Array, "T ... H"]:
    """From a projection to the query or key that meets in the score:
    QK-norm at the given scale, then rotary.

    Linear in `raw`, so that it takes whole queries and the components of queries alike.
    """
    return rotate(
        raw if gain is None else raw * lifted(f32(gain), raw) * scale[..., None],
        positions,
        inv_freq,
    )


def project_q(
    weights: BlockWeights,
    y: Float[Array, "T D"],
    scale: Float[Array, "T N"] | None = None,
    *,
    cfg: BlockConfig,
    precision: str,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Queries after QK-norm and rotary, and the QK-norm's scale: the one given, or their own."""
    raw = jnp.einsum("TD,DNH->TNH", y, f32(weights.wq_DNH), precision=precision)
    return _finish_whole(raw, weights.bq_NH, weights.norm_q, weights.inv_freq, scale, cfg)


def project_k(
    weights: BlockWeights,
    y: Float[Array, "S D"],
    scale: Float[Array, "S K"] | None = None,
    *,
    cfg: BlockConfig,
    precision: str,
) -> tuple[Float[Array, "S K H"], Float[Array, "S K"]]:
    """Keys after QK-norm and rotary, and the QK-norm's scale: the one given, or their own."""
    raw = jnp.einsum("SD,DKH->SKH", y, f32(weights.wk_DKH), precision=precision)
    return _finish_whole(raw, weights.bk_KH, weights.norm_k, weights.inv_freq, scale, cfg)


def _finish_whole(raw, bias, gain, inv_freq, scale, cfg):
    raw = raw if bias is None else raw + lifted(f32(bias), raw)
    scale = head_scale(gain, raw, cfg=cfg) if scale is None else scale
    positions = jnp.arange(raw.shape[0])
    return finish_head(raw, scale, gain=gain, inv_freq=inv_freq, positions=positions), scale


def project_v(
    weights: BlockWeights, y: Float[Array, "S D"], *, precision: str
) -> Float[Array, "S K H"]:
    """Values."""
    v_SKH = jnp.einsum("SD,DKH->SKH", y, f32(weights.wv_DKH), precision=precision)
    return v_SKH + (0.0 if weights.bv_KH is None else lifted(f32(weights.bv_KH), v_SKH))


def visible(n_positions: int, window: Int[Array, ""]) -> Bool[Array, "T S"]:
    """Which keys a query sees: s <= t, and s > t - window."""
    distance = jnp.arange(n_positions)[:, None] - jnp.arange(n_positions)[None, :]
    return (distance >= 0) & (distance < window)


def attention_scores(
    q_TNH: Float[Array, "T N H"], k_SKH: Float[Array, "S K H"], *, cfg: BlockConfig, precision: str
) -> Float[Array, "N T S"]:
    """`scale * q . k`, before softcap and mask."""
    T, N, H = q_TNH.shape
    K = k_SKH.shape[1]
    grouped = q_TNH.reshape(T, K, N // K, H)
    scores = jnp.einsum("TKGH,SKH->KGTS", grouped, k_SKH, precision=precision) * cfg.scale
    return scores.reshape(N, T, -1)


def capped(scores: Float[Array, "..."], *, cfg: BlockConfig) -> Float[Array, "..."]:
    """The softcap of Gemma 2; the scores themselves elsewhere."""
    return softcap(scores, cfg.softcap)


def attention_pattern(
    scores: Float[Array, "N T S"], window: Int[Array, ""], *, cfg: BlockConfig
) -> Float[Array, "N T S"]:
    """Attention probabilities: softmax over visible keys of the capped scores."""
    masked = jnp.where(visible(scores.shape[-1], window), capped(scores, cfg=cfg), MASKED)
    return jax.nn.softmax(masked, axis=-1)


def attend(
    pattern: Float[Array, "N T S"], v_SKH: Float[Array, "S K H"], *, precision: str
) -> Float[Array, "T N H"]:
    """Each head's pattern-weighted values."""
    N, T, S = pattern.shape
    K = v_SKH.shape[1]
    mixed = jnp.einsum(
        "KGTS,SKH->TKGH", pattern.reshape(K, N // K, T, S), v_SKH, precision=precision
    )
    return mixed.reshape(T, N, -1)

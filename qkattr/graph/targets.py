"""Where a sweep starts: logits, differences of logits, attention scores,
as covectors on the residual stream.

    logit       g = N'^T (W_U[:, v] - mean_v W_U)       at (L, t), through the frozen final norm
    difference  g = N'^T (W_U[:, v] - W_U[:, w])
    score       g = scale * N'^T W_Q^T QN' R(t)^T k     at (b, t), read on the query side;
                                                        likewise q on the key side

The value of a target is `g . x + constant`, the constant being what biases add. The mean over the
vocabulary moves no probability, so a logit target is the logit less the mean logit. Logits and
scores are read before their softcaps. Exact given the frozen norm scales.
Axes: P targets, D d_model, V vocabulary, H head_dim.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig, ModelConfig
from qkattr.graph.backward import DirectTargets
from qkattr.model.attention import finish_head, gain_of
from qkattr.model.layers import f32, norm_bias, norm_scale, norm_transpose
from qkattr.model.transformer import block
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.types import BlockStack, Params


@partial(jax.jit, static_argnames=("cfg",))
@on_any_mesh
@checked
def logit_covectors(
    params: Params,
    x: Float[Array, "D"],
    tokens: Int[Array, "P"],
    against: Int[Array, "P"],
    *,
    cfg: ModelConfig,
) -> tuple[Float[Array, "P D"], Float[Array, "P"]]:
    """Covectors and constants of logits at one position.

    Args:
      x: the residual stream at the last boundary there.
      tokens: the tokens to read.
      against: the token to subtract, or -1 for the mean over the vocabulary.
    """
    w_VD = params.embed_VD if params.unembed_DV is None else params.unembed_DV.T
    mean = jnp.mean(w_VD, axis=0, dtype=jnp.float32)
    base = jnp.where((against >= 0)[:, None], f32(w_VD[against]), mean)
    direction = f32(w_VD[tokens]) - base
    constant = jnp.einsum(
        "PD,D->P", direction, norm_bias(params.norm_final) * jnp.ones(x.shape[-1], jnp.float32)
    )
    if params.unembed_bias_V is not None:
        bias = f32(params.unembed_bias_V)
        constant += bias[tokens] - jnp.where(against >= 0, bias[against], bias.mean())
    scale = norm_scale(params.norm_final, x, cfg=cfg.block)
    return norm_transpose(params.norm_final, direction, cfg=cfg.block) * scale, constant


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
@checked
def score_covectors(
    blocks: BlockStack,
    boundaries: Float[Array, "L+1 T D"],
    places: Int[Array, "P place=4"],
    *,
    cfg: BlockConfig,
    precision: str = "highest",
) -> tuple[Float[Array, "P 2 D"], Float[Array, "P 2"]]:
    """Covectors and constants of P scores (block, head, query, key),
    read on the query and on the key side.

    On either side `covector . x + constant` is the score before the softcap.
    """

    def one(place):
        b, head, query, key = place
        weights, x = jax.tree.map(lambda a: a[b], (blocks, boundaries[:-1]))
        _, seen = block(weights, x, cfg=cfg, precision=precision)
        kv = head // weights.group
        q, k = seen.q_TNH[query, head], seen.k_SKH[key, kv]
        pull = partial(_pull_score, weights, cfg=cfg)
        on_query = pull(
            k, query, weights.wq_DNH[:, head], weights.bq_NH, head, gain_of(weights.norm_q, head),
            seen.scale_q_TN[query, head], seen.scale_attn_T[query],
        )  # fmt: skip
        on_key = pull(
            q, key, weights.wk_DKH[:, kv], weights.bk_KH, kv, gain_of(weights.norm_k, kv),
            seen.scale_k_SK[key, kv], seen.scale_attn_T[key],
        )  # fmt: skip
        return jax.tree.map(lambda *sides: jnp.stack(sides), on_query, on_key)

    return jax.lax.map(one, places)


def _pull_score(weights, other, position, w, bias, head, gain, head_scale, scale, *, cfg):
    """`cfg.scale * other . finish_head(W N'(x) + bias)` as a covector on x and a constant."""

    def finish(raw: Float[Array, "H"]) -> Float[Array, "H"]:
        return finish_head(
            raw[None],
            head_scale[None],
            gain=gain,
            inv_freq=weights.inv_freq,
            positions=jnp.asarray(position)[None],
        )[0]

    g = jax.linear_transpose(finish, other)(cfg.scale * other)[0]
    on_norm = jnp.einsum("DH,H->D", f32(w), g, precision="highest")
    constant = on_norm @ (norm_bias(weights.norm_attn) * jnp.ones(on_norm.shape[0], jnp.float32))
    constant += 0.0 if bias is None else f32(bias)[head] @ g
    return norm_transpose(weights.norm_attn, on_norm, cfg=cfg) * scale, constant


def direct_targets(
    boundary, position, covector, constant, influence, *, padded_to: int
) -> DirectTargets:
    """Pad targets to a bucket, on the host; padding has boundary -1 and influence 0."""

    def pad(array, fill=0):
        array = np.asarray(array)
        widths = ((0, padded_to - array.shape[0]), *((0, 0),) * (array.ndim - 1))
        return np.pad(array, widths, constant_values=fill)

    return DirectTargets(
        boundary=pad(boundary, -1),
        position=pad(position),
        covector=pad(covector),
        constant=pad(constant),
        influence=pad(influence),
    )

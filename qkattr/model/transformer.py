"""The forward pass: one pure function over stacked blocks, for every family.

    x_0 = embedding        x_{b+1} = x_b + attention(N x_b) + MLP(N' ...)        logits = W_U N(x_L)

Axes: T position, L block, D d_model, V vocabulary; N, K, H, F inside a block. Exact; float32
whatever the weights are. Prompts are right-padded by the caller where it wants to: attention is
causal, so padding changes nothing before it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig, ModelConfig
from qkattr.model.attention import (
    attend,
    attention_pattern,
    attention_scores,
    project_k,
    project_q,
    project_v,
)
from qkattr.model.edits import (
    BlockEdits,
    Edits,
    PatternEdits,
    edited_outputs,
    edited_pattern,
    edited_queries,
    edited_residual,
    edited_scores,
)
from qkattr.model.layers import apply_norm, f32, lifted, norm_bias, norm_linear, norm_scale, softcap
from qkattr.model.mlp import hidden, mlp_out
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.types import Activations, BlockWeights, Norm, Params, Trace

CAPTURE = ("boundaries", "scores", "patterns")


@checked
def block(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    *,
    cfg: BlockConfig,
    edits: BlockEdits = BlockEdits(),  # noqa: B008  (an immutable, empty pytree)
    precision: str = "highest",
) -> tuple[Float[Array, "T D"], Activations]:
    """One block: the residual stream at the next boundary, and what was computed on the way.

    edits: of this block (no leading L).
    """
    held = edits.frozen

    def scale(name: str, norm: Norm | None, read: Array) -> Array:
        return norm_scale(norm, read, cfg=cfg) if held is None else getattr(held, name)

    with jax.named_scope("attention"):
        scale_attn = scale("scale_attn_T", weights.norm_attn, x)
        y = norm_linear(weights.norm_attn, x, scale_attn, cfg=cfg) + lifted(
            norm_bias(weights.norm_attn), x
        )
        q, scale_q = project_q(weights, y, held and held.scale_q_TN, cfg=cfg, precision=precision)
        k, scale_k = project_k(weights, y, held and held.scale_k_SK, cfg=cfg, precision=precision)
        how: dict[str, Any] = dict(cfg=cfg, precision=precision)
        q = edited_queries(weights, x, (q, scale_attn, scale_q), edits, **how)
        scores = attention_scores(q, k, **how)
        scores = edited_scores(weights, x, q, (scores, scale_attn, scale_k), edits, **how)
        pattern = edited_pattern(edits, attention_pattern(scores, weights.window, cfg=cfg))
        heads = attend(pattern, project_v(weights, y, precision=precision), precision=precision)
        heads = edited_outputs(edits, heads)
        out = jnp.einsum("TNH,NHD->TD", heads, f32(weights.wo_NHD), precision=precision)
        out = out if weights.bo_D is None else out + f32(weights.bo_D)[None]
        scale_attn_post = scale("scale_attn_post_T", weights.norm_attn_post, out)
        attn = norm_linear(weights.norm_attn_post, out, scale_attn_post, cfg=cfg)
        middle = x + attn + lifted(norm_bias(weights.norm_attn_post), x)
    with jax.named_scope("mlp"):
        read = x if cfg.parallel else middle
        scale_mlp = scale("scale_mlp_T", weights.norm_mlp, read)
        y = norm_linear(weights.norm_mlp, read, scale_mlp, cfg=cfg) + lifted(
            norm_bias(weights.norm_mlp), x
        )
        gate, up = hidden(weights, y, precision=precision)
        out = mlp_out(weights, gate, up, cfg=cfg, precision=precision)
        scale_mlp_post = scale("scale_mlp_post_T", weights.norm_mlp_post, out)
        mlp = norm_linear(weights.norm_mlp_post, out, scale_mlp_post, cfg=cfg)
        after = middle + mlp + lifted(norm_bias(weights.norm_mlp_post), x)
    return after, Activations(
        scale_attn_T=scale_attn, scale_q_TN=scale_q, scale_k_SK=scale_k, q_TNH=q, k_SKH=k,
        scores_NTS=scores, pattern_NTS=pattern, scale_attn_post_T=scale_attn_post,
        scale_mlp_T=scale_mlp, gate_TF=gate, up_TF=up, scale_mlp_post_T=scale_mlp_post,
    )  # fmt: skip


@checked
def embed(params: Params, tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    """Boundary 0: token embedding, plus the learned position embedding where the model has one."""
    x = f32(params.embed_VD[tokens])
    x = x if params.embed_scale is None else x * f32(params.embed_scale)
    return x if params.position_PD is None else x + f32(params.position_PD[: tokens.shape[0]])


@checked
def unembed(
    params: Params, x: Float[Array, "... D"], *, cfg: ModelConfig, precision: str = "highest"
) -> Float[Array, "... V"]:
    """Logits of the last boundary's residual stream, after the softcap where there is one."""
    y = apply_norm(params.norm_final, x, cfg=cfg.block)
    if params.unembed_DV is None:
        logits = jnp.einsum("...D,VD->...V", y, f32(params.embed_VD), precision=precision)
    else:
        logits = jnp.einsum("...D,DV->...V", y, f32(params.unembed_DV), precision=precision)
    if params.unembed_bias_V is not None:
        logits = logits + lifted(f32(params.unembed_bias_V), logits)
    return softcap(logits, cfg.final_softcap)


@checked
def residual_stream(
    params: Params,
    tokens: Int[Array, "T"],
    *,
    cfg: ModelConfig,
    edits: Edits = Edits(),  # noqa: B008
    capture: tuple[str, ...] = CAPTURE,
    queries: Int[Array, "Q"] | None = None,
    precision: str = "highest",
) -> tuple[Float[Array, "T D"], Trace]:
    """The residual stream before the final norm, and what was captured on the way.

    Unbatched: `jax.vmap` it over prompts, or over edits. queries: capture scores and patterns at
    these query positions only.
    """

    def rows(per_query: Float[Array, "N T S"]) -> Array:
        return per_query if queries is None else per_query[:, queries]

    def step(x, inputs):
        weights, within, b = inputs
        x = edited_residual(edits.residual, x, b)
        after, seen = block(weights, x, cfg=cfg.block, edits=within, precision=precision)
        return after, Trace(
            boundaries=x if "boundaries" in capture else None,
            scores=rows(seen.scores_NTS) if "scores" in capture else None,
            patterns=rows(seen.pattern_NTS) if "patterns" in capture else None,
        )

    n_blocks = params.blocks.inv_freq.shape[0]
    xs = params.blocks, edits.blocks, jnp.arange(n_blocks)
    x, trace = jax.lax.scan(step, embed(params, tokens), xs)
    x = edited_residual(edits.residual, x, n_blocks)
    if trace.boundaries is not None:
        boundaries = jnp.concatenate([trace.boundaries, x[None]])
        trace = dataclasses.replace(trace, boundaries=boundaries)
    return x, trace


@checked
def run_from(
    params: Params,
    x: Float[Array, "B T D"],
    boundary: Int[Array, ""] | Int[Array, "B"] | int,
    *,
    cfg: ModelConfig,
    patterns: Float[Array, "L N T S"] | None = None,
    precision: str = "highest",
) -> Float[Array, "B T D"]:
    """The residual stream before the final norm when that at a boundary is x: only the blocks after
    it are run.

    boundary: may be traced, and one for each run. patterns: hold all heads at these.
    """
    starts = jnp.broadcast_to(boundary, x.shape[:1])

    def step(b, now):
        weights = jax.tree.map(lambda a: a[b], params.blocks)
        edits = BlockEdits()
        if patterns is not None:
            held = PatternEdits(patterns[b], jnp.ones(patterns.shape[1:3], bool))
            edits = BlockEdits(patterns=held)
        here = jnp.where((starts == b)[:, None, None], x, now)
        how: dict[str, Any] = dict(cfg=cfg.block, edits=edits, precision=precision)
        return jax.vmap(lambda one: block(weights, one, **how)[0])(here)

    after = jax.lax.fori_loop(starts.min(), cfg.n_blocks, step, x)
    return jnp.where((starts >= cfg.n_blocks)[:, None, None], x, after)


@partial(jax.jit, static_argnames=("cfg", "capture", "precision"))
@on_any_mesh
@checked
def forward(
    params: Params,
    tokens: Int[Array, "T"],
    *,
    cfg: ModelConfig,
    edits: Edits = Edits(),  # noqa: B008
    capture: tuple[str, ...] = CAPTURE,
    precision: str = "highest",
) -> tuple[Float[Array, "T V"], Trace]:
    """Logits and trace of one prompt.

    Args:
      params: the model.
      tokens: `[T]` token ids, BOS included.
      cfg: its configuration (static).
      edits: changes to make on the way.
      capture: which fields of `Trace` to keep (static); `()` keeps none.
      precision: of every matmul (static).

    Returns:
      logits `[T, V]` and a `Trace`.
    """
    x, trace = residual_stream(
        params, tokens, cfg=cfg, edits=edits, capture=capture, precision=precision
    )
    return unembed(params, x, cfg=cfg, precision=precision), trace


@partial(jax.jit, static_argnames=("cfg", "precision"))
def boundaries_and_logits(
    params: Params,
    tokens: Int[Array, "T"],
    last: Int[Array, ""] | int,
    *,
    cfg: ModelConfig,
    precision: str = "highest",
) -> tuple[Float[Array, "L+1 T D"], Float[Array, "D"], Float[Array, "V"]]:
    """The residual stream at every boundary; the last boundary and the logits at one position."""
    x, captured = residual_stream(
        params, tokens, cfg=cfg, capture=("boundaries",), precision=precision
    )
    logits = unembed(params, x[last], cfg=cfg, precision=precision)
    assert captured.boundaries is not None  # they were asked for
    return captured.boundaries, x[last], logits

"""What a target reads of every head's output in the live model: one backward pass.

    G[b, t, n] = d target / d (output of head n of block b at t, before W_O)

with everything that follows reacting: patterns, norm scales, MLPs. `graph.effects` holds all of
that frozen. To first order it says what the target loses when a head's output changes; with the
head's pattern A and values v, e[t,s] = G[b,t,n] . v[s],

    masking[t, s] = A[t,s] (e[t,s] - sum_s' A[t,s'] e[t,s']) / (1 - A[t,s])

is what it loses when the key s is masked for that head at t and its pattern is renormalised over
the other keys. The change of the pattern is exact, what follows is first order. Of all measures
that were compared with true maskings (docs/faithfulness.md), this one ranks places best.
Axes: L blocks, T/S positions, N heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qkattr.config import ModelConfig
from qkattr.model.edits import BlockEdits, Edits
from qkattr.model.transformer import residual_stream, unembed
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.types import Params


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
@checked
def logit_gradient(
    params: Params,
    tokens: Int[Array, "T"],
    position: Int[Array, ""],
    token: Int[Array, ""],
    against: Int[Array, ""],
    *,
    cfg: ModelConfig,
    precision: str = "highest",
) -> Float[Array, "L T N H"]:
    """Of a logit after a position, before the final softcap, less that of another token (`against`
    below 0: less the mean logit)."""
    uncapped = dataclasses.replace(cfg, final_softcap=None)

    def target(added: Float[Array, "L T N H"]) -> Float[Array, ""]:
        edits = Edits(blocks=BlockEdits(head_add_TNH=added))
        x, _ = residual_stream(
            params, tokens, cfg=cfg, edits=edits, capture=(), precision=precision
        )
        logits = unembed(params, x[position], cfg=uncapped, precision=precision)
        return logits[token] - jnp.where(against < 0, logits.mean(), logits[against])

    return jax.grad(target)(_nothing(params, tokens))


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
@checked
def score_gradient(
    params: Params,
    tokens: Int[Array, "T"],
    place: Int[Array, "place=4"],
    *,
    cfg: ModelConfig,
    precision: str = "highest",
) -> Float[Array, "L T N H"]:
    """Of the score of a place (block, head, query, key), before the softcap."""
    block, head, query, key = place

    def target(added: Float[Array, "L T N H"]) -> Float[Array, ""]:
        edits = Edits(blocks=BlockEdits(head_add_TNH=added))
        how: dict[str, Any] = dict(cfg=cfg, edits=edits, precision=precision)
        _, seen = residual_stream(params, tokens, capture=("scores",), queries=query[None], **how)
        assert seen.scores is not None
        return seen.scores[block, head, 0, key]

    return jax.grad(target)(_nothing(params, tokens))


def _nothing(params: Params, tokens: Int[Array, "T"]) -> Float[Array, "L T N H"]:
    L, _, N, H = params.blocks.wq_DNH.shape
    return jnp.zeros((L, tokens.shape[0], N, H))


@checked
def masking(pattern: Float[Array, "... S"], reads: Float[Array, "... S"]) -> Array:
    """What masking each key takes from the target: `A[s] (e[s] - mean of e over the other keys, by
    their attention)`; 0 where the query sees one key.

    Args:
      pattern: the head's.
      reads: e, what the target reads of each key's value.
    """
    # 1 - A would lose what is left beside a key that has nearly all of the attention.
    others, elsewhere = _without_own(pattern), _without_own(pattern * reads)
    known = others > 0
    mean = elsewhere / jnp.where(known, others, 1.0)
    return jnp.where(known, pattern * (reads - mean), 0.0)


def _without_own(x: Float[Array, "... S"]) -> Array:
    """The sum over all other keys, for every key."""
    shift = [(0, 0)] * (x.ndim - 1)
    before = jnp.pad(jnp.cumsum(x, axis=-1)[..., :-1], [*shift, (1, 0)])
    after = jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True)[..., 1:]
    return before + jnp.pad(after, [*shift, (0, 1)])

"""The frozen block once more, in JAX and in the precision of its input, for `jax.vjp` and
`jax.grad`: its own code, not the library's.

Weights are flattened to matrices, heads repeated for grouped queries, and the MLP's z spelled out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import naive

ACTIVATIONS = {
    "silu": lambda x: x * jax.scipy.special.expit(x),
    "relu": lambda x: jnp.maximum(x, 0),
    "gelu": lambda x: x * jax.scipy.stats.norm.cdf(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3))),
}


def of_head(n: int, n_heads: int, T: int, S: int):
    """For `only`: head n alone, from everywhere to everywhere."""
    return jnp.zeros((n_heads, T, S)).at[n].set(1.0)


def frozen_block(weights, x0, cfg, linearisation, seen=None):
    """The block as a function of x, patterns and norm scales those of x0.

    With `only`, a weight `[N, T, S]` of every head at every place, derivatives go through these
    places alone, or with "own" through no head: everything else is a constant. The value does not
    depend on `only`; its derivative with respect to `only` is that of the heads' part, constants
    left out. With `scores`, patterns are the softmax of these instead of frozen ones.
    """
    n_heads = weights.wq_DNH.shape[1]
    group = n_heads // weights.wk_DKH.shape[1]
    T, d = x0.shape
    zero = lambda b: 0.0 if b is None else jnp.asarray(b)
    act = ACTIVATIONS[cfg.activation]

    def centred(v):
        return v - v.mean(-1, keepdims=True) if cfg.norm == "layer" else v

    def normed(norm, v, at):
        if norm is None:
            return v
        rms = jnp.sqrt((centred(at) ** 2).mean(-1, keepdims=True) + cfg.eps)
        return centred(v) / rms * norm.weight[None] + jnp.atleast_2d(zero(norm.bias))

    def values(x):
        v = normed(weights.norm_attn, x, x0) @ weights.wv_DKH.reshape(d, -1)
        v = v.reshape(T, -1, weights.wv_DKH.shape[2]) + (
            0.0 if weights.bv_KH is None else weights.bv_KH[None]
        )
        return jnp.repeat(v, group, axis=1)

    def heads_out(x, only, pattern):
        constant, v = values(jnp.zeros_like(x)), values(x)
        out = jnp.broadcast_to(jnp.atleast_2d(zero(weights.bo_D)), (T, d))
        for n in range(n_heads):
            if only is None:
                one = pattern[n] @ v[:, n]
            else:
                moved = jnp.zeros((T, T)) if isinstance(only, str) else only[n]
                of_x = v[:, n] - constant[:, n]
                held = jax.lax.stop_gradient(((1 - moved) * pattern[n]) @ of_x)
                one = pattern[n] @ constant[:, n] + (moved * pattern[n]) @ of_x + held
            out = out + one @ weights.wo_NHD[n]
        return out

    def softmax_of(scores):
        t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
        sees = (s <= t) & (t - s < weights.window)
        if cfg.softcap is not None:
            scores = cfg.softcap * jnp.tanh(scores / cfg.softcap)
        weight = jnp.where(sees, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
        return weight / weight.sum(-1, keepdims=True)

    def pre(y):
        up = y @ weights.w_up_DF + jnp.atleast_2d(zero(weights.b_up_F))
        if weights.w_gate_DF is None:
            return None, up
        return y @ weights.w_gate_DF + jnp.atleast_2d(zero(weights.b_gate_F)), up

    seen = naive.run_block(weights, x0, cfg) if seen is None else seen
    frozen = jnp.asarray(seen.pattern, x0.dtype)
    attn0 = heads_out(x0, None, frozen)
    middle0 = x0 + normed(weights.norm_attn_post, attn0, attn0)
    read0 = x0 if cfg.parallel else middle0
    g0, u0 = pre(normed(weights.norm_mlp, read0, read0))
    z0 = act(u0) if g0 is None else act(g0) * u0
    mlp0 = z0 @ weights.w_down_FD + jnp.atleast_2d(zero(weights.b_down_D))

    def hidden(g, u):
        if linearisation == "jacobian":
            return act(u) if g is None else act(g) * u
        if g is None:
            return act(u0) / u0 * u
        if linearisation == "frozen-gate":
            return act(g0) * u
        return (act(g0) * u + act(g0) / g0 * u0 * g) / 2

    def block(x, only=None, scores=None):
        pattern = frozen if scores is None else softmax_of(scores)
        attn = normed(weights.norm_attn_post, heads_out(x, only, pattern), attn0)
        x = x if only is None or isinstance(only, str) else jax.lax.stop_gradient(x)
        middle = x + attn
        g, u = pre(normed(weights.norm_mlp, x if cfg.parallel else middle, read0))
        mlp = hidden(g, u) @ weights.w_down_FD + jnp.atleast_2d(zero(weights.b_down_D))
        return middle + normed(weights.norm_mlp_post, mlp, mlp0)

    return block

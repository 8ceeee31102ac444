"""One optimiser step of every boundary's SAE.

A step of one SAE is a pure function; the boundaries are a stacked pytree over which it is mapped:
`vmap` where a device has room for all at once, one boundary after another on a CPU, whose caches
hold one. Decoder rows keep norm 1: the gradient's part along a row is removed before Adam sees it,
and rows are rescaled after.
Axes: L boundary, B positions, D d_model, M dictionary width.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.train.config import TrainConfig
from qkattr.train.rounding import Grid, no_grid, rounded
from qkattr.train.sae import SAE, BatchSeen, loss

#: Of the running mean of batchtopk's threshold.
FORGET = 0.01


@struct.dataclass
class TrainState:
    """What training changes; every leaf has a leading L.

    grid: what products see the weights rounded to. silent_M: positions since the feature last
    fired. threshold: running mean of the least activation let through (batchtopk).
    """

    sae: SAE
    grid: Grid
    opt: optax.OptState
    silent_M: Int[Array, "L M"]
    threshold: Float[Array, "L"]


def optimiser(cfg: TrainConfig) -> optax.GradientTransformation:
    """Clipping, Adam, and a rate that warms up, stays, and falls to zero."""
    warmup, decay = round(cfg.warmup * cfg.steps), round(cfg.decay * cfg.steps)
    level = max(0, cfg.steps - warmup - decay)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(cfg.lr / max(1, warmup), cfg.lr, max(1, warmup)),
            optax.constant_schedule(cfg.lr),
            optax.linear_schedule(cfg.lr, 0.0, max(1, decay)),
        ],
        [warmup, warmup + level],
    )
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(rate),
    )


def init_state(saes: SAE, *, cfg: TrainConfig) -> TrainState:
    """The state before the first step of stacked SAEs."""
    n = saes.b_dec_D.shape[0]
    return TrainState(
        sae=saes,
        grid=no_grid(saes),
        opt=jax.vmap(optimiser(cfg).init)(cast(Any, saes)),
        silent_M=jnp.zeros((n, cfg.width), jnp.int32),
        threshold=jnp.zeros(n),
    )


def step_one(
    state: TrainState, x: Float[Array, "B D"], weight: Float[Array, "B"], *, cfg: TrainConfig
) -> tuple[TrainState, BatchSeen]:
    """One SAE's step (no leading L)."""
    dead = state.silent_M >= cfg.dead_after

    def of_rounded(sae: SAE):
        used = rounded(sae, state.grid) if cfg.bits else sae
        return loss(used, x, weight, dead, cfg=cfg)

    gradient, seen = jax.grad(of_rounded, has_aux=True)(state.sae)
    w = state.sae.w_dec_MD
    along = (gradient.w_dec_MD * w).sum(1, keepdims=True) * w
    gradient = dataclasses.replace(gradient, w_dec_MD=gradient.w_dec_MD - along)
    updates, opt = optimiser(cfg).update(gradient, state.opt, cast(Any, state.sae))
    sae: SAE = jax.tree.map(jnp.add, state.sae, updates)
    norm = jnp.linalg.norm(sae.w_dec_MD, axis=1, keepdims=True)
    sae = dataclasses.replace(sae, w_dec_MD=sae.w_dec_MD / norm)
    kept = (weight > 0).sum().astype(jnp.int32)
    # Silence is counted up to the point where it counts as death, so that it cannot overflow.
    silent = jnp.where(seen.fired_M, 0, jnp.minimum(state.silent_M + kept, cfg.dead_after))
    first = state.threshold == 0
    threshold = jnp.where(
        first, seen.threshold, state.threshold + FORGET * (seen.threshold - state.threshold)
    )
    state = TrainState(sae=sae, grid=state.grid, opt=opt, silent_M=silent, threshold=threshold)
    return state, seen


@partial(jax.jit, static_argnames=("cfg", "at_once"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    x: Float[Array, "L B D"],
    weight: Float[Array, "L B"],
    *,
    cfg: TrainConfig,
    at_once: bool,
) -> tuple[TrainState, BatchSeen]:
    """Every boundary's step. at_once: all boundaries in one batched program, or one by one."""
    one = partial(step_one, cfg=cfg)
    if at_once:
        return jax.vmap(one)(state, x, weight)
    return jax.lax.map(lambda of_boundary: one(*of_boundary), (state, x, weight))

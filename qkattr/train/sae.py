"""One SAE in training: parameters, activations, loss.

    y = x - b_dec       v = the A largest of W_enc y + b_enc       a = gate(v)
    x^ = sum_a a W_dec[i] + b_dec
    loss = mean |x - x^|^2 / D  +  auxiliary |e - e^|^2 / |e|^2  +  penalty (L0 / k - 1)^2

    topk        a = relu(v), with A = k
    batchtopk   a = v where v is among the k n largest of the batch's n positions
    jumprelu    a = v where v > threshold, whose gradient is straight-through (a rectangle of the
                given bandwidth); only it pays the penalty, which pulls its L0 to k

e = x - x^ without gradient, e^ its best account by dead features (`aux_k` of them a position): they
come back where something is left to explain (Gao et al. 2024, 2406.04093; batchtopk: 2412.06410;
jumprelu: 2407.14435). x has norm sqrt(D) on average. Positions have weight 0 (left out) or 1.
Approximate: batchtopk and jumprelu see at most A features a position, `slots` of the config.
Axes: B positions, D d_model, M dictionary width, A slots.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from qkattr.train.config import TrainConfig
from qkattr.train.sparse import largest, write

#: The auxiliary loss looks at one position in this many: it only has to point dead features the
#: right way, and costs a matmul and a top-k more.
AUX_SHARE = 8


@struct.dataclass
class SAE:
    """One SAE's parameters, over inputs scaled to norm sqrt(D). Rows of `w_dec_MD` have norm 1.

    log_threshold_M: of jumprelu, else None.
    """

    w_enc_MD: Float[Array, "M D"]
    w_dec_MD: Float[Array, "M D"]
    b_enc_M: Float[Array, "M"]
    b_dec_D: Float[Array, "D"]
    log_threshold_M: Float[Array, "M"] | None = None


@struct.dataclass
class BatchSeen:
    """What a batch showed. Each a scalar but `fired_M`.

    error, variance: sums over kept positions of |x - x^|^2 and |x - mean|^2. l0: features a
    position. threshold: the least activation that batchtopk let through (0 for the others).
    """

    loss: Float[Array, ""]
    error: Float[Array, ""]
    variance: Float[Array, ""]
    l0: Float[Array, ""]
    threshold: Float[Array, ""]
    fired_M: Bool[Array, "M"]


def init_sae(key: Array, mean_D: Float[Array, "D"], *, cfg: TrainConfig) -> SAE:
    """Random unit rows, the encoder tied to them, and the data's mean."""
    w = jax.random.normal(key, (cfg.width, mean_D.shape[0]))
    w = w / jnp.linalg.norm(w, axis=1, keepdims=True)
    jump = cfg.activation == "jumprelu"
    return SAE(
        w_enc_MD=w,
        w_dec_MD=w.copy(),  # buffers of their own, since both are donated
        b_enc_M=jnp.zeros(cfg.width),
        b_dec_D=mean_D,
        log_threshold_M=jnp.full(cfg.width, jnp.log(cfg.threshold)) if jump else None,
    )


def loss(
    sae: SAE,
    x: Float[Array, "B D"],
    weight: Float[Array, "B"],
    dead: Bool[Array, "M"],
    *,
    cfg: TrainConfig,
) -> tuple[Float[Array, ""], BatchSeen]:
    """The loss of a batch, and what it showed."""
    n = jnp.maximum(weight.sum(), 1)
    w_enc, w_dec = sae.w_enc_MD.astype(cfg.compute), sae.w_dec_MD.astype(cfg.compute)
    # W_enc (x - b_dec) + b_enc, so that no gradient by position is needed.
    bias = (sae.b_enc_M - sae.w_enc_MD @ sae.b_dec_D).astype(cfg.compute)
    sparse = bool(cfg.sparse)  # "auto" was decided by the config
    v, index = largest(x.astype(cfg.compute), w_enc, bias, slots=cfg.slots, sparse=sparse)
    v = v.astype(jnp.float32)
    a, l0, threshold = _gate(sae, v, index, weight, cfg=cfg)
    rebuilt = write(a.astype(cfg.compute), index, w_dec, sparse=bool(cfg.sparse)) + sae.b_dec_D
    left = x - rebuilt.astype(jnp.float32)
    error = (weight * jnp.square(left).sum(-1)).sum()
    total = error / (n * x.shape[1])
    l0 = (weight * l0).sum() / n
    if cfg.aux_k:
        total = total + cfg.aux_weight * _auxiliary(sae, x, left, weight, dead, cfg=cfg)
    if cfg.activation == "jumprelu":
        total = total + cfg.l0_weight * jnp.square(l0 / cfg.k - 1)
    mean = (weight[:, None] * x).sum(0) / n
    variance = (weight * jnp.square(x - mean).sum(-1)).sum()
    lit = jnp.where((a > 0) & (weight[:, None] > 0), 1, 0)
    fired = jnp.zeros(cfg.width, lit.dtype).at[index].add(lit) > 0
    return total, BatchSeen(
        loss=total, error=error, variance=variance, l0=l0, threshold=threshold, fired_M=fired
    )


def _gate(
    sae: SAE, v: Float[Array, "B A"], index: Int[Array, "B A"], weight: Array, *, cfg: TrainConfig
) -> tuple[Float[Array, "B A"], Float[Array, "B"], Float[Array, ""]]:
    """Activations, active features a position (with jumprelu's gradient), batchtopk's threshold."""
    least = jnp.zeros(())
    if cfg.activation == "jumprelu":
        assert sae.log_threshold_M is not None
        threshold = jnp.exp(sae.log_threshold_M)[index]
        l0 = cast(Array, step(v, threshold, cfg.bandwidth)).sum(-1)
        return cast(Array, jump(v, threshold, cfg.bandwidth)), l0, least
    a = jax.nn.relu(v)
    if cfg.activation == "batchtopk":
        kept = jnp.where(weight[:, None] > 0, jax.lax.stop_gradient(a), 0.0)
        ranked = jnp.sort(kept.ravel())[::-1]
        wanted = jnp.clip((weight.sum() * cfg.k).astype(jnp.int32), 1, ranked.size)
        least = ranked[wanted - 1]
        a = jnp.where(a >= least, a, 0.0)
    return a, (a > 0).sum(-1).astype(jnp.float32), least


def _auxiliary(sae: SAE, x, left, weight, dead, *, cfg: TrainConfig) -> Float[Array, ""]:
    """How badly dead features account for what is left, as a share of it; 0 when none is dead."""
    few = slice(0, max(1, x.shape[0] // AUX_SHARE))
    x, weight = x[few], weight[few]
    target = jax.lax.stop_gradient(left[few])

    def account(sae: SAE):
        y = (x - sae.b_dec_D).astype(cfg.compute)
        bias = jnp.where(dead, sae.b_enc_M, -1e9).astype(cfg.compute)
        w_enc, w_dec = sae.w_enc_MD.astype(cfg.compute), sae.w_dec_MD.astype(cfg.compute)
        v, index = largest(y, w_enc, bias, slots=cfg.aux_k, sparse=bool(cfg.sparse))
        rebuilt = write(jax.nn.relu(v), index, w_dec, sparse=bool(cfg.sparse)).astype(jnp.float32)
        miss = (weight * jnp.square(target - rebuilt).sum(-1)).sum()
        return miss / jnp.maximum((weight * jnp.square(target).sum(-1)).sum(), 1e-12)

    return jax.lax.cond(dead.any(), account, lambda sae: jnp.zeros(()), sae)


def _near(v, threshold, bandwidth):
    """The rectangle kernel: 1 / bandwidth within half of it."""
    return (jnp.abs(v - threshold) < bandwidth / 2) / bandwidth


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(v: Array, threshold: Array, bandwidth: float) -> Array:
    """v where it exceeds the threshold, else 0. Straight-through gradient to the threshold."""
    return jnp.where(v > threshold, v, 0.0)


def _jump_backward(bandwidth, kept, g):
    v, threshold = kept
    return jnp.where(v > threshold, g, 0.0), -threshold * _near(v, threshold, bandwidth) * g


jump.defvjp(lambda v, t, bandwidth: (jump(v, t, bandwidth), (v, t)), _jump_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(v: Array, threshold: Array, bandwidth: float) -> Array:
    """1 where v exceeds the threshold, else 0. Straight-through gradient to the threshold alone."""
    return (v > threshold).astype(jnp.float32)


def _step_backward(bandwidth, kept, g):
    v, threshold = kept
    return jnp.zeros_like(v), -_near(v, threshold, bandwidth) * g


step.defvjp(lambda v, t, bandwidth: (step(v, t, bandwidth), (v, t)), _step_backward)

"""Norms with the scale as an argument, rotary embedding, activations.

    RMSNorm     N(x) = w * x / rms(x)
    LayerNorm   N(x) = w * (x - mean(x)) / std(x) + b

Given its scale (1 / rms or 1 / std), N without b is linear in x. `norm_scale` measures it,
`norm_linear` applies the linear part with whatever scale it is handed, and everything else in the
library is built from these two: the forward pass hands in the scale of x itself, the frozen block
that of the prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig
from qkattr.types import Norm

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def f32(x: Array | np.ndarray) -> Float[Array, "..."]:
    """The array in float32: weights may be stored in bfloat16, arithmetic never is."""
    return jnp.asarray(x, jnp.float32)


def lifted(part: Array | float, x: Array) -> Array | float:
    """What is the same along the first axes of x, such as a bias, with axes of length 1 for them,
    so that it meets x rank by rank."""
    return part if isinstance(part, float) else jax.lax.broadcast_to_rank(part, x.ndim)


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """`cap * tanh(x / cap)`: x where it is small, never beyond the cap; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def norm_scale(
    norm: Norm | None, x: Float[Array, "... D"], *, cfg: BlockConfig
) -> Float[Array, "..."]:
    """1 / rms(x), or 1 / std(x) for LayerNorm; 1 where the family has no norm."""
    if norm is None:
        return jnp.ones(x.shape[:-1], jnp.float32)
    centred = _centre(x, cfg)
    return jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1) + cfg.eps)


def norm_direction(norm: Norm | None, x: Float[Array, "... D"], *, cfg: BlockConfig) -> Array:
    """The norm's linear part before its scale: w * x, centred first for LayerNorm."""
    return x if norm is None else _centre(x, cfg) * lifted(f32(norm.weight), x)


def norm_transpose(norm: Norm | None, g: Float[Array, "... D"], *, cfg: BlockConfig) -> Array:
    """The transpose of `norm_direction`, for covectors."""
    return g if norm is None else _centre(g * lifted(f32(norm.weight), g), cfg)


def norm_linear(
    norm: Norm | None, x: Float[Array, "... D"], scale: Float[Array, "..."], *, cfg: BlockConfig
) -> Float[Array, "... D"]:
    """The norm with its scale given and its bias left out: linear in x."""
    return norm_direction(norm, x, cfg=cfg) * scale[..., None]


def norm_bias(norm: Norm | None) -> Array | float:
    """The norm's additive constant: LayerNorm's bias, else 0."""
    return 0.0 if norm is None or norm.bias is None else f32(norm.bias)


def apply_norm(norm: Norm | None, x: Float[Array, "... D"], *, cfg: BlockConfig) -> Array:
    """The norm as the model computes it."""
    return norm_linear(norm, x, norm_scale(norm, x, cfg=cfg), cfg=cfg) + lifted(norm_bias(norm), x)


def _centre(x: Array, cfg: BlockConfig) -> Array:
    return x - x.mean(-1, keepdims=True) if cfg.norm == "layer" else x


def rotate(
    x: Float[Array, "T ... H"], positions: Int[Array, "T"], inv_freq: Float[Array, "pairs"]
) -> Float[Array, "T ... H"]:
    """Rotary embedding of the first 2P dimensions, half-split:
    pair (i, i + P) turns by position * inv_freq[i].

    Linear in x, and orthogonal: `rotate(x, -positions, inv_freq)` undoes it, and is its transpose.
    """
    pairs = inv_freq.shape[-1]
    angle = positions.astype(jnp.float32)[:, None] * inv_freq[None]
    angle = angle.reshape(angle.shape[0], *(1,) * (x.ndim - 2), pairs)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

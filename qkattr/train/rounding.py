"""Training for the packed form: products see weights as `qkattr pack` will store them.

    q = clip(round(w / (gain scale)), -h, h - 1) gain scale        h = 2^(bits - 1)

From the step on at which the grid (gain and scales, see `quantised`) is fitted, it stays as it
is; the gradient passes through the rounding (straight-through). What is lost by rounding a trained
set afterwards, features learn to do without.
Axes: L boundary, M dictionary width, D d_model, G blocks of a row.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from qkattr.load.dictionaries.quantised import BLOCK, padded, quantise
from qkattr.train.config import TrainConfig
from qkattr.train.sae import SAE


@struct.dataclass
class Grid:
    """What weights are rounded to (a leading L where stacked); all zeros: they are not rounded."""

    scale_enc_MG: Float[Array | np.ndarray, "M G"]
    gain_enc_D: Float[Array | np.ndarray, "D"]
    scale_dec_MG: Float[Array | np.ndarray, "M G"]
    gain_dec_D: Float[Array | np.ndarray, "D"]
    half: Float[Array | np.ndarray, ""]


def no_grid(saes: SAE) -> Grid:
    """The grid of stacked SAEs that rounds nothing."""
    n, m, d = saes.w_dec_MD.shape
    scale, gain = jnp.zeros((n, m, padded(d) // BLOCK)), jnp.zeros((n, d))
    return Grid(
        scale_enc_MG=scale,
        gain_enc_D=gain,
        scale_dec_MG=scale.copy(),
        gain_dec_D=gain.copy(),
        half=jnp.zeros(n),
    )


def bits_of(boundary: int, *, cfg: TrainConfig) -> int:
    """Bits a weight of a boundary's SAE."""
    return 8 if boundary in cfg.wide else cfg.bits


def fit_grid(saes: SAE, *, cfg: TrainConfig) -> Grid:
    """The grid that fits stacked SAEs best. On the host."""
    w_enc, w_dec = jax.device_get((saes.w_enc_MD, saes.w_dec_MD))
    each = []
    for b in range(len(w_enc)):
        bits = bits_of(b + 1, cfg=cfg)
        enc, dec = (quantise(w[b], bits=bits) for w in (w_enc, w_dec))
        each.append(
            Grid(
                scale_enc_MG=np.asarray(enc.scales, np.float32),
                gain_enc_D=enc.gain,
                scale_dec_MG=np.asarray(dec.scales, np.float32),
                gain_dec_D=dec.gain,
                half=np.asarray(2 ** (bits - 1), np.float32),
            )
        )
    return jax.tree.map(lambda *arrays: jnp.asarray(np.stack(arrays)), *each)


def rounded(sae: SAE, grid: Grid) -> SAE:
    """One SAE (no leading L) with its weights on the grid, and gradients as if they were not."""
    w_enc = _round(sae.w_enc_MD, grid.scale_enc_MG, grid.gain_enc_D, grid.half)
    w_dec = _round(sae.w_dec_MD, grid.scale_dec_MG, grid.gain_dec_D, grid.half)
    return dataclasses.replace(sae, w_enc_MD=w_enc, w_dec_MD=w_dec)


def _round(w, scale, gain, half):
    unit = jnp.repeat(scale, BLOCK, axis=1)[:, : w.shape[1]] * gain
    code = jnp.clip(jnp.round(w / jnp.where(unit == 0, 1, unit)), -half, half - 1)
    # A block of zeros has scale 0, and is itself.
    return w + jax.lax.stop_gradient(jnp.where(unit == 0, w, code * unit) - w)

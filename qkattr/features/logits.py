"""What a feature says by the direct path: its decoder row through the frozen final norm.

    logits(f) = scale * (N'(W_dec[f]) W_U  -  mean over the vocabulary)

N' is the final norm without its scale and bias (centred for LayerNorm, its gain folded in), scale
the median of the norm's own scale over the text: the change of the logits, before a softcap, for
one unit of activation (one unit of the decoder row, where an SAE normalises its input). Later
blocks are left out: exact for the last boundary, a reading aid before it.
Axes: M features, D d_model, V vocabulary, Q tokens listed.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qkattr.config import ModelConfig
from qkattr.model.layers import f32, norm_direction
from qkattr.sharding import on_any_mesh
from qkattr.types import Params

#: Features of one tile.
TILE = 256


def top_logits(
    params: Params,
    w_dec_MD: Float[Array | np.ndarray, "M D"],
    *,
    n: int,
    scale: float,
    cfg: ModelConfig,
    precision: str = "highest",
) -> tuple[Int[np.ndarray, "2 M Q"], Float[np.ndarray, "2 M Q"]]:
    """The n tokens that each feature raises most, and those that it lowers most, with how much."""
    width, n = w_dec_MD.shape[0], min(n, cfg.vocab)
    tiles = []
    for start in range(0, width, TILE):
        rows = np.asarray(w_dec_MD[start : start + TILE], np.float32)
        rows = np.pad(rows, ((0, min(TILE, width) - len(rows)), (0, 0)))  # one program for all
        tiles.append(_extremes(params, rows, scale, n=n, cfg=cfg, precision=precision))
    tokens, values = zip(*jax.device_get(tiles), strict=True)
    return np.concatenate(tokens, 1)[:, :width], np.concatenate(values, 1)[:, :width]


@partial(jax.jit, static_argnames=("n", "cfg", "precision"))
@on_any_mesh
def _extremes(params, w_MD, scale, *, n, cfg, precision):
    y = norm_direction(params.norm_final, f32(w_MD), cfg=cfg.block) * scale
    if params.unembed_DV is None:
        logits = jnp.einsum("MD,VD->MV", y, f32(params.embed_VD), precision=precision)
    else:
        logits = jnp.einsum("MD,DV->MV", y, f32(params.unembed_DV), precision=precision)
    logits = logits - logits.mean(-1, keepdims=True)
    (high, top), (low, bottom) = jax.lax.top_k(logits, n), jax.lax.top_k(-logits, n)
    return jnp.stack([top, bottom]), jnp.stack([high, -low])

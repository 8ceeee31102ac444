"""Norm scales that are typical of a text, for analyses of weights alone.

    scale[b]       median over positions of 1 / rms (1 / std) of boundary b, as block b reads it
    scale_q[b, n]  median of the QK-norm's scale of query head n; scale_k[b, k] of key/value head k

over 128 evenly spaced rows at most, without sinks. A family without a norm has 1. Exact medians of
those rows; other rows of the text are not looked at.
Axes: L block, N query heads, K key/value heads, B rows, T position.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.cards.norms import NormScales
from qkattr.load.bundle import Bundle
from qkattr.model.layers import norm_scale
from qkattr.model.transformer import block, embed
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import sink_positions

#: Rows looked at, at most, and at a time.
ROWS, BATCH = 128, 8


def norm_scales(bundle: Bundle, rows: np.ndarray, *, precision: str = "highest") -> NormScales:
    """Median norm scales over rows of token ids, `[n, T]`."""
    rows = rows[:: -(-len(rows) // ROWS)]
    how = dict(cfg=bundle.config, precision=precision)
    parts = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        filled = np.pad(batch, ((0, min(BATCH, len(rows)) - len(batch)), (0, 0)), mode="edge")
        found = jax.device_get(_scales(bundle.params, filled, **how))
        parts.append([x[: len(batch)] for x in found])
    attn, q, k, final = (np.concatenate(x) for x in zip(*parts, strict=True))
    medians = (np.nanmedian(x, axis=(0, 2)).astype(np.float32) for x in (attn, q, k))
    return NormScales(*medians, final=float(np.nanmedian(final)))


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def _scales(params, tokens, *, cfg, precision):
    """Scales of every block `[B, L, T, ...]` and of the last norm `[B, T]`; NaN at sinks."""

    def step(x, weights):
        after, seen = block(weights, x, cfg=cfg.block, precision=precision)
        sink = sink_positions(x, x.shape[0])
        blank = jnp.where(sink, jnp.nan, 1.0)
        return after, (
            seen.scale_attn_T * blank,
            seen.scale_q_TN * blank[:, None],
            seen.scale_k_SK * blank[:, None],
        )

    def one(row):
        x, scales = jax.lax.scan(step, embed(params, row), params.blocks)
        final = norm_scale(params.norm_final, x, cfg=cfg.block)
        return *scales, jnp.where(sink_positions(x, row.shape[0]), jnp.nan, final)

    return jax.vmap(one)(tokens)

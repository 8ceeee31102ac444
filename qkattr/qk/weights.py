"""The strongest pairs of a head over a whole dictionary x dictionary: no prompt, weights alone.

    value[f, g] = scale * R(distance) QN(W_Q N'(d_f)) . KN(W_K N'(d_g))

is what one unit of feature f at a query and one of feature g at a key, `distance` before it, add to
the score, when the norms' scales are what they usually are: medians over a text, see
`features.norms` (all 1 where none are known; values then compare within one head only). Constants
(norm biases, b_Q, b_K, b_dec) belong to no feature and are left out. Products are streamed as in
`qk.search`; where the dictionary lies on several devices, each searches its own queries, and the
best of all are chosen from theirs.
Axes: M features, D d_model, H head_dim, P pairs kept. Exact given the scales.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig
from qkattr.model.attention import finish_head, gain_of
from qkattr.model.layers import f32, norm_direction
from qkattr.qk.pairs import Strongest, strongest
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.types import BlockWeights


@struct.dataclass
class HeadScales:
    """The usual scales of one head; 1 where the family has no such norm.

    attn: of the block's input norm.
    q, k: of the QK-norm on either side.
    """

    attn: Float[Array, ""] | float = 1.0
    q: Float[Array, ""] | float = 1.0
    k: Float[Array, ""] | float = 1.0


@partial(jax.jit, static_argnames=("top", "cfg", "mesh", "axis", "precision"))
@on_any_mesh
@checked
def weight_pairs(
    weights: BlockWeights,
    features_MD: Float[Array, "M D"],
    *,
    head: Int[Array, ""] | int,
    distance: Int[Array, ""] | int,
    scales: HeadScales,
    top: int,
    cfg: BlockConfig,
    mesh: Mesh | None = None,
    axis: str = "model",
    precision: str = "highest",
) -> Strongest:
    """The strongest feature pairs of `head` at `distance`; both may be traced.

    Args:
      weights: the block's. features_MD: what one unit of each feature writes, of the dictionary on
        the boundary that the block reads.
      top: pairs of either sign (static). mesh, axis: search on the devices along this axis of the
        mesh, each its own part of the queries (static; None: wherever the features are).

    Returns:
      `Strongest`: rows are query-side features, columns key-side ones.
    """
    kv = head // weights.group
    read = norm_direction(weights.norm_attn, f32(features_MD), cfg=cfg) * scales.attn

    def side(w_DH: Array, gain: Array | None, scale, at) -> Float[Array, "M H"]:
        raw = jnp.einsum("MD,DH->MH", read, f32(w_DH), precision=precision)
        return finish_head(
            raw[None],
            jnp.full((1, 1), scale),
            gain=gain,
            inv_freq=weights.inv_freq,
            positions=jnp.asarray(at)[None],
        )[0]

    q = side(weights.wq_DNH[:, head], gain_of(weights.norm_q, head), scales.q, distance)
    k = side(weights.wk_DKH[:, kv], gain_of(weights.norm_k, kv), scales.k, 0) * cfg.scale
    if mesh is None:
        return strongest(q, k, top=top, precision=precision)
    return _strongest_on(mesh, axis, q, k, top, precision)


def _strongest_on(mesh: Mesh, axis: str, q: Array, k: Array, top: int, precision: str) -> Strongest:
    """Two stages: each device's best among its rows, then the best of those."""
    n_features, n_devices = len(q), mesh.shape[axis]
    q = jnp.pad(q, ((0, -n_features % n_devices), (0, 0)))

    def on_device(rows: Array, columns: Array) -> Strongest:
        found = strongest(rows, columns, top=top, precision=precision)
        first = jax.lax.axis_index(axis) * len(rows)
        every = jax.lax.all_gather(
            dataclasses.replace(found, row=found.row + first), axis, axis=1, tiled=True
        )
        size = jnp.abs(every.value)  # of one sign in each half
        _, best = jax.lax.top_k(size, min(top, size.shape[1]))
        return jax.tree.map(lambda a: jnp.take_along_axis(a, best, axis=1), every)

    rows, whole = PartitionSpec(axis), PartitionSpec()
    around = jax.sharding.get_abstract_mesh()  # of `jax.set_mesh`; it must be that one then
    run = jax.shard_map(
        on_device,
        mesh=mesh if around.empty else around,
        in_specs=(rows, whole),
        out_specs=whole,
        check_vma=False,  # it cannot see that what all devices gathered is the same on each
    )
    found = run(q, k)
    return dataclasses.replace(found, row=jnp.minimum(found.row, n_features - 1))

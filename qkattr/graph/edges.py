"""Edges: what every component of boundary b gives to a covector at boundary b+1,
in total and per head.

    edge = residual + mlp + sum_n head loading_n                 (paper, "Head loadings")

The total over all sources is one contraction over (kv heads x head_dim), with the query heads of a
group summed first:

    U[r, s] = sum_{n in group} A_n[t_r, s] O_n^T (g + g~)_r
    attention edge[r, s, c] = U[r, s] . V N'(x_{s,c})

so there is no per-head tensor of size R x T x C. Heads are split only for the edges that are kept
(`kept_parts`).
Axes: R target rows, T/S positions, C source slots, Q candidate sources, E kept sources of a row,
N heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.model.linear import FrozenBlock, Pulled, head_loadings, values
from qkattr.shapes import checked
from qkattr.sources.components import Components

#: Source positions whose edges are computed together: U of so many stays in cache.
SOURCES_AT_ONCE = 16


@struct.dataclass
class EdgeParts:
    """E edges of each of R rows, split: `residual + mlp + heads.sum(-1)` is the edge.

    residual: `[R, E]` what the residual stream carries.
    mlp: `[R, E]` what the MLP carries.
    heads: `[R, E, N]` one loading a head.
    """

    residual: Float[Array, "R E"]
    mlp: Float[Array, "R E"]
    heads: Float[Array, "R E N"]


@struct.dataclass
class Candidates:
    """Q sources among which edges are kept.

    position: `[Q]` where they are.
    vectors: `[Q, D]` what they are.
    values: `[Q, K, H]` their values at the heads.
    """

    position: Int[Array, "Q"]
    vectors: Float[Array, "Q D"]
    values: Float[Array, "Q K H"]


@checked
def source_values(frozen: FrozenBlock, components: Components) -> Float[Array, "S C K H"]:
    """Every component as the heads' values."""
    scale = frozen.seen.scale_attn_T[:, None, None, None]
    return components.map(lambda d: values(frozen, d)) * scale


@checked
def edge_totals(
    frozen: FrozenBlock, pulled: Pulled, components: Components, v_SCKH: Float[Array, "S C K H"]
) -> Float[Array, "S C R"]:
    """The edge from every component of boundary b to every row."""
    with jax.named_scope("edge_attention"):
        total = attention_edges(frozen, pulled, v_SCKH)
    with jax.named_scope("edge_own_position"):
        own = own_position(components, pulled.residual + pulled.mlp, pulled.position)
        rows = jnp.arange(pulled.position.shape[0])
        return total.at[pulled.position, :, rows].add(own)


@checked
def attention_edges(
    frozen: FrozenBlock, pulled: Pulled, v_SCKH: Float[Array, "S C K H"]
) -> Float[Array, "S C R"]:
    """The part of every edge that heads carry.

    Mapped over source positions, a few at a time: U is made and used in cache, and never held
    whole.
    """
    (R, N, H), (S, C, K) = pulled.heads.shape, v_SCKH.shape[:3]
    G = N // K
    pattern = frozen.seen.pattern_NTS[:, pulled.position].reshape(K, G, R, S)
    covectors_KGHR = jnp.transpose(pulled.heads.reshape(R, K, G, H), (1, 2, 3, 0))

    def one_source(inputs):
        pattern_KGR, v_CKH = inputs
        # Written out over G: as an einsum it becomes a batch of tiny matmuls on CPU.
        heads = (pattern_KGR[:, g, None] * covectors_KGHR[:, g] for g in range(G))
        per_source = functools.reduce(operator.add, heads)
        v_CX, per_source_XR = v_CKH.reshape(C, K * H), per_source.reshape(K * H, R)
        return jnp.dot(v_CX, per_source_XR, precision=frozen.precision)

    sources = jnp.transpose(pattern, (3, 0, 1, 2)), v_SCKH
    return jax.lax.map(one_source, sources, batch_size=SOURCES_AT_ONCE)


@checked
def own_position(
    components: Components,
    g: Float[Array | np.ndarray, "R D"],
    position: Int[Array | np.ndarray, "R"],
) -> Float[Array, "R C"]:
    """`g . x_c` for the components at each row's own position."""
    with_rows = jnp.einsum("RD,UD->RU", g, components.rows, precision="highest")
    features = jnp.take_along_axis(with_rows, components.row[position], axis=1)
    bias = jnp.einsum("RD,RD->R", g, components.bias[position], precision="highest")
    error = jnp.einsum("RD,RD->R", g, components.error[position], precision="highest")
    features = features * components.coefficient[position]
    return jnp.concatenate([features, bias[:, None], error[:, None]], axis=1)


@checked
def kept_parts(
    frozen: FrozenBlock,
    pulled: Pulled,
    candidates: Candidates,
    chosen: Int[Array, "R E"],
    *,
    precision: str,
) -> EdgeParts:
    """The split of E edges of every row, chosen among the candidate sources."""
    here = candidates.position[chosen] == pulled.position[:, None]

    def dot(g):
        products = jnp.einsum("RD,QD->RQ", g, candidates.vectors, precision=precision)
        return jnp.where(here, jnp.take_along_axis(products, chosen, axis=1), 0.0)

    return EdgeParts(
        residual=dot(pulled.residual),
        mlp=dot(pulled.mlp),
        heads=head_loadings(frozen, pulled, candidates.values, candidates.position, chosen),
    )

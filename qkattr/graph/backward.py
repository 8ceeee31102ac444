"""The backward sweep: from targets to the embeddings, one boundary after another, as one program.

At every boundary the rows are covectors at boundary b+1 (nodes that were kept there, read back
through block b) and direct targets at boundary b (logits at the last boundary, attention scores at
their own). With e the edges of a row,

    influence of a source
        = sum_rows influence(row) * |e| / sum of |e| over sources that depend on the prompt

(paper of attribution graphs, restricted to adjacent boundaries, so one pass suffices). Kept are the
sources that carry `keep` of the boundary's influence, R at most; they are the next rows. `bias` and
`const` keep their raw weights and get no influence; sinks are leaves, errors are when
`through_errors` is off. A second channel of influence stops at errors: the replacement score.

No decision is taken on the host: R, E and all shapes are static, and the function can be `vmap`ped
over prompts.
Axes: R target rows, P direct targets, E kept sources of a row, T position, C slots, N heads,
L blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from qkattr.config import BlockConfig, SweepConfig
from qkattr.graph.edges import (
    Candidates,
    EdgeParts,
    edge_totals,
    kept_parts,
    own_position,
    source_values,
)
from qkattr.kinds import PROMPT_KINDS, Kind
from qkattr.model.linear import freeze, pull
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import Components, ComponentStack
from qkattr.types import BlockStack

#: The kinds whose shares the leak table lists, in its order.
LEAK_KINDS = (Kind.FEATURE, Kind.TOKEN, Kind.POSITION, Kind.ERROR, Kind.SINK)


@struct.dataclass
class DirectTargets:
    """Covectors that read the residual stream itself.

    boundary: `[P]` where each reads it; -1 in a row of padding.
    position: `[P]` at which position.
    covector: `[P, D]` g.
    constant: `[P]` so that `g . x[boundary, position] + constant` is the target's value.
    influence: `[P]` what each starts with; 0 in a row of padding.
    """

    boundary: Int[Array | np.ndarray, "P"]
    position: Int[Array | np.ndarray, "P"]
    covector: Float[Array | np.ndarray, "P D"]
    constant: Float[Array | np.ndarray, "P"]
    influence: Float[Array | np.ndarray, "P"]


@struct.dataclass
class KeptNodes:
    """The sources kept at one boundary: the nodes of the graph there, in order of influence.

    position, slot: `[R]` where each is among `Components`.
    kind, index, activation: `[R]` what it is.
    influence: `[R]` what arrived at it.
    share: `[R]` cumulative within the boundary, this node included.
    valid: `[R]` false in unused rows.
    """

    position: Int[Array, "R"]
    slot: Int[Array, "R"]
    kind: Int[Array, "R"]
    index: Int[Array, "R"]
    activation: Float[Array, "R"]
    influence: Float[Array, "R"]
    share: Float[Array, "R"]
    valid: Bool[Array, "R"]


@struct.dataclass
class Leak:
    """Where a boundary's influence went.

    arriving: all of it.
    by_kind: `[5]` of it, by `LEAK_KINDS`.
    dropped: what no kept source carries.
    overflow: more than R sources would have been needed.
    clean_tokens, clean_errors: what reaches tokens and errors when it stops at errors.
    """

    arriving: Float[Array, ""]
    by_kind: Float[Array, "5"]
    dropped: Float[Array, ""]
    overflow: Bool[Array, ""]
    clean_tokens: Float[Array, ""]
    clean_errors: Float[Array, ""]


@struct.dataclass
class TargetRows:
    """The edges of R rows into the sources kept below them.

    source: `[R, E]` into the boundary's kept nodes (< R), or R + position for the bias node there.
    weight: `[R, E]` the edge; 0 where none was kept.
    constant: `[R]` the row's edge from `const`.
    total: `[R]` sum over all sources, constant included.
    absolute: `[R]` sum of |e| over the sources that depend on the prompt.
    error: `[R]` of it, over errors.
    kept: `[R]` of it, over the kept ones.
    parts: the edges split; None of direct targets, which are all residual.
    """

    source: Int[Array, "R E"]
    weight: Float[Array, "R E"]
    constant: Float[Array, "R"]
    total: Float[Array, "R"]
    absolute: Float[Array, "R"]
    error: Float[Array, "R"]
    kept: Float[Array, "R"]
    parts: EdgeParts | None = None


@struct.dataclass
class Sweep:
    """The graph on the device.

    kept: the nodes, with a leading axis L + 1 (boundary).
    leak: where influence went, with a leading axis L + 1 (boundary).
    direct: edges into the direct targets, with a leading axis L + 1 (boundary of the sources).
    rows: edges through the blocks, with a leading axis L (block): row r of block b is kept node r
      of boundary b + 1.
    """

    kept: KeptNodes
    leak: Leak
    direct: TargetRows
    rows: TargetRows


@partial(jax.jit, static_argnames=("cfg", "config"))
@on_any_mesh
@checked
def sweep(
    blocks: BlockStack,
    boundaries: Float[Array, "L+1 T D"],
    components: ComponentStack,
    targets: DirectTargets,
    *,
    cfg: BlockConfig,
    config: SweepConfig,
) -> Sweep:
    """Trace the targets back to the embeddings.

    Args:
      blocks: stacked weights.
      boundaries: the residual stream.
      components: of every boundary, stacked.
      targets: where the sweep starts.
      cfg: the block's configuration.
      config: the sweep's.
    """
    last, below = (
        jax.tree.map(lambda a: a[-1], components),
        jax.tree.map(lambda a: a[:-1], components),
    )
    n_blocks = boundaries.shape[0] - 1
    direct = _direct_edges(last, targets, n_blocks, config)
    kept, clean, leak = _keep(last, _flow(direct, targets, last, n_blocks), config)
    top_direct = _direct_rows(last, kept, direct, targets, n_blocks, config)

    def step(carry, inputs):
        kept_above, clean_above, g = carry
        weights, x, parts, b = inputs
        frozen = freeze(
            weights, x, cfg=cfg, linearisation=config.linearisation, precision=config.precision
        )
        live = kept_above.valid & _carries(kept_above.kind, config)
        pulled = pull(frozen, jnp.where(live[:, None], g, 0.0), kept_above.position)
        v = source_values(frozen, parts)
        edges = edge_totals(frozen, pulled, parts, v)
        influence = jnp.stack([kept_above.influence, clean_above]) * live[None]
        direct = _direct_edges(parts, targets, b, config)
        arriving = _arriving(edges, influence, parts) + _flow(direct, targets, parts, b)
        kept, clean, leak = _keep(parts, arriving, config)
        rows = _block_rows(frozen, pulled, parts, v, edges, kept, config)
        carry = kept, clean, parts.covectors(kept.position, kept.slot)
        return carry, (kept, leak, _direct_rows(parts, kept, direct, targets, b, config), rows)

    start = kept, clean, last.covectors(kept.position, kept.slot)
    inputs = blocks, boundaries[:-1], below, jnp.arange(n_blocks)
    _, (kept_below, leak_below, direct_below, rows) = jax.lax.scan(
        step, start, inputs, reverse=True
    )

    def append(lower, top):
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), lower, top)

    return Sweep(
        kept=append(kept_below, kept),
        leak=append(leak_below, leak),
        direct=append(direct_below, top_direct),
        rows=rows,
    )


def _depends(kind: Int[Array, "..."]) -> Bool[Array, "..."]:
    return jnp.isin(kind, jnp.array([int(k) for k in PROMPT_KINDS]))


def _carries(kind: Int[Array, "R"], config: SweepConfig) -> Bool[Array, "R"]:
    """Which kept nodes are targets in their turn."""
    leaf = (kind == Kind.SINK) | (kind == Kind.TOKEN) | (kind == Kind.POSITION)
    return ~leaf if config.through_errors else ~leaf & (kind != Kind.ERROR)


def _per_row(
    influence: Float[Array, "... R"], absolute: Float[Array, "R"]
) -> Float[Array, "... R"]:
    absolute = jax.lax.broadcast_to_rank(absolute, influence.ndim)
    return jnp.where(absolute > 0, influence / jnp.where(absolute > 0, absolute, 1.0), 0.0)


def _arriving(edges: Float[Array, "T C R"], influence: Float[Array, "2 R"], components: Components):
    """Influence of every source, in both channels: `[2, T, C]`."""
    strength = jnp.abs(edges) * _depends(components.kind)[..., None]
    weight = _per_row(influence, strength.sum((0, 1)))
    return jnp.einsum("TCR,XR->XTC", strength, weight, precision="highest")


def _direct_edges(
    components: Components, targets: DirectTargets, boundary, config
) -> Float[Array, "P C"]:
    """Edges of the direct targets of this boundary, all from their own position;
    zeros for the others.
    """
    with jax.named_scope("direct"):
        here = (targets.boundary == boundary)[:, None]
        return jnp.where(here, own_position(components, targets.covector, targets.position), 0.0)


def _flow(edges: Float[Array, "P C"], targets: DirectTargets, components: Components, boundary):
    """Influence that the direct targets of this boundary hand to their sources,
    the same in both channels.
    """
    strength = jnp.abs(edges) * _depends(components.kind[targets.position])
    influence = jnp.where(targets.boundary == boundary, targets.influence, 0.0)
    share = strength * _per_row(influence, strength.sum(1))[:, None]
    flow = jnp.zeros(components.kind.shape).at[targets.position].add(share)
    return jnp.broadcast_to(flow, (2, *flow.shape))


def _keep(components: Components, arriving: Float[Array, "2 T C"], config: SweepConfig):
    """Choose the sources that carry `keep` of the influence, R at most."""
    C = components.n_slots
    flat, clean = arriving.reshape(2, -1)
    total = flat.sum()
    influence, at = jax.lax.top_k(flat, min(config.max_rows, flat.shape[0]))
    padding = config.max_rows - influence.shape[0]
    influence, at = jnp.pad(influence, (0, padding)), jnp.pad(at, (0, padding))
    running = jnp.cumsum(influence)
    valid = (influence > 0) & (running - influence < config.keep * total)
    kind = components.kind.reshape(-1)
    position, slot = at // C, at % C
    kept = KeptNodes(
        position=position,
        slot=slot,
        kind=jnp.where(valid, kind[at], int(Kind.NONE)),
        index=components.index.reshape(-1)[at],
        activation=components.activations.reshape(-1)[at],
        influence=jnp.where(valid, influence, 0.0),
        share=running / jnp.maximum(total, 1e-30),
        valid=valid,
    )
    is_error = kind == Kind.ERROR
    is_token = (kind == Kind.TOKEN) | (kind == Kind.POSITION)
    leak = Leak(
        arriving=total,
        by_kind=jnp.stack([jnp.where(kind == k, flat, 0.0).sum() for k in LEAK_KINDS]),
        dropped=total - kept.influence.sum(),
        overflow=running[-1] < config.keep * total,
        clean_tokens=jnp.where(is_token, clean, 0.0).sum(),
        clean_errors=jnp.where(is_error, clean, 0.0).sum(),
    )
    clean_kept = jnp.where(valid & (kept.kind != Kind.ERROR), clean[at], 0.0)
    return kept, clean_kept, leak


def _row_sums(edges: Float[Array, "X R"], kind: Int[Array, "X #R"]) -> dict[str, Any]:
    strength = jnp.abs(edges)
    return dict(
        absolute=jnp.where(_depends(kind), strength, 0.0).sum(0),
        error=jnp.where(kind == Kind.ERROR, strength, 0.0).sum(0),
    )


def _strongest(weight: Float[Array, "R Q"], depends: Bool[Array, "R Q"], config: SweepConfig):
    """The E strongest candidates of each row, their weights, and what they carry of |e|."""
    n_edges = min(config.max_edges, weight.shape[1])
    _, chosen = jax.lax.top_k(jnp.abs(weight), n_edges)
    kept = jnp.take_along_axis(weight, chosen, axis=1)
    carried = jnp.abs(kept) * jnp.take_along_axis(depends, chosen, axis=1)
    return chosen, kept, carried.sum(1)


def _block_rows(
    frozen, pulled, components, v, edges, kept: KeptNodes, config: SweepConfig
) -> TargetRows:
    """Edges through the block from the kept nodes, and from the bias of every position."""
    with jax.named_scope("kept_edges"):
        n_positions, n_slots = components.kind.shape
        n_rows, n_kept = edges.shape[-1], kept.position.shape[0]
        everywhere = jnp.arange(n_positions)
        candidates = Candidates(
            position=jnp.concatenate([kept.position, everywhere]),
            vectors=jnp.concatenate([components.at(kept.position, kept.slot), components.bias]),
            values=jnp.concatenate([v[kept.position, kept.slot], v[:, components.bias_slot]]),
        )
        at = kept.position * n_slots + kept.slot
        to_kept = jnp.where(kept.valid[:, None], edges.reshape(-1, n_rows)[at], 0.0).T
        weight = jnp.concatenate([to_kept, edges[:, components.bias_slot].T], axis=1)
        depends = jnp.broadcast_to(jnp.arange(weight.shape[1]) < n_kept, weight.shape)
        chosen, strongest, carried = _strongest(weight, depends, config)
        parts = kept_parts(frozen, pulled, candidates, chosen, precision=config.precision)
        return TargetRows(
            source=chosen,
            weight=strongest,
            constant=pulled.constant,
            total=edges.sum((0, 1)) + pulled.constant,
            kept=carried,
            parts=parts,
            **_row_sums(edges.reshape(-1, n_rows), components.kind.reshape(-1, 1)),
        )


def _direct_rows(
    components: Components,
    kept: KeptNodes,
    edges,
    targets: DirectTargets,
    boundary,
    config: SweepConfig,
) -> TargetRows:
    """Edges of the direct targets from the kept nodes at their position,
    and from the bias there.
    """
    n_positions, n_slots = components.kind.shape
    same = kept.valid[None] & (kept.position[None] == targets.position[:, None])
    to_kept = jnp.where(same, edges[:, kept.slot], 0.0)
    own = jnp.arange(n_positions)[None] == targets.position[:, None]
    weight = jnp.concatenate(
        [to_kept, jnp.where(own, edges[:, components.bias_slot, None], 0.0)], axis=1
    )
    depends = jnp.broadcast_to(jnp.arange(weight.shape[1]) < to_kept.shape[1], weight.shape)
    chosen, strongest, carried = _strongest(weight, depends, config)
    constant = jnp.where(targets.boundary == boundary, targets.constant, 0.0)
    return TargetRows(
        source=chosen,
        weight=strongest,
        constant=constant,
        total=edges.sum(1) + constant,
        kept=carried,
        **_row_sums(edges.T, components.kind[targets.position].T),
    )

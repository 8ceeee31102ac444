"""From what the sweep and the effects returned to the graph's columns, once, on the host.

Rows of NumPy throughout: no loop over nodes or edges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array

from qkattr.graph.accounts import account_table, head_table, node_columns
from qkattr.graph.backward import LEAK_KINDS, DirectTargets, Sweep
from qkattr.graph.effects import Effects
from qkattr.graph.tables import Edges, Graph, Nodes
from qkattr.kinds import Kind


def with_effects(
    graph: Graph, found: Sequence[Effects], kind: np.ndarray, index: np.ndarray
) -> Graph:
    """The graph with the effects on its targets.

    Args:
      graph: from `build_graph`.
      found: on the host, of one group of targets after the other, in their order; the first has
        `places`.
      kind, index: `[L+1, T, C]` of the components.
    """
    nodes, targets = graph.nodes, graph.targets
    where = dict(boundary=nodes.boundary, position=nodes.position)
    effect = node_columns(found, kind, index, **where, kind_X=nodes.kind, index_X=nodes.index)
    effect = effect[:, : len(targets)]
    effect[targets] = np.diag(np.concatenate([one.value for one in found])[: len(targets)])
    places = found[0].places
    assert places is not None  # of the first group
    return dataclasses.replace(
        graph,
        nodes=dataclasses.replace(nodes, effect=effect),
        account=account_table(found, targets, nodes.boundary[targets]),
        heads=head_table(places),
    )


def build_graph(
    swept: Sweep, targets: DirectTargets, kinds: np.ndarray, indices: np.ndarray
) -> Graph:
    """Assemble the tables.

    Args:
      swept: the sweep, on the device; transferred here, once.
      targets: its direct targets.
      kinds, indices: `[P]` of each direct target: LOGIT and the token, or SCORE and the caller's
        number for it.
    """
    swept, targets = jax.device_get((swept, targets))
    kept, n_rows = swept.kept, swept.kept.valid.shape[1]
    n_kept = np.cumsum(kept.valid.sum(1))
    ids = np.full(kept.valid.shape, -1)
    ids[kept.valid] = np.arange(n_kept[-1])
    is_target = np.flatnonzero(targets.boundary >= 0)
    target_ids = np.full(len(targets.boundary), -1)
    target_ids[is_target] = n_kept[-1] + np.arange(len(is_target))

    through = _through_blocks(swept, ids, n_rows)
    direct = _direct(swept, ids, target_ids, targets, n_rows)
    edges = {name: np.concatenate([through[name], direct[name]]) for name in through}
    nodes = _kept_nodes(swept)
    _append(nodes, _target_nodes(swept, targets, is_target, kinds, indices))
    edges = _name_extras(nodes, edges)
    graph = Graph(
        nodes=Nodes(**nodes, effect=np.zeros((len(nodes["kind"]), 0))),
        edges=Edges(**edges),
        leak=_leak_table(swept),
        replacement=_replacement(swept),
        completeness=_completeness(nodes),
    )
    return graph


_ROW_SUMS = ("total", "absolute", "error", "kept")


def _kept_nodes(swept: Sweep) -> dict[str, np.ndarray]:
    kept, valid = swept.kept, swept.kept.valid
    boundary = np.broadcast_to(np.arange(valid.shape[0])[:, None], valid.shape)
    columns = dict(boundary=boundary[valid])
    for name in ("position", "kind", "index", "activation", "influence", "share"):
        columns[name] = getattr(kept, name)[valid]
    for name in _ROW_SUMS:
        rows = np.concatenate([np.full((1, valid.shape[1]), np.nan), getattr(swept.rows, name)])
        columns[name] = rows[valid]
    # Leaves are not rows: what the sweep wrote for them is the sum of a zero covector.
    leaf = columns["absolute"] == 0
    for name in _ROW_SUMS:
        columns[name] = np.where(leaf, np.nan, columns[name])
    return columns


def _target_nodes(swept, targets, is_target, kinds, indices) -> dict[str, np.ndarray]:
    boundary = targets.boundary[is_target]
    n = len(is_target)
    columns = dict(
        boundary=boundary,
        position=targets.position[is_target],
        kind=np.asarray(kinds),
        index=np.asarray(indices),
        activation=np.zeros(n),
        influence=targets.influence[is_target],
        share=np.zeros(n),
    )
    for name in _ROW_SUMS:
        columns[name] = getattr(swept.direct, name)[boundary, is_target]
    return columns


def _through_blocks(swept: Sweep, ids: np.ndarray, n_rows: int) -> dict[str, np.ndarray]:
    """Edges of kept nodes through their block. A source below 0 names a bias or const node,
    see `_name_extras`.
    """
    rows, parts = swept.rows, swept.rows.parts
    assert parts is not None  # only direct targets have none
    block, row, slot = np.nonzero((rows.weight != 0) & swept.kept.valid[1:, :, None])
    source = _source(rows.source[block, row, slot], block, ids, n_rows)
    n_heads = parts.heads.shape[-1]
    edges = dict(
        source=source,
        target=ids[block + 1, row],
        block=block,
        weight=rows.weight[block, row, slot],
        residual=parts.residual[block, row, slot],
        mlp=parts.mlp[block, row, slot],
        heads=parts.heads[block, row, slot],
    )
    block, row = np.nonzero((rows.constant != 0) & swept.kept.valid[1:])
    constant = rows.constant[block, row]
    consts = dict(
        source=_extra(Kind.CONST, block + 1, swept.kept.position[block + 1, row]),
        target=ids[block + 1, row],
        block=block,
        weight=constant,
        residual=np.zeros_like(constant),
        mlp=np.zeros_like(constant),
        heads=np.zeros((len(constant), n_heads), constant.dtype),
    )
    return {name: np.concatenate([edges[name], consts[name]]) for name in edges}


def _direct(swept: Sweep, ids, target_ids, targets, n_rows: int) -> dict[str, np.ndarray]:
    rows = swept.direct
    boundary, row, slot = np.nonzero(rows.weight)
    weight = rows.weight[boundary, row, slot]
    source = _source(rows.source[boundary, row, slot], boundary, ids, n_rows)
    boundary, const_row = np.nonzero(rows.constant)
    constant = rows.constant[boundary, const_row]
    const = _extra(Kind.CONST, boundary, targets.position[const_row])
    weight = np.concatenate([weight, constant])
    assert swept.rows.parts is not None  # only direct targets have none
    n_heads = swept.rows.parts.heads.shape[-1]
    return dict(
        source=np.concatenate([source, const]),
        target=np.concatenate([target_ids[row], target_ids[const_row]]),
        block=np.full(len(weight), -1),
        weight=weight,
        residual=np.where(np.arange(len(weight)) < len(source), weight, 0),
        mlp=np.zeros_like(weight),
        heads=np.zeros((len(weight), n_heads), weight.dtype),
    )


# A bias or const node is named by a negative number until it gets its row in the table.
_STRIDE = 2**20


def _extra(kind: Kind, boundary: np.ndarray, position: Array | np.ndarray) -> np.ndarray:
    return -1 - ((boundary * _STRIDE + position) * 2 + (kind == Kind.CONST))


def _source(source: Array, boundary: np.ndarray, ids: np.ndarray, n_rows: int) -> np.ndarray:
    is_bias = source >= n_rows
    kept = ids[boundary, np.minimum(source, n_rows - 1)]
    return np.where(is_bias, _extra(Kind.BIAS, boundary, source - n_rows), kept)


def _name_extras(nodes: dict, edges: dict) -> dict:
    """Give bias and const nodes rows at the end of the table."""
    names, inverse = np.unique(edges["source"][edges["source"] < 0], return_inverse=True)
    code, is_const = np.divmod(-1 - names, 2)
    n, first = len(names), len(nodes["kind"])
    _append(
        nodes,
        dict(
            boundary=code // _STRIDE,
            position=code % _STRIDE,
            kind=np.where(is_const == 1, int(Kind.CONST), int(Kind.BIAS)),
            index=np.full(n, -1),
            activation=np.zeros(n),
            influence=np.zeros(n),
            share=np.ones(n),
            **{name: np.full(n, np.nan) for name in _ROW_SUMS},
        ),
    )
    source = edges["source"].copy()
    source[source < 0] = first + inverse
    return {**edges, "source": source}


def _append(nodes: dict, more: dict) -> None:
    for name, column in more.items():
        nodes[name] = np.concatenate([nodes[name], column])


def _leak_table(swept: Sweep) -> list[dict]:
    leak = swept.leak
    table = []
    for b in reversed(range(len(leak.arriving))):
        arriving = float(leak.arriving[b])
        shares = {kind.label: float(v) for kind, v in zip(LEAK_KINDS, leak.by_kind[b], strict=True)}
        table.append(
            dict(
                boundary=b,
                surviving=arriving,
                **shares,
                dropped=float(leak.dropped[b]),
                kept_nodes=int(swept.kept.valid[b].sum()),
                overflow=bool(leak.overflow[b]),
            )
        )
    return table


def _replacement(swept: Sweep) -> float:
    """With errors as leaves: influence that reaches tokens over influence that
    reaches tokens or errors.
    """
    tokens, errors = swept.leak.clean_tokens.sum(), swept.leak.clean_errors.sum()
    return float(tokens / max(tokens + errors, 1e-30))


def _completeness(nodes: dict) -> float:
    """Influence-weighted mean over targets of 1 - |error edges| / |edges|."""
    rows = np.nan_to_num(nodes["absolute"]) > 0
    weight = nodes["influence"][rows]
    explained = 1 - nodes["error"][rows] / nodes["absolute"][rows]
    return float((weight * explained).sum() / max(weight.sum(), 1e-30))

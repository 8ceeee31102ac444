"""Tables for pandas."""

from __future__ import annotations

import dataclasses

import numpy as np

from qkattr.errors import InputError
from qkattr.extras import need
from qkattr.kinds import Kind
from qkattr.result import PlaceRow, Traced

TABLES = ("edges", "heads", "nodes", "effects", "account")


def frame(result: Traced, table: str):
    """See `Result.to_pandas`."""
    if table not in TABLES:
        raise InputError(f"no table {table!r}; expected one of {', '.join(TABLES)}")
    return need("pandas", "to_pandas needs").DataFrame(
        dict(nodes=_nodes, edges=_edges, heads=_heads, effects=_effects, account=_account)[table](
            result
        )
    )


def _names(result: Traced) -> np.ndarray:
    return np.array([result.node_id(i) for i in range(len(result.graph.nodes))])


def _nodes(result: Traced) -> dict:
    columns = dataclasses.asdict(result.graph.nodes)
    columns["effect"] = result.graph.effect()
    columns["kind"] = [Kind(k).label for k in columns["kind"]]
    tokens = [result.tokens[t] for t in columns["position"]]
    label = [result.label(i) for i in range(len(result.graph.nodes))]
    return dict(node_id=_names(result), **columns, token=tokens, label=label)


def _edges(result: Traced) -> dict:
    edges, names = result.graph.edges, _names(result)
    return dict(
        source=names[edges.source],
        target=names[edges.target],
        block=edges.block,
        weight=edges.weight,
        residual=edges.residual,
        mlp=edges.mlp,
        attention=edges.heads.sum(1),
        influence=result.graph.edge_influence(),
    )


def _heads(result: Traced) -> dict:
    edges, names = result.graph.edges, _names(result)
    at, head = np.nonzero(edges.heads)
    return dict(
        source=names[edges.source[at]],
        target=names[edges.target[at]],
        block=edges.block[at],
        head=head,
        loading=edges.heads[at, head],
        influence=result.graph.head_influence()[at, head],
    )


def _effects(result: Traced) -> list[PlaceRow]:
    """One row a place of a head."""
    return result.head_effects()


def _account(result: Traced) -> dict:
    columns = dataclasses.asdict(result.graph.account)
    return dict(columns, node=_names(result)[columns["node"]])

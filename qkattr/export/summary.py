"""What the page and the terminal both say of a result, as rows: routes, heads, edges."""

from __future__ import annotations

from typing import Any

import numpy as np

from qkattr.graph.paths import Route
from qkattr.result import Result
from qkattr.types import Kind


def number(x: float) -> str:
    """A signed number in four significant digits."""
    return f"{x:+.4g}"


def name(result: Result, node: int) -> str:
    """A node in words: what it is, where."""
    nodes = result.graph.nodes
    kind, t, b = Kind(nodes.kind[node]), int(nodes.position[node]), int(nodes.boundary[node])
    label, token = result.label(node), result.tokens[t]
    if kind == Kind.FEATURE:
        said = f" {label}" if label else ""
        return f"feature {b}:{nodes.index[node]}{said} on {token!r} {t}"
    if kind == Kind.LOGIT:
        return f"logit {label!r}"
    if kind == Kind.SCORE:
        return label
    if kind == Kind.TOKEN:
        return f"token {token!r} {t}"
    return f"{kind.label} {b} on {token!r} {t}"


def component(described: dict[str, Any]) -> str:
    """A component of a QK attribution in words."""
    kind, index, label = described["kind"], described["index"], described.get("label", "")
    text = kind if index is None else f"{kind} {index}"
    return f"{text} {label}" if label else text


def route_hops(result: Result, route: Route) -> list[dict[str, Any]]:
    """The positions of a route, each with the head that brought its strongest path there."""
    nodes, edges = result.graph.nodes, result.graph.edges
    first = int(nodes.position[route.nodes[0]])
    hops = [dict(via="", position=first, text=result.tokens[first])]
    for edge in route.edges:
        source, target = nodes.position[edges.source[edge]], nodes.position[edges.target[edge]]
        if source == target:
            continue
        head = int(np.abs(edges.heads[edge]).argmax())
        via = f" → {edges.block[edge]}.{head} → "
        hops.append(dict(via=via, position=int(target), text=result.tokens[target]))
    target = route.nodes[-1]
    hops.append(dict(via=" → ", position="", text=result.label(target)))
    return hops


def carrying_heads(result: Result, n: int = 15) -> list[dict[str, Any]]:
    """The (head, query, key) through which most influence flowed between two positions."""
    from qkattr.analysis import ranked_scores

    ranked = ranked_scores(result.graph, n)
    edges, nodes = result.graph.edges, result.graph.nodes
    source, target = nodes.position[edges.source], nodes.position[edges.target]
    most = max((influence for _, influence in ranked), default=1.0)
    rows = []
    for (block, head, query, key), influence in ranked:
        there = (edges.block == block) & (source == key) & (target == query)
        rows.append(
            dict(
                head=f"{block}.{head}",
                query=query,
                key=key,
                source=result.tokens[key],
                target=result.tokens[query],
                influence=influence,
                bar=influence / max(most, 1e-30),
                loading=number(edges.heads[there, head].sum(dtype=float)),
            )
        )
    return rows


def strongest_edges(result: Result, n: int = 40) -> list[dict[str, Any]]:
    """The edges with most influence that did more than carry a feature on in place."""
    edges, nodes = result.graph.edges, result.graph.nodes
    influence = result.graph.edge_influence()
    crossing = nodes.position[edges.source] != nodes.position[edges.target]
    moved = crossing | (np.abs(edges.residual) < np.abs(edges.weight) / 2)
    rows = []
    for i in np.argsort(-np.where(moved & (edges.block >= 0), influence, 0.0), kind="stable")[:n]:
        if influence[i] == 0 or not moved[i] or edges.block[i] < 0:
            break
        order = np.argsort(-np.abs(edges.heads[i]))[:3]
        carried = [
            f"{edges.block[i]}.{h} {number(edges.heads[i, h])}" for h in order if edges.heads[i, h]
        ]
        rows.append(
            dict(
                source=name(result, edges.source[i]),
                target=name(result, edges.target[i]),
                influence=float(influence[i]),
                weight=number(edges.weight[i]),
                residual=number(edges.residual[i]),
                mlp=number(edges.mlp[i]),
                heads=", ".join(carried),
            )
        )
    return rows

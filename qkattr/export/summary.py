"""What the page and the terminal both say of a result, as rows: routes, heads, edges."""

from __future__ import annotations

from typing import Any

import numpy as np

from qkattr.errors import clipped, printable, quoted
from qkattr.graph.paths import Route, ranked_scores
from qkattr.result import Result
from qkattr.types import Kind


def number(x: float) -> str:
    """A signed number in four significant digits; large ones whole, with separators."""
    if x == 0:
        return "0"
    return f"{x:+,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:+.4g}"


def visible(text: str, most: int = 100) -> str:
    """Text of a prompt or a label on one line, with what has no glyph written out."""
    for white, sign in (("\n", "⏎"), ("\t", "⇥")):
        text = text.replace(white, sign)
    return clipped(printable(text), most)


def name(result: Result, node: int) -> str:
    """A node in words: what it is, where."""
    nodes = result.graph.nodes
    kind, t, b = Kind(nodes.kind[node]), int(nodes.position[node]), int(nodes.boundary[node])
    label, token = result.label(node), quoted(result.tokens[t])
    if kind == Kind.FEATURE:
        said = f" {visible(label)}" if label else ""
        return f"feature {b}:{nodes.index[node]}{said} on {token} {t}"
    if kind == Kind.LOGIT:
        return f"logit {quoted(label)}"
    if kind == Kind.SCORE:
        return label
    if kind == Kind.TOKEN:
        return f"token {token} {t}"
    return f"{kind.label} {b} on {token} {t}"


def component(described: dict[str, Any]) -> str:
    """A component of a QK attribution in words."""
    kind, index, label = described["kind"], described["index"], described.get("label", "")
    text = kind if index is None else f"{kind} {index}"
    if not label:
        return text
    return f"{text} {quoted(label) if kind == Kind.TOKEN.label else visible(label)}"


def route_hops(result: Result, route: Route) -> list[dict[str, Any]]:
    """The positions of a route, each with the head that brought its strongest path there."""
    nodes, edges = result.graph.nodes, result.graph.edges
    first = int(nodes.position[route.nodes[0]])
    hops = [dict(via="", position=first, text=result.tokens[first])]
    for edge in route.edges:
        source, target = nodes.position[edges.source[edge]], nodes.position[edges.target[edge]]
        if source == target:
            continue
        head = _leading_head(result, int(edges.block[edge]), int(source), int(target))
        via = f" → {edges.block[edge]}.{head} → "
        hops.append(dict(via=via, position=int(target), text=result.tokens[target]))
    target = route.nodes[-1]
    hops.append(dict(via=" → ", position="", text=result.label(target)))
    return hops


def _leading_head(result: Result, block: int, source: int, target: int) -> int:
    """The head of a block that carried most influence from one position to another."""
    edges, nodes = result.graph.edges, result.graph.nodes
    there = edges.block == block
    there &= nodes.position[edges.source] == source
    there &= nodes.position[edges.target] == target
    return int(result.graph.head_influence()[there].sum(0).argmax())


def carrying_heads(result: Result, n: int = 15) -> list[dict[str, Any]]:
    """The (head, query, key) through which most influence flowed between two positions."""
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
    order = np.argsort(-np.where(moved & (edges.block >= 0), influence, 0.0), kind="stable")
    for i in order[:n].tolist():
        if influence[i] == 0 or not moved[i] or edges.block[i] < 0:
            break
        loadings = edges.heads[i].tolist()
        strongest = sorted(range(len(loadings)), key=lambda h: -abs(loadings[h]))[:3]
        carried = [f"{edges.block[i]}.{h} {number(loadings[h])}" for h in strongest if loadings[h]]
        rows.append(
            dict(
                source=name(result, int(edges.source[i])),
                target=name(result, int(edges.target[i])),
                influence=float(influence[i]),
                weight=number(float(edges.weight[i])),
                residual=number(float(edges.residual[i])),
                mlp=number(float(edges.mlp[i])),
                heads=", ".join(carried),
            )
        )
    return rows

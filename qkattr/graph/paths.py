"""The strongest routes through a graph, from its targets back to the prompt; and its heads.

A path's share is the product of its edges' shares |e| / sum |e| (over sources that depend on the
prompt), times its target's influence: what of the targets' influence flows along it. Most of the
many paths differ only in which feature carries the same thing through the residual stream, so paths
are grouped into routes: the sequence of positions they visit. A route's share is the sum over its
paths; it is shown by the strongest of them.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from qkattr.graph.tables import Graph
from qkattr.types import Kind

#: (block, head, query position, key position)
Place = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Route:
    """positions: visited, from the prompt to the target. share: of the targets' influence.
    nodes, edges: the strongest path along it, from its source; path_share: its own share.
    """

    positions: tuple[int, ...]
    share: float
    path_share: float
    nodes: tuple[int, ...]
    edges: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Flow:
    """What reaches one boundary along one route: per node the flow, the strongest path's,
    and that path's next edge.
    """

    nodes: np.ndarray
    flow: np.ndarray
    best: np.ndarray
    edge: np.ndarray


def strongest_routes(graph: Graph, n: int = 5, *, most: int = 200) -> list[Route]:
    """The n routes that carry the most influence down to boundary 0.

    Args:
      graph: the graph.
      n: how many.
      most: how many routes are followed at a boundary, the strongest ones; more is slower and
        closer to all of them.
    """
    nodes, edges = graph.nodes, graph.edges
    absolute = np.nan_to_num(nodes.absolute[edges.target])
    fraction = np.abs(edges.weight) / np.maximum(absolute, 1e-30)
    fraction[np.isin(nodes.kind[edges.source], (Kind.BIAS, Kind.CONST))] = 0.0
    by_target = np.argsort(edges.target, kind="stable")
    starts = np.searchsorted(edges.target[by_target], np.arange(len(nodes) + 1))
    n_boundaries = int(nodes.boundary.max()) + 1
    levels: list[dict[tuple[int, ...], _Flow]] = [{} for _ in range(n_boundaries + 1)]
    for b in reversed(range(n_boundaries)):
        pieces: dict[tuple[int, ...], list] = defaultdict(list)
        for route, above in levels[b + 1].items():
            counts = starts[above.nodes + 1] - starts[above.nodes]
            into = np.repeat(np.arange(len(above.nodes)), counts)
            offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            at = by_target[starts[above.nodes][into] + offset]
            _extend(pieces, graph, route, at, above.flow[into], above.best[into], fraction)
        direct = np.flatnonzero((edges.block < 0) & (nodes.boundary[edges.target] == b))
        start = nodes.influence[edges.target[direct]]
        _extend(pieces, graph, (), direct, start, start, fraction)
        merged = {route: _merge(parts) for route, parts in pieces.items()}
        strongest = sorted(merged, key=lambda route: -merged[route].flow.sum())[:most]
        levels[b] = {route: merged[route] for route in strongest}
    return [_follow(graph, levels, route) for route in list(levels[0])[:n]]


def _extend(pieces, graph: Graph, route, at, flow, best, fraction) -> None:
    """Carry flow over the edges `at`, and sort it by the position it comes from."""
    source = graph.edges.source[at]
    position = graph.nodes.position[source]
    flow, best = flow * fraction[at], best * fraction[at]
    for q in np.unique(position[flow > 0]):
        here = (position == q) & (flow > 0)
        longer = route if route and route[0] == q else (int(q), *route)
        pieces[longer].append((source[here], flow[here], best[here], at[here]))


def _merge(parts: list) -> _Flow:
    source, flow, best, edge = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((best, source))
    source, flow, best, edge = source[order], flow[order], best[order], edge[order]
    last = np.append(np.flatnonzero(np.diff(source)), len(source) - 1)
    first = np.append(0, last[:-1] + 1)
    return _Flow(source[last], np.add.reduceat(flow, first), best[last], edge[last])


def _follow(graph: Graph, levels: list[dict], route: tuple[int, ...]) -> Route:
    """The strongest path along a route, from boundary 0 up to its target."""
    start = levels[0][route]
    node = start.nodes[np.argmax(start.best)]
    path, steps, rest = [int(node)], [], route
    while graph.nodes.kind[node] not in (Kind.LOGIT, Kind.SCORE):
        level = levels[graph.nodes.boundary[node]][rest]
        edge = level.edge[np.searchsorted(level.nodes, node)]
        target = graph.edges.target[edge]
        if graph.nodes.position[target] != graph.nodes.position[node]:
            rest = rest[1:]
        path.append(int(target))
        steps.append(int(edge))
        node = target
    return Route(
        positions=route,
        share=float(start.flow.sum()),
        path_share=float(start.best.max()),
        nodes=tuple(path),
        edges=tuple(steps),
    )


def ranked_scores(graph: Graph, n: int) -> list[tuple[Place, float]]:
    """The (block, head, query, key) that carry most influence between two positions."""
    nodes, edges = graph.nodes, graph.edges
    query, key = nodes.position[edges.target], nodes.position[edges.source]
    crossing = np.flatnonzero((edges.block >= 0) & (query != key))
    if not len(crossing):
        return []
    span = int(nodes.position.max()) + 1
    code = (edges.block[crossing].astype(np.int64) * span + query[crossing]) * span + key[crossing]
    order = np.argsort(code, kind="stable")
    code, first = np.unique(code[order], return_index=True)
    total = np.add.reduceat(graph.head_influence()[crossing[order]], first, axis=0)
    strongest = np.argsort(-total, axis=None, kind="stable")[:n]
    ranked = []
    for group, head in zip(*np.unravel_index(strongest, total.shape), strict=True):
        if total[group, head] > 0:
            rest, s = divmod(int(code[group]), span)
            block, t = divmod(rest, span)
            ranked.append(((block, int(head), t, s), float(total[group, head])))
    return ranked

"""The strongest routes through a graph, from a target back to the prompt; and its heads.

An edge brings its target the share |e| / sum |e| of what flows into it (the sum is over all sources
that depend on the prompt, kept or not). A path's share is the product along it: the part of its
target's influence that comes down it to boundary 0. It has no sign. A route is a sequence of
positions, and its share is the sum over all paths that visit these positions in this order.
Positions fall from target to prompt, so every path has one route, and with

    down[x]   what flows into node x from the target along the part of the route above x
    up[x]     what of the flow into x reaches boundary 0 along the part of the route below x

an edge carries down[target] * share * up[source] of the route: no path is listed, none left out.
Each path crosses from one position to the next once, by heads alone, so the shares of a hop's heads
(an edge's flow, split by |loading|) add up to 1 over all heads of all blocks.

Routes are found best first. All routes with the same end together carry the sum over edges of
down[target] * share * reach[source], where `reach` is what of the flow into a node reaches
boundary 0 by any path. None of them can carry more, so the routes found are the strongest ones.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator

import numpy as np

from qkattr.graph.tables import Graph
from qkattr.kinds import PROMPT_KINDS, Kind


@dataclasses.dataclass(frozen=True)
class Hop:
    """One step of a route between two positions.

    source, target: the positions.
    heads: (block, head, share of the hop), the strongest first; the shares add up to 1.
    """

    source: int
    target: int
    heads: tuple[tuple[int, int, float], ...]


@dataclasses.dataclass(frozen=True)
class Route:
    """A sequence of positions, and what flows along it.

    target: the node of the logit or score.
    positions: from the prompt to the target.
    share: of the influence of this target.
    hops: between the positions, in their order.
    """

    target: int
    positions: tuple[int, ...]
    share: float
    hops: tuple[Hop, ...]


def strongest_routes(graph: Graph, n: int = 5, *, least: float = 1e-3) -> list[Route]:
    """The n strongest routes into each target; the target with most influence comes first.

    least: routes with a smaller share of what of their target reaches boundary 0 are left out,
    which bounds the search.
    """
    flows = _Flows(graph)
    return [
        flows.route(target, positions, share)
        for target in target_nodes(graph)
        for positions, share in itertools.islice(flows.search(target, least), n)
    ]


def target_nodes(graph: Graph) -> list[int]:
    """The nodes of logits and scores, by falling influence."""
    nodes = graph.nodes
    found = np.flatnonzero(np.isin(nodes.kind, (Kind.LOGIT, Kind.SCORE)))
    return found[np.argsort(-nodes.influence[found], kind="stable")].tolist()


class _Flows:
    """The edges along which influence flows through blocks, sorted by the position of their target,
    then of their source, then by block.

    between: the slice of the edges from one position to another, by (source, target). within: the
    slices of the edges inside a position, block by block. sources: the positions from which edges
    lead to a position.
    """

    def __init__(self, graph: Graph):
        nodes, edges = graph.nodes, graph.edges
        absolute = np.maximum(np.nan_to_num(nodes.absolute), 1e-30)
        share = np.abs(edges.weight) / absolute[edges.target]
        share = np.where(np.isin(nodes.kind[edges.source], PROMPT_KINDS), share, 0.0)
        by = (edges.block, nodes.position[edges.source], nodes.position[edges.target])
        order = np.lexsort(by)
        self.at = at = order[(edges.block[order] >= 0) & (share[order] > 0)]
        self.graph, self.all_shares = graph, share
        self.source, self.target, self.share = edges.source[at], edges.target[at], share[at]
        self.block = edges.block[at]
        self.first = (nodes.boundary == 0) & np.isin(nodes.kind, PROMPT_KINDS)
        self.between: dict[tuple[int, int], slice] = {}
        self.within: dict[int, list[slice]] = {}
        self.sources: dict[int, list[int]] = {}
        source, target = nodes.position[self.source], nodes.position[self.target]
        for part in _runs(0, source, target):
            s, t = int(source[part.start]), int(target[part.start])
            if s == t:
                self.within[t] = _runs(part.start, self.block[part])
            else:
                self.between[s, t] = part
                self.sources.setdefault(t, []).append(s)
        self.reach = self.first.astype(float)
        by_block = np.argsort(self.block, kind="stable")
        for part in _runs(0, self.block[by_block]):
            self._lift(self.reach, by_block[part])

    def search(self, target: int, least: float) -> Iterator[tuple[tuple[int, ...], float]]:
        """Routes into a target with their shares, the strongest first."""
        position, into = self._into(target)
        least *= float(into @ self.reach)
        order = itertools.count()  # breaks ties
        # Whole routes without a flow, under what they carry; and ends of routes, under what all
        # routes that end so carry, with the flow at the last position that is known.
        heap: list[tuple[float, int, tuple[int, ...], np.ndarray | None]]
        heap = [(-np.inf, next(order), (position,), self._settle(position, into))]
        while heap:
            bound, _, route, flow = heapq.heappop(heap)
            if flow is None:
                yield route, -bound
                continue
            here, *behind = route
            if behind:
                flow = self._cross(here, behind[0], flow)
            longer: list[tuple[float, tuple[int, ...], np.ndarray | None]]
            longer = [(float(flow[self.first].sum()), route, None)]
            for s in self.sources.get(here, []):
                carried = self._carried(s, here, flow, self.reach)
                longer.append((float(carried.sum()), (s, *route), flow))
            for carries, positions, flow in longer:
                if carries > 0 and carries >= least:
                    heapq.heappush(heap, (-carries, next(order), positions, flow))

    def route(self, target: int, positions: tuple[int, ...], share: float) -> Route:
        """A route with what every head carries of its hops."""
        pairs = list(itertools.pairwise(positions))
        position, into = self._into(target)
        down = [self._settle(position, into)]
        for s, t in reversed(pairs):
            down.append(self._cross(s, t, down[-1]))
        nodes = self.graph.nodes
        up = np.where(nodes.position == positions[0], self.first.astype(float), 0.0)
        hops = []
        for (s, t), flow in zip(pairs, down[-2::-1], strict=True):
            for part in self.within.get(s, []):
                self._lift(up, part)
            hops.append(self._hop(s, t, self._carried(s, t, flow, up)))
            above = up.copy()
            self._lift(above, self.between[s, t])
            up = np.where(nodes.position == t, above, 0.0)
        return Route(target=target, positions=positions, share=share, hops=tuple(hops))

    def _into(self, target: int) -> tuple[int, np.ndarray]:
        """The position that a target reads, and what flows into the nodes that it reads."""
        edges = self.graph.edges
        direct = np.flatnonzero((edges.block < 0) & (edges.target == target))
        into = np.zeros(len(self.first))
        np.add.at(into, edges.source[direct], self.all_shares[direct])
        return int(self.graph.nodes.position[target]), into

    def _settle(self, position: int, into: np.ndarray) -> np.ndarray:
        """What flows into a position's nodes, carried on to all its nodes below."""
        flow = into.copy()
        for part in reversed(self.within.get(position, [])):
            np.add.at(flow, self.source[part], flow[self.target[part]] * self.share[part])
        return flow

    def _cross(self, s: int, t: int, flow: np.ndarray) -> np.ndarray:
        """The flow at position s that comes from the flow at position t."""
        part, into = self.between[s, t], np.zeros(len(flow))
        np.add.at(into, self.source[part], flow[self.target[part]] * self.share[part])
        return self._settle(s, into)

    def _lift(self, up: np.ndarray, part) -> None:
        """Add to the targets of edges what of their flow reaches boundary 0 through these."""
        np.add.at(up, self.target[part], self.share[part] * up[self.source[part]])

    def _carried(self, s: int, t: int, down: np.ndarray, up: np.ndarray) -> np.ndarray:
        part = self.between[s, t]
        return down[self.target[part]] * self.share[part] * up[self.source[part]]

    def _hop(self, s: int, t: int, carried: np.ndarray) -> Hop:
        """carried: by each edge from s to t."""
        edges = self.at[self.between[s, t]][carried > 0]
        block = self.graph.edges.block[edges]
        loading = np.abs(self.graph.edges.heads[edges].astype(float))
        by_head = np.zeros((int(block.max(initial=-1)) + 1, loading.shape[1]))
        flow = carried[carried > 0] / np.maximum(loading.sum(1), 1e-300)
        np.add.at(by_head, block, flow[:, None] * loading)
        by_head /= max(by_head.sum(), 1e-300)
        order = np.argsort(-by_head, axis=None, kind="stable")
        where = zip(*np.unravel_index(order, by_head.shape), strict=True)
        heads = [(int(b), int(n), float(by_head[b, n])) for b, n in where]
        return Hop(source=s, target=t, heads=tuple(h for h in heads if h[2] > 0))


def _runs(start: int, *keys: np.ndarray) -> list[slice]:
    """Slices of equal keys, one after the other; the first begins at `start`."""
    changes = np.any([np.diff(key) != 0 for key in keys], axis=0)
    cuts = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(keys[0])]]) + start
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(cuts) if b > a]

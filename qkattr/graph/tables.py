"""The graph on the host: nodes and edges as columns of NumPy; `graph.build` makes them.

Every edge carries its split (residual, mlp, one loading a head); every target what its row summed
to, and what of it was kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qkattr.graph.accounts import (
    Account,
    HeadEffects,
    main_weights,
    no_account,
    no_heads,
)
from qkattr.kinds import Kind, Place

#: Edges that are shown.
EDGES_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Columns of the nodes, each `[X]`.

    `total`, `absolute`, `error` and `kept` are of targets (logits, scores, and kept nodes that the
    sweep went on from), and NaN elsewhere.

    boundary, position: where.
    kind: of `Kind`.
    index: feature, token, position id or -1; of a score, the row of `scores`.
    activation: of features, else 0.
    influence: raw, of the targets' 1.
    share: cumulative within the boundary, by falling influence; 0 for targets, 1 for bias and
      const, which get none.
    total: what the row sums to, const included.
    absolute: sum of |edge| over sources that depend on the prompt.
    error: of it, from errors.
    kept: of it, by edges in the table.
    effect: `[X, P]` on each of P targets (`Graph.targets`), in its unit; a target's own value on
      itself.
    """

    boundary: np.ndarray
    position: np.ndarray
    kind: np.ndarray
    index: np.ndarray
    activation: np.ndarray
    influence: np.ndarray
    share: np.ndarray
    total: np.ndarray
    absolute: np.ndarray
    error: np.ndarray
    kept: np.ndarray
    effect: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)


@dataclasses.dataclass(frozen=True)
class Edges:
    """Columns of the edges, each `[X]`.

    source, target: indices of nodes.
    block: which block the edge goes through, -1 for a direct read of the residual stream.
    weight: the edge.
    residual, mlp: its parts by the residual stream and the MLP.
    heads: `[X, N]` its part by each head.
    """

    source: np.ndarray
    target: np.ndarray
    block: np.ndarray
    weight: np.ndarray
    residual: np.ndarray
    mlp: np.ndarray
    heads: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes, edges, and what the graph leaves out.

    nodes, edges: the tables.
    leak: one row a boundary, from the last to the first.
    replacement, completeness: see `docs/method.md`.
    account: what the targets are made of.
    heads: the strongest places of heads, by their effect on the main target.
    """

    nodes: Nodes
    edges: Edges
    leak: list[dict]
    replacement: float
    completeness: float
    account: Account = dataclasses.field(default_factory=no_account)
    heads: HeadEffects = dataclasses.field(default_factory=no_heads)

    @property
    def targets(self) -> np.ndarray:
        """`[P]` the nodes that the sweep started from, in order."""
        return np.flatnonzero(np.isin(self.nodes.kind, (Kind.LOGIT, Kind.SCORE)))

    def effect(self) -> np.ndarray:
        """`[X]` every node's effect on the main target (see `main_weights`); a target's value."""
        effect, targets = self.nodes.effect, self.targets
        main = effect @ main_weights(self.nodes.kind[targets])
        main[targets] = effect[targets].sum(1)
        return main

    def edge_influence(self) -> np.ndarray:
        """`[X]` the influence that flows through each edge: its target's,
        times its share of the target's row.
        """
        target = self.edges.target
        scale = self.nodes.influence[target] / np.maximum(self.nodes.absolute[target], 1e-30)
        depends = ~np.isin(self.nodes.kind[self.edges.source], (Kind.BIAS, Kind.CONST))
        return np.where(depends, scale * np.abs(self.edges.weight), 0.0)

    def head_influence(self) -> np.ndarray:
        """`[X, N]` each edge's influence, as far as each head carries it:
        |loading| instead of |weight|.
        """
        target = self.edges.target
        scale = self.nodes.influence[target] / np.maximum(self.nodes.absolute[target], 1e-30)
        depends = ~np.isin(self.nodes.kind[self.edges.source], (Kind.BIAS, Kind.CONST))
        return np.where(depends, scale, 0.0)[:, None] * np.abs(self.edges.heads)

    def influence_at(self, block: np.ndarray, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """`[X, N]` what flows through every head of a block from one position (the key) to another,
        as a share of the targets' influence."""
        nodes, edges = self.nodes, self.edges
        span = int(nodes.position.max(initial=0)) + 1
        code = lambda b, t, s: (np.asarray(b, np.int64) * span + t) * span + s
        asked, where = np.unique(code(block, query, key), return_inverse=True)
        through = np.flatnonzero(edges.block >= 0)
        ends = nodes.position[edges.target[through]], nodes.position[edges.source[through]]
        flows = code(edges.block[through], *ends)
        found = np.minimum(np.searchsorted(asked, flows), max(len(asked) - 1, 0))
        known = np.flatnonzero(asked[found] == flows) if len(asked) else np.zeros(0, int)
        total = np.zeros((len(asked), edges.heads.shape[1]))
        np.add.at(total, found[known], self.head_influence()[through[known]])
        return total[where]

    def places_that_matter(self, n: int, sinks: Sequence[int]) -> list[Place]:
        """The n places (block, head, query, key) with the largest |masking| between two positions
        of which the key is no sink."""
        heads = self.heads
        asked = (heads.query != heads.key) & ~np.isin(heads.key, sinks)
        at = np.flatnonzero(asked & (heads.masking != 0))[:n]
        columns = (heads.block, heads.head, heads.query, heads.key)
        return list(zip(*(column[at].tolist() for column in columns), strict=True))

    def strongest_edges(self, n: int = EDGES_SHOWN) -> np.ndarray:
        """The n edges with most influence that did more than carry a feature on in place."""
        edges, nodes, influence = self.edges, self.nodes, self.edge_influence()
        crossing = nodes.position[edges.source] != nodes.position[edges.target]
        moved = crossing | (np.abs(edges.residual) < np.abs(edges.weight) / 2)
        moved &= (edges.block >= 0) & (influence > 0)
        order = np.argsort(-np.where(moved, influence, 0.0), kind="stable")[:n]
        return order[moved[order]]

    def feature(self, node: int) -> tuple[int, int] | None:
        """The (boundary, index) of a node that is a feature."""
        if self.nodes.kind[node] != Kind.FEATURE:
            return None
        return int(self.nodes.boundary[node]), int(self.nodes.index[node])

    def features_of_edges(self, edges: np.ndarray) -> set[tuple[int, int]]:
        """The (boundary, index) of the features at either end of some edges."""
        ends = np.concatenate([self.edges.source[edges], self.edges.target[edges]])
        return {feature for node in ends.tolist() if (feature := self.feature(node))}

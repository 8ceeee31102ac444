"""The sweep's graph in plain NumPy loops, one edge at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
from naive import Linear, f64, linearise, run_block

from qkattr.config import BlockConfig
from qkattr.kinds import Kind
from qkattr.types import BlockWeights

_DEPENDS = {Kind.FEATURE, Kind.ERROR, Kind.TOKEN, Kind.POSITION, Kind.SINK}

Node = tuple  # (boundary, position, kind, index), or ("target", number)


@dataclasses.dataclass
class Edge:
    weight: float
    residual: float
    mlp: float
    heads: np.ndarray


@dataclasses.dataclass
class NaiveGraph:
    """influence, share: by kept node. rows: by target, its sums. edges: by (source, target)."""

    influence: dict[Node, float]
    share: dict[Node, float]
    rows: dict[Node, dict[str, float]]
    edges: dict[tuple[Node, Node], Edge]
    leak: list[dict]
    replacement: float
    completeness: float


@dataclasses.dataclass
class Source:
    node: Node
    vector: np.ndarray

    position = property(lambda self: self.node[1])
    kind = property(lambda self: self.node[2])


def list_sources(b: int, vectors: np.ndarray, kind: np.ndarray, index: np.ndarray) -> list[Source]:
    """The components of a boundary that hold something."""
    return [
        Source((b, t, Kind(int(kind[t, c])), int(index[t, c])), f64(vectors[t, c]))
        for t, c in np.ndindex(kind.shape)
        if kind[t, c] != Kind.NONE
    ]


def _block_edge(linear: Linear, g: np.ndarray, t: int, source: Source) -> Edge:
    s, x = source.position, source.vector
    pulled = linear.mlp[t].T @ g
    carried = g if linear.parallel else g + pulled
    residual, mlp = (g @ x, pulled @ x) if s == t else (0.0, 0.0)
    heads = np.array([carried @ m @ x for m in linear.heads[:, t, s]])
    return Edge(residual + mlp + heads.sum(), residual, mlp, heads)


def graph(
    blocks: list[BlockWeights],
    boundaries: np.ndarray,
    sources: list[list[Source]],
    targets: list[dict],
    cfg: BlockConfig,
    *,
    keep: float,
    max_rows: int,
    max_edges: int,
    linearisation: str,
    through_errors: bool,
) -> NaiveGraph:
    """The backward sweep. targets: dicts of boundary, position, covector, constant, influence."""
    n_heads = blocks[0].wq_DNH.shape[1]
    made = NaiveGraph({}, {}, {}, {}, [], 0.0, 0.0)
    tokens = errors = 0.0
    above: list[
        tuple[Source, float, float]
    ] = []  # rows at the boundary above: node, influence, clean influence
    for b in reversed(range(len(boundaries))):
        # Rows that read this boundary: (name, influence, clean, an edge to each source, const, what
        # it must sum to).
        rows = []
        if b < len(blocks):
            seen = run_block(blocks[b], boundaries[b], cfg)
            linear = linearise(blocks[b], seen, cfg, linearisation)
            for node, influence, clean in above:
                edges = [
                    _block_edge(linear, node.vector, node.position, source) for source in sources[b]
                ]
                total = node.vector @ seen.out[node.position]
                const = total - sum(e.weight for e in edges)
                rows.append(
                    (
                        node.node,
                        influence,
                        clean,
                        edges,
                        const,
                        total,
                        (b + 1, node.position, Kind.CONST, -1),
                    )
                )
        for number, target in enumerate(targets):
            if target["boundary"] != b:
                continue
            edges = []
            for source in sources[b]:
                e = (
                    target["covector"] @ source.vector
                    if source.position == target["position"]
                    else 0.0
                )
                edges.append(Edge(e, e, 0.0, np.zeros(n_heads)))
            total = sum(e.weight for e in edges) + target["constant"]
            const_node = (b, target["position"], Kind.CONST, -1)
            start = target["influence"]
            rows.append(
                (("target", number), start, start, edges, target["constant"], total, const_node)
            )

        depends = np.array([source.kind in _DEPENDS for source in sources[b]])
        is_error = np.array([source.kind == Kind.ERROR for source in sources[b]])
        arriving, arriving_clean = np.zeros(len(depends)), np.zeros(len(depends))
        for name, influence, clean, edges, _, total, _ in rows:
            strength = np.abs([e.weight for e in edges]) * depends
            made.rows[name] = dict(
                total=total,
                absolute=strength.sum(),
                error=(strength * is_error).sum(),
                influence=influence,
            )
            if strength.sum() > 0:
                arriving += influence * strength / strength.sum()
                arriving_clean += clean * strength / strength.sum()

        kept, running, everything = [], 0.0, arriving.sum()
        for i in np.argsort(-arriving, kind="stable")[:max_rows]:
            if arriving[i] <= 0 or running >= keep * everything:
                break
            kept.append(i)
            running += arriving[i]
            made.influence[sources[b][i].node] = arriving[i]
            made.share[sources[b][i].node] = running / everything
        made.leak.append(_leak(b, sources[b], arriving, running, len(kept), keep))
        for i, source in enumerate(sources[b]):
            tokens += arriving_clean[i] * (source.kind in (Kind.TOKEN, Kind.POSITION))
            errors += arriving_clean[i] * (source.kind == Kind.ERROR)

        candidates = kept + [i for i, source in enumerate(sources[b]) if source.kind == Kind.BIAS]
        for name, _, _, edges, const, _, const_node in rows:
            strongest = sorted(candidates, key=lambda i: -abs(edges[i].weight))[:max_edges]
            for i in strongest:
                made.edges[sources[b][i].node, name] = edges[i]
            made.rows[name]["kept"] = sum(abs(edges[i].weight) for i in strongest if depends[i])
            made.edges[const_node, name] = Edge(const, 0.0, 0.0, np.zeros(n_heads))

        leaves = {Kind.SINK, Kind.TOKEN, Kind.POSITION} | (
            set() if through_errors else {Kind.ERROR}
        )
        above = [
            (sources[b][i], arriving[i], arriving_clean[i] * (not is_error[i]))
            for i in kept
            if sources[b][i].kind not in leaves
        ]
    made.replacement = tokens / (tokens + errors)
    weights = np.array([row["influence"] for row in made.rows.values()])
    explained = np.array([1 - row["error"] / row["absolute"] for row in made.rows.values()])
    made.completeness = (weights * explained).sum() / weights.sum()
    return made


def _leak(b, sources, arriving, kept, n_kept, keep) -> dict:
    by_kind = {
        k: sum(a for a, s in zip(arriving, sources, strict=True) if s.kind == k) for k in _DEPENDS
    }
    return dict(
        boundary=b,
        surviving=arriving.sum(),
        **{kind.label: share for kind, share in by_kind.items()},
        dropped=arriving.sum() - kept,
        kept_nodes=n_kept,
        overflow=bool(kept < keep * arriving.sum()),
    )

"""Edges against the model: what a target does when its source is taken away, wholly or a little.

A source x_c at boundary b is scaled to (1 - e) times itself, the block is run on, and a target at
boundary b+1 is read before and after:

    predicted = - e * edge          edge = g . push(x_c), for each MLP linearisation
    actual    = g . (block(x - e x_c) - block(x))

with patterns and norm scales held at the clean run (the MLP is not: it is what the linearisations
approximate), or all live. g reads the target by its decoder (a projection) or by its encoder (the
pre-activation of its feature); beside both stands the change of the activation itself, what the SAE
makes of the new residual stream, with its threshold or competition.
Axes: Q sources, R targets, E = 3 sizes of the change, Z = 3 linearisations, T position.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.config import LINEARISATIONS, BlockConfig
from qkattr.experiments.faithfulness.statistics import correlation, rank_correlation, slope
from qkattr.graph.tables import Graph
from qkattr.kinds import Kind
from qkattr.model.edits import BlockEdits, PatternEdits
from qkattr.model.linear import freeze, push
from qkattr.model.transformer import block
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import find_slots
from qkattr.sources.dictionary import Dictionary, activations
from qkattr.subject import Subject
from qkattr.types import BlockWeights

#: What share of the source is taken away.
SHARES = (0.01, 0.1, 1.0)
READS = ("decoder", "encoder")
MODES = ("held", "live")
#: Sources and targets of one block, at most: the most influential.
SOURCES, TARGETS = 16, 48


@struct.dataclass
class Probe:
    """predicted: `[Z, 2, Q, R]` edges by linearisation and read, negated: what they say of a source
    taken away. actual: `[2, E, 2, Q, R]` changes by mode, share and read. activation: `[Q, R]`
    change of the targets' activations, live, the whole source taken away."""

    predicted: Float[Array, "Z 2 Q R"]
    actual: Float[Array, "2 E 2 Q R"]
    activation: Float[Array, "Q R"]


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def probe(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    dictionary: Dictionary,
    source_at: Int[Array, "Q"],
    vectors: Float[Array, "Q D"],
    at: Int[Array, "R"],
    feature: Int[Array, "R"],
    covectors: Float[Array, "2 R D"],
    *,
    cfg: BlockConfig,
    precision: str = "highest",
) -> Probe:
    """Probe one block.

    x: the residual stream that it reads. dictionary: of boundary b+1. source_at, vectors: the
    sources' positions and vectors. at, feature, covectors: the targets' positions, features, and
    covectors by decoder and by encoder.
    """
    rows = jnp.arange(source_at.shape[0])

    def read(change: Float[Array, "Q T D"]) -> Float[Array, "2 Q R"]:
        return jnp.einsum("XRD,QRD->XQR", covectors, change[:, at], precision="highest")

    spread = jnp.zeros((rows.shape[0], *x.shape)).at[rows, source_at].set(vectors)
    predicted = []
    for kind in LINEARISATIONS:
        frozen = freeze(weights, x, cfg=cfg, linearisation=kind, precision=precision)
        predicted.append(read(-jax.lax.map(partial(push, frozen), spread, batch_size=8)))
    clean, seen = block(weights, x, cfg=cfg, precision=precision)
    every = jnp.ones(seen.pattern_NTS.shape[:2], bool)
    held = BlockEdits(frozen=seen, patterns=PatternEdits(seen.pattern_NTS, every))

    def without(edits: BlockEdits, share: float) -> Float[Array, "Q T D"]:
        """The block's output, that share of each source taken away."""

        def run(delta):
            return block(weights, x - share * delta, cfg=cfg, edits=edits, precision=precision)[0]

        return jax.lax.map(run, spread, batch_size=8)

    changed = {
        (mode, share): without(edits, share)
        for mode, edits in zip(MODES, (held, BlockEdits()), strict=True)
        for share in SHARES
    }

    def firing(stream):
        return activations(dictionary, stream[at], precision=precision)[
            jnp.arange(at.shape[0]), feature
        ]

    actual = jnp.stack([read(after - clean) for after in changed.values()])
    return Probe(
        predicted=jnp.stack(predicted),
        actual=actual.reshape(len(MODES), len(SHARES), *actual.shape[1:]),
        activation=jax.lax.map(firing, changed["live", 1.0]) - firing(clean),
    )


def measure_edges(subject: Subject, graph: Graph) -> list[dict[str, Any]]:
    """All blocks of a prompt. The subject's components carry encoder rows (read="encoder")."""
    rows, dictionaries = [], subject.bundle.dictionaries or ()
    for b in range(subject.bundle.config.n_blocks):
        sources, n_sources = _strongest(subject, graph, b, SOURCES)
        targets, n_targets = _strongest(subject, graph, b + 1, TARGETS)
        dictionary = dictionaries[b + 1]
        if not (n_sources and n_targets) or dictionary is None:
            continue
        weights = jax.tree.map(lambda a, b=b: a[b], subject.bundle.params.blocks)
        (source_at, source_slot, _), (at, slot, feature) = sources, targets
        above = jax.tree.map(lambda a, b=b: a[b + 1], subject.components)
        found = probe(
            weights,
            subject.boundaries[b],
            jax.tree.map(jnp.asarray, dictionary),
            source_at,
            subject.components.at(source_at, source_slot, jnp.full_like(source_at, b)),
            at,
            feature,
            jnp.stack([above.at(at, slot), above.covectors(at, slot)]),
            cfg=subject.bundle.config.block,
            precision=subject.precision,
        )
        causal = np.array(source_at[:, None] <= at)
        causal[n_sources:], causal[:, n_targets:] = False, False
        crossing = causal & np.array(source_at[:, None] < at)
        rows.append(dict(block=b, n_edges=int(causal.sum()), **_compare(found, causal, crossing)))
    return rows


def _strongest(subject: Subject, graph: Graph, b: int, n: int) -> tuple[Any, int]:
    """Positions, slots and features of exactly n nodes that are features (tokens, at boundary 0),
    by influence, the last repeated; and how many there are."""
    nodes = graph.nodes
    wanted = np.isin(nodes.kind, (Kind.FEATURE, Kind.TOKEN))
    there = np.flatnonzero(wanted & (nodes.boundary == b))
    there = there[np.argsort(-nodes.influence[there], kind="stable")][:n]
    if not len(there):
        return None, 0
    position, index = nodes.position[there], nodes.index[there]
    slot = find_slots(subject.components, b, position, nodes.kind[there], index)
    columns = np.array([position, slot, index])
    columns = np.pad(columns, ((0, 0), (0, n - len(there))), mode="edge")
    return tuple(jnp.asarray(column) for column in columns), len(there)


def _compare(found: Probe, causal, crossing) -> dict[str, Any]:
    """Agreement of edges with changes, over all pairs of a source and a target after it.

    crossing: those of them between two positions, which only attention can carry.
    """
    found = jax.tree.map(np.asarray, found)
    out: dict[str, Any] = {}
    for z, linearisation in enumerate(LINEARISATIONS):
        for r, read in enumerate(READS):
            edges = found.predicted[z, r]
            agreement = {
                f"{mode} {share:g}": _agreement(
                    share * edges, found.actual[m, e, r], causal, crossing
                )
                for m, mode in enumerate(MODES)
                for e, share in enumerate(SHARES)
            }
            agreement["activation"] = _agreement(edges, found.activation, causal, crossing)
            out[f"{linearisation} {read}"] = agreement
    small, whole = found.actual[1, 0, 0], found.actual[1, -1, 0]
    out["rank of 1 % and 100 %"] = _rank_by_target(small, whole, causal)
    return out


def _agreement(predicted, actual, causal, crossing) -> dict[str, float | None]:
    """correlation and slope over all edges, crossing: correlation over those between two positions,
    None if there are hardly any;
    sign: share of |edge| with the sign right; rank: Spearman's over the sources of each target,
    averaged."""
    p, a = predicted[causal].astype(float), actual[causal].astype(float)
    weight = np.abs(p)
    return dict(
        correlation=correlation(p, a),
        crossing=correlation(*(v[crossing].astype(float) for v in (predicted, actual)))
        if crossing.sum() >= 4
        else None,
        slope=slope(p, a),
        sign=float((weight * (np.sign(p) == np.sign(a))).sum() / max(weight.sum(), 1e-30)),
        rank=_rank_by_target(predicted, actual, causal),
    )


def _rank_by_target(predicted, actual, causal) -> float:
    found = [
        rank_correlation(predicted[here, i], actual[here, i])
        for i, here in enumerate(causal.T)
        if here.sum() >= 4 and np.ptp(actual[here, i]) > 0
    ]
    return float(np.mean(found)) if found else 0.0


def measure_paraphrases(graphs: list[Graph]) -> list[dict[str, float]]:
    """Edges between features that two prompts share, summed over positions (apart for edges within
    a position and between two), for every pair of prompts: how many, and how far they agree."""
    tables = [_by_features(graph) for graph in graphs]
    pairs = [(a, b) for i, a in enumerate(tables) for b in tables[i + 1 :]]
    return [_stability(a, b) for a, b in pairs]


def _by_features(graph: Graph) -> dict[tuple, float]:
    nodes, edges = graph.nodes, graph.edges
    source, target = edges.source, edges.target
    feature = (nodes.kind[source] == Kind.FEATURE) & (nodes.kind[target] == Kind.FEATURE)
    table: dict[tuple, float] = {}
    for i in np.flatnonzero(feature & (edges.block >= 0)):
        s, t = source[i], target[i]
        moved = bool(nodes.position[s] != nodes.position[t])
        key = (int(edges.block[i]), int(nodes.index[s]), int(nodes.index[t]), moved)
        share = edges.weight[i] / max(float(nodes.absolute[t]), 1e-30)
        table[key] = table.get(key, 0.0) + float(share)
    return table


def _stability(a: dict[tuple, float], b: dict[tuple, float]) -> dict[str, float]:
    common = sorted(a.keys() & b.keys())
    if len(common) < 4:
        return dict(common=len(common), shared=0.0, sign=0.0, rank=0.0)
    x, y = (np.array([table[key] for key in common]) for table in (a, b))
    weight = np.abs(x) + np.abs(y)
    return dict(
        common=len(common),
        shared=len(common) / len(a.keys() | b.keys()),
        sign=float((weight * (np.sign(x) == np.sign(y))).sum() / weight.sum()),
        rank=rank_correlation(np.abs(x), np.abs(y)),
    )

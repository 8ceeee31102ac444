"""`trace`: from a prompt to its attribution graph, one stage after the other.

    residual stream -> components -> targets -> sweep -> (scores behind edges, sweep again)
    -> effects -> QK attributions of the places that matter -> cards

Each stage is a pure function on arrays that knows nothing of text; here they are only fed.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qkattr.analyses.qk import qk_tables
from qkattr.analyses.targets import Asked
from qkattr.cards.card import Card
from qkattr.graph.build import with_effects
from qkattr.graph.tables import Graph
from qkattr.kinds import Kind, Place
from qkattr.options import TraceOptions
from qkattr.qk.rows import shown_features
from qkattr.qk.table import QKAttribution
from qkattr.result import Traced, sink_positions
from qkattr.subject import Subject
from qkattr.version import __version__


def trace_subject(subject: Subject, opts: TraceOptions) -> tuple[Traced, Subject]:
    """The graph of a prompt; and the prompt again, with what effects are effects on.

    Raises:
      InputError: an option does not fit the prompt or the model.
    """
    asked = Asked.of(subject, opts)
    subject.begin("sweep")
    predictions = asked.predictions(subject, opts)
    targets = asked.targets(subject, opts, predictions)
    graph = targets.sweep()
    if opts.through_qk:
        subject.progress("sweep through QK")
        targets = targets.with_scores(*_strongest_scores(graph, opts.through_qk))
        graph = targets.sweep()
    subject.progress("effects")
    kind, index, _ = subject.slots
    graph = with_effects(graph, targets.effects(), kind, index)
    aimed = subject.but(given=subject.labels, aim=targets.main)
    sinks = _sinks(kind[:, : len(subject.ids)])
    subject.progress("QK attributions")
    places = graph.places_that_matter(opts.qk, sink_positions(sinks, opts.sinks))
    qk = qk_tables(aimed, places)
    bundle = subject.bundle
    about = {} if bundle.cards is None else dict(cards=bundle.cards.origin())
    traced = Traced(
        tokens=subject.tokens,
        prompt=bundle.text(subject.ids),
        token_ids=subject.ids,
        bos=subject.bos,
        predictions=predictions,
        graph=graph,
        sinks=sinks,
        scores=targets.scores,
        qk={".".join(map(str, place)): table for place, table in qk.items()},
        facts=subject.facts,
        options=opts,
        provenance=_provenance(subject, opts) | about,
        labels=aimed.labels,
        vocabulary=_vocabulary(subject, graph),
        cards=_cards(subject, graph, qk),
    )
    return traced, aimed


def _strongest_scores(graph: Graph, n: int) -> tuple[list[Place], list[float]]:
    """The scores behind the n strongest edges between two positions: each edge's leading head.

    A score's influence is what its head carries of the edge.
    """
    nodes, edges = graph.nodes, graph.edges
    crossing = (edges.block >= 0) & (nodes.position[edges.source] != nodes.position[edges.target])
    influence = np.where(crossing, graph.edge_influence(), 0.0)
    found: dict[Place, float] = {}
    for edge in np.argsort(-influence, kind="stable"):
        if len(found) == n or influence[edge] == 0:
            break
        loading = np.abs(edges.heads[edge])
        head = int(loading.argmax())
        target, source = nodes.position[edges.target[edge]], nodes.position[edges.source[edge]]
        place = (int(edges.block[edge]), head, int(target), int(source))
        carried = influence[edge] * loading[head] / loading.sum()
        found[place] = found.get(place, 0.0) + float(carried)
    return list(found), list(found.values())


def _sinks(kind: np.ndarray) -> list[dict[str, Any]]:
    """Positions that are sinks, with the boundaries at which they are. kind: `[L+1, T, C]`."""
    is_sink = (kind == Kind.SINK).any(-1)
    return [
        dict(position=int(t), boundaries=np.flatnonzero(is_sink[:, t]).tolist())
        for t in np.flatnonzero(is_sink.any(0))
    ]


def _vocabulary(subject: Subject, graph: Graph) -> dict[int, str]:
    logits = graph.nodes.index[graph.nodes.kind == Kind.LOGIT]
    return {int(i): subject.bundle.token(int(i)) for i in logits}


def _cards(
    subject: Subject, graph: Graph, qk: Mapping[Place, QKAttribution]
) -> dict[tuple[int, int], Card]:
    """The cards of the features that pages show: those of strong edges and of QK attributions."""
    cards = subject.bundle.cards
    if cards is None:
        return {}
    shown = graph.features_of_edges(graph.strongest_edges())
    shown |= {feature for table in qk.values() for feature in shown_features(table)}
    known = [feature for feature in shown if feature[1] < cards.width(feature[0])]
    return {feature: cards.card(*feature) for feature in sorted(known)}


def _provenance(subject: Subject, opts: TraceOptions) -> dict[str, Any]:
    bundle, device = subject.bundle, jax.devices()[0]
    made_of = repr((bundle.model_hash, bundle.saes_hash, tuple(subject.ids), opts, __version__))
    return dict(
        run=hashlib.sha256(made_of.encode()).hexdigest()[:16],
        model_hash=bundle.model_hash,
        saes_hash=bundle.saes_hash,
        qkattr=__version__,
        jax=jax.__version__,
        python=platform.python_version(),
        device=f"{device.platform} {device.device_kind}",
    )

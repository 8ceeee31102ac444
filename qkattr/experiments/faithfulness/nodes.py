"""Influence against the model: deletion and insertion curves of the nodes of one boundary.

Deletion takes the n first nodes of an order out of the residual stream; insertion takes all out and
puts the n first back. Nodes are the boundary's features and error slots; its sinks and bias stay.
One boundary at a time: the residual stream carries a node on, so that deleting it at two boundaries
would take it out twice. With p the clean top token's log probability,

    curve(n) = (p(n) - p(none left)) / (p(clean) - p(none left))       1: as clean, 0: all is gone

Choices of error handling: errors are traced on ("through"), or leaves ("leaves"), and are nodes; or
they are traced on and stay in the stream ("kept"). Orders: influence, size of the vector, chance.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qkattr.experiments.runs import MOST, clean_top
from qkattr.graph.tables import Graph
from qkattr.kinds import Kind
from qkattr.model.transformer import run_from, unembed
from qkattr.sources.components import Components, find_slots
from qkattr.subject import Subject

#: How many nodes are deleted or inserted.
COUNTS = (1, 4, 16, 64, 256)
#: Choices of error handling, see above.
CHOICES = ("through", "leaves", "kept")


@jax.jit
def _sums(components: Components, b, masks) -> Float[Array, "B T D"]:
    """The chosen components of a boundary, summed at each position."""
    parts = jax.tree.map(lambda a: a[b], components)
    n = parts.row.shape[1]
    chosen = masks[..., :n] * parts.coefficient
    features = jnp.einsum("BTA,TAD->BTD", chosen, parts.rows[parts.row], precision="highest")
    return features + masks[..., n, None] * parts.bias + masks[..., n + 1, None] * parts.error


@partial(jax.jit, static_argnames=("cfg", "precision"))
def _log_p_from(params, x, delta, b, last, token, *, cfg, precision) -> Float[Array, "B"]:
    """Log probability of a token when the residual stream at boundary b is x + delta."""
    x = run_from(params, x + delta, b, cfg=cfg, precision=precision)
    return jax.nn.log_softmax(unembed(params, x[:, last], cfg=cfg, precision=precision))[:, token]


def measure_nodes(
    subject: Subject,
    graphs: dict[str, Graph],
    boundaries: list[int],
    *,
    draws: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Curves at each boundary, for each choice and order.

    graphs: "through" and "leaves".
    """
    return [row for b in boundaries for row in _curves(subject, graphs, b, draws, rng)]


def _curves(subject: Subject, graphs: dict[str, Graph], b: int, draws: int, rng):
    """All choices' curves at one boundary, from one batch of runs; none where it has no nodes."""
    influence = {name: _influence(subject, graph, b) for name, graph in graphs.items()}
    every = _orders(subject, b, (Kind.FEATURE, Kind.ERROR), draws, rng)
    features = _orders(subject, b, (Kind.FEATURE,), draws, rng)
    orders = dict(
        through=dict(influence=_sorted(every["size"], influence["through"]), **every),
        leaves=dict(influence=_sorted(every["size"], influence["leaves"])),
        kept=dict(influence=_sorted(features["size"], influence["through"]), **features),
    )
    orders = {choice: named for choice, named in orders.items() if len(named["influence"])}
    if not orders:
        return []
    masks = [_mask(subject, every["size"]), _mask(subject, features["size"])]
    for order in (order for named in orders.values() for order in named.values()):
        for n in COUNTS:
            masks += [_mask(subject, order[:n]), _mask(subject, order[n:])]
    top, clean = clean_top(subject)
    empty, empty_kept, *log_p = _log_p(subject, b, np.stack(masks), top).tolist()
    runs = iter(np.reshape(log_p, (-1, len(COUNTS), 2)))
    rows = []
    for choice, named in orders.items():
        none_left = empty_kept if choice == "kept" else empty
        span = clean - none_left if clean != none_left else 1.0
        curves = {name: (next(runs) - none_left) / span for name in named}
        drawn = [curves.pop(name) for name in named if name.startswith("random")]
        if drawn:
            curves["random"] = np.mean(drawn, axis=0)
        rows.append(
            dict(
                boundary=b,
                choice=choice,
                n_nodes=len(named["influence"]),
                left=float(np.exp(none_left)),
                counts=list(COUNTS),
                deletion={name: curve[:, 0].tolist() for name, curve in curves.items()},
                insertion={name: curve[:, 1].tolist() for name, curve in curves.items()},
            )
        )
    return rows


def _log_p(subject: Subject, b: int, masks: np.ndarray, token: int) -> np.ndarray:
    """The token's log probability without the masked components, `MOST` runs at a time."""
    found = []
    for start in range(0, len(masks), MOST):
        part = masks[start : start + MOST]
        padded = np.pad(part, ((0, MOST - len(part)), (0, 0), (0, 0)))
        delta = -_sums(subject.components, b, jnp.asarray(padded))
        log_p = _log_p_from(
            subject.bundle.params, subject.boundaries[b], delta, b, len(subject.ids) - 1, token,
            cfg=subject.bundle.config, precision=subject.precision,
        )  # fmt: skip
        found.append(np.asarray(log_p)[: len(part)])
    return np.concatenate(found)


def _mask(subject: Subject, order: np.ndarray) -> np.ndarray:
    mask = np.zeros((subject.boundaries.shape[1], subject.components.n_slots), np.float32)
    mask.reshape(-1)[order] = 1
    return mask


def _orders(subject: Subject, b: int, kinds, draws: int, rng) -> dict[str, np.ndarray]:
    """Nodes as position * C + slot, by size and by chance."""
    every = np.flatnonzero(np.isin(np.asarray(subject.components.kind[b]), kinds))
    size = node_sizes(subject, b).reshape(-1)[every]
    by_size = every[np.argsort(-size, kind="stable")]
    return dict(size=by_size) | {f"random{i}": rng.permutation(every) for i in range(draws)}


def _sorted(by_size: np.ndarray, influence: np.ndarray) -> np.ndarray:
    """Nodes by falling influence; those that the graph did not keep after, by size."""
    return by_size[np.argsort(-influence[by_size], kind="stable")]


def _influence(subject: Subject, graph: Graph, b: int) -> np.ndarray:
    """`[T * C]` influence of every component, 0 where the graph did not keep it."""
    influence = np.zeros(subject.components.kind[b].size)
    nodes, kept = graph.nodes, _kept(graph, b)
    at = nodes.position[kept]
    slot = find_slots(subject.components, b, at, nodes.kind[kept], nodes.index[kept])
    influence[at * subject.components.n_slots + slot] = nodes.influence[kept]
    return influence


def node_sizes(subject: Subject, b: int) -> np.ndarray:
    """`[T, C]` norm of every component's vector at a boundary."""
    parts = jax.tree.map(lambda a: np.asarray(a[b]), subject.components)
    features = np.abs(parts.coefficient) * np.linalg.norm(parts.rows, axis=-1)[parts.row]
    rest = [np.linalg.norm(part, axis=-1)[:, None] for part in (parts.bias, parts.error)]
    return np.concatenate([features, *rest], axis=1)


def _kept(graph: Graph, b: int) -> np.ndarray:
    """The graph's features and errors at a boundary."""
    nodes = graph.nodes
    wanted = np.isin(nodes.kind, (Kind.FEATURE, Kind.ERROR))
    return np.flatnonzero(wanted & (nodes.boundary == b))

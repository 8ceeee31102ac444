"""What says that a head, or one place of a head, matters: the measures that are compared.

Of a head, first-order changes of the target, positive where the ablation lowers it:

    effect          g . z              of the head's output z against zero (graph.effects, summed)
    less mean       g . (z - mean z)   against its mean, see `ablations`
    masking         g . (z - z')       against its output with the strongest key masked

each by a derivative g of the target with respect to the head's output: with patterns, norm scales
and MLPs frozen ("jacobian", "frozen-gate", "half": the linearisations of the MLP); of the model
itself with its patterns held ("held"), and with all that it computes moving ("live", attribution
patching). Then |effect| (the sum of its sizes over all places), influence (unsigned, of the graph),
loading (signed, summed over the graph's edges) with its size, and attention to keys other than the
query itself and sinks, at all queries and at the last.

Of a place (query t, key s) of a head with pattern A, by each g as well:

    effect          E[t, s] = A[t, s] g[t] . v[s]
    derivative      E[t, s] - A[t, s] sum_s' E[t, s']       with respect to the (capped) score
    masking         derivative / (1 - A[t, s])              of the key masked, exact in the softmax

and influence, loading and attention there. Axes: L blocks, N heads, T/S positions, H head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qkattr.config import LINEARISATIONS
from qkattr.experiments.ablations import (
    CleanHeads,
    later_positions,
    sink_positions,
)
from qkattr.graph.effects import Effects, target_effects
from qkattr.graph.tables import Graph
from qkattr.graph.targets import logit_covectors
from qkattr.model.edits import BlockEdits, Edits, PatternEdits
from qkattr.model.linear import freeze, pull
from qkattr.model.transformer import residual_stream, unembed
from qkattr.sharding import on_any_mesh
from qkattr.subject import Subject

#: First-order measures of a head, in the order of `ablations.ABLATIONS`; and of a place.
FIRST_ORDER = ("effect", "less mean", "masking")
AT_PLACES = ("effect", "derivative", "masking")
#: Derivatives: of the frozen model, and of the model itself, its patterns held or moving.
BY = (*LINEARISATIONS, "held", "live")
#: What has no sign.
UNSIGNED = ("|effect|", "influence", "|loading|", "attention", "attention last")

Named = dict[str, np.ndarray]


def logit_effects(
    subject: Subject, token: int, linearisation: str = "jacobian", *, heads: bool = False
) -> Effects:
    """The effects on one token's logit, less the mean logit; R = 1. heads: of the heads too."""
    n_blocks, last = subject.bundle.config.n_blocks, len(subject.ids) - 1
    covector, constant = logit_covectors(
        subject.bundle.params,
        subject.boundaries[-1, last],
        jnp.array([token]),
        jnp.array([-1]),
        cfg=subject.bundle.config,
    )
    return target_effects(
        subject.bundle.params.blocks,
        subject.boundaries,
        subject.components,
        jnp.array([n_blocks]),
        jnp.array([last]),
        covector,
        constant,
        cfg=subject.bundle.config.block,
        linearisation=linearisation,
        precision=subject.precision,
        heads=heads,
    )


def derivatives(
    subject: Subject, heads: CleanHeads, token: int, by: Sequence[str] = BY
) -> dict[str, Float[Array, "L T N H"]]:
    """The target's derivatives with respect to all heads' outputs, by their names in `BY`."""
    params, config = subject.bundle.params, subject.bundle.config
    tokens, last = jnp.asarray(subject.padded), len(subject.ids) - 1

    def derivative(name: str) -> Float[Array, "L T N H"]:
        if name in LINEARISATIONS:
            return _frozen_derivative(
                params.blocks,
                subject.boundaries,
                logit_effects(subject, token, name).covector[:, 0],
                cfg=config.block,
                linearisation=name,
                precision=subject.precision,
            )
        patterns = heads.patterns if name == "held" else None
        nothing = jnp.zeros_like(heads.outputs)
        how = dict(cfg=config, precision=subject.precision)
        return _model_derivative(params, tokens, last, token, nothing, patterns, **how)

    return {name: derivative(name) for name in by}


@partial(jax.jit, static_argnames=("cfg", "linearisation", "precision"))
@on_any_mesh
def _frozen_derivative(
    blocks, boundaries, covector: Float[Array, "L+1 T D"], *, cfg, linearisation, precision
) -> Float[Array, "L T N H"]:
    """The covector on every head's output, from that on every boundary."""

    def one(inputs):
        weights, x, g = inputs
        frozen = freeze(weights, x, cfg=cfg, linearisation=linearisation, precision=precision)
        return pull(frozen, g, jnp.arange(x.shape[0])).heads

    return jax.lax.map(one, (blocks, boundaries[:-1], covector[1:]))


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def _model_derivative(params, tokens, last, token, nothing, patterns, *, cfg, precision):
    """`[L, T, N, H]` by autodiff. nothing: zeros. patterns: held at these; None: they move."""
    uncapped = dataclasses.replace(cfg, final_softcap=None)
    held = None
    if patterns is not None:
        held = PatternEdits(patterns, jnp.ones(patterns.shape[:3], bool))

    def target(added):
        edits = Edits(blocks=BlockEdits(head_add_TNH=added, patterns=held))
        x, _ = residual_stream(
            params, tokens, cfg=cfg, edits=edits, capture=(), precision=precision
        )
        logits = unembed(params, x[last], cfg=uncapped, precision=precision)
        return logits[token] - logits.mean()

    return jax.grad(target)(nothing)


@jax.jit
@on_any_mesh
def _place_effects(patterns, values, g) -> Float[Array, "L N T S"]:
    L, T, N, H = g.shape
    grouped = g.reshape(L, T, values.shape[2], -1, H)
    reads = jnp.einsum("LTKGH,LSKH->LKGTS", grouped, values, precision="highest")
    return patterns * reads.reshape(patterns.shape)


def first_order_at_places(heads: CleanHeads, g: Float[Array, "L T N H"], n: int) -> Named:
    """`AT_PLACES` by one derivative, `[L, N, n, n]`; 0 at a query that sees one key: it has no
    places. n: the prompt's positions."""
    patterns = np.asarray(heads.patterns, np.float64)[..., :n, :n]
    others = patterns @ (1 - np.eye(n))  # 1 - A, without losing what is small
    alone = (patterns > 0).sum(-1, keepdims=True) < 2
    effect = np.asarray(_place_effects(heads.patterns, heads.values, g), np.float64)[..., :n, :n]
    derivative = effect - patterns * effect.sum(-1, keepdims=True)
    masking = np.where(others > 0, derivative / np.maximum(others, 1e-38), 0.0)
    of_place = zip(AT_PLACES, (effect, derivative, masking), strict=True)
    return {name: np.where(alone, 0.0, value) for name, value in of_place}


def place_measures(subject: Subject, heads: CleanHeads, g: dict[str, Array], graph: Graph) -> Named:
    """Every measure of every place, as by `first_order_at_places`: by "effect jacobian", "masking
    live", "influence".

    g: `derivatives`.
    """
    n, out = len(subject.ids), {}
    for by, one in g.items():
        found = first_order_at_places(heads, one, n)
        out |= {f"{name} {by}": value for name, value in found.items()}
    influence, loading = of_graph(graph, (*heads.patterns.shape[:2], n, n))
    looking = _looking(subject, heads)[..., :n, :n]
    alone = (np.asarray(heads.patterns)[..., :n, :n] > 0).sum(-1, keepdims=True) < 2
    of_places = dict(influence=influence, loading=loading, attention=looking)
    return out | {name: np.where(alone, 0.0, value) for name, value in of_places.items()}


def head_measures(subject: Subject, heads: CleanHeads, g: dict[str, Array], graph: Graph) -> Named:
    """Every measure of every head, `[L, N]`, by "effect jacobian", "less mean live", "influence".

    g: `derivatives`.
    """
    out: Named = {}
    change = heads.outputs - heads.ablated
    for name, one in g.items():
        moved = jnp.einsum("LTNH,XLTNH->XLN", one, change, precision="highest")
        out |= {f"{measure} {name}": m for measure, m in zip(FIRST_ORDER, moved, strict=True)}
        effect = np.asarray(_place_effects(heads.patterns, heads.values, one), np.float64)
        out[f"effect {name}"] = effect.sum((-2, -1))
        if name == LINEARISATIONS[0]:
            out["|effect|"] = np.abs(effect).sum((-2, -1))
    influence, loading = of_graph(graph, heads.patterns.shape)
    looks = _looking(subject, heads)
    out |= {
        "influence": influence.sum((-2, -1)),
        "loading": loading.sum((-2, -1)),
        "|loading|": np.abs(loading).sum((-2, -1)),
        "attention": looks.sum((-2, -1)),
        "attention last": looks[:, :, len(subject.ids) - 1].sum(-1),
    }
    return {name: np.asarray(value, np.float64) for name, value in out.items()}


def of_graph(graph: Graph, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Influence and signed loadings of the graph's edges by place: two arrays `[L, N, T, S]`."""
    nodes, edges = graph.nodes, graph.edges
    through = np.flatnonzero(edges.block >= 0)
    query, key = nodes.position[edges.target[through]], nodes.position[edges.source[through]]
    at: Any = (edges.block[through], slice(None), query, key)
    influence, loading = np.zeros((2, *shape))
    np.add.at(influence, at, graph.head_influence()[through])
    np.add.at(loading, at, edges.heads[through])
    return influence, loading


def _looking(subject: Subject, heads: CleanHeads) -> np.ndarray:
    """`[L, N, T, S]` attention, that to sinks and to the query itself left out, as are positions
    that are padding or before the second."""
    own = np.eye(subject.boundaries.shape[1], dtype=bool)
    out = sink_positions(subject) | own | ~later_positions(subject)[:, None]
    return np.where(out, 0.0, np.asarray(heads.patterns, np.float64))

"""Effects against the model: what do they say of heads and places, and what do other measures?

All heads are ablated one by one, in three ways, with the other heads' patterns frozen and live, and
so are the places (block, head, query, key) that one of the measures ranks high. What the target
loses is kept beside every measure; `agreement` compares them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qkattr.experiments.ablations import (
    ABLATIONS,
    Ablations,
    clean_heads,
    later_positions,
    sink_positions,
)
from qkattr.experiments.rankings import (
    Named,
    derivatives,
    head_measures,
    place_measures,
)
from qkattr.experiments.runs import clean_top
from qkattr.graph.tables import Graph
from qkattr.subject import Subject

#: Places that are masked, of one prompt.
PLACES = 40
#: Who names them, in turn.
NAMING = (
    "effect jacobian", "derivative jacobian", "masking jacobian", "masking live",
    "influence", "loading", "attention",
)  # fmt: skip


def measure_effects(subject: Subject, graph: Graph) -> dict[str, Any]:
    """All measures of all heads and of the chosen places, and what the target loses without them;
    empty for a prompt of one token, which has nothing to look at."""
    if len(subject.ids) < 2:
        return {}
    token, _ = clean_top(subject)
    heads = clean_heads(subject)
    g = derivatives(subject, heads, token)
    ablations = Ablations(subject, heads, token)
    of_places = place_measures(subject, heads, g, graph)
    places = choose_places({name: of_places[name] for name in NAMING})
    at = tuple(places.T)
    lost = ablations.of_heads()
    patterns = np.asarray(heads.patterns)
    return dict(
        heads=dict(
            shape=list(subject.bundle.config.head_grid),
            measures=_rounded(head_measures(subject, heads, g, graph)),
            lost={
                ablation: _rounded({name: change[i] for name, change in lost.items()})
                for i, ablation in enumerate(ABLATIONS)
            },
            sinks=_list(_on_sinks(subject, patterns)),
        ),
        places=dict(
            places=places.tolist(),
            measures=_rounded({name: value[at] for name, value in of_places.items()}),
            lost=_rounded(ablations.of_places(places)),
            attention=_list(patterns[at]),
        ),
    )


def choose_places(measures: Named, n: int = PLACES) -> np.ndarray:
    """`[n, 4]` the places (block, head, query, key) that come first by |measure|, one of each in
    turn."""
    shape = next(iter(measures.values())).shape
    orders = [np.argsort(-np.abs(m), axis=None, kind="stable")[:n] for m in measures.values()]
    chosen = list(dict.fromkeys(np.stack(orders, 1).ravel().tolist()))[:n]
    return np.stack(np.unravel_index(chosen, shape), 1)


def _on_sinks(subject: Subject, patterns: np.ndarray) -> np.ndarray:
    """`[L, N]` the mean attention to sinks over positions >= 1."""
    return patterns[:, :, later_positions(subject)][..., sink_positions(subject)].sum(-1).mean(-1)


def _rounded(named: Named) -> dict[str, list[float]]:
    return {name: _list(value) for name, value in named.items()}


def _list(values: np.ndarray) -> list[float]:
    """Six figures: what is kept of each number."""
    return [float(f"{value:.6g}") for value in np.ravel(values)]

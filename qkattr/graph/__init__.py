"""Edges between components of adjacent boundaries, the backward sweep, and its tables."""

from typing import TYPE_CHECKING

from qkattr.lazy import offer

if TYPE_CHECKING:
    from qkattr.graph.backward import DirectTargets, Sweep, sweep
    from qkattr.graph.build import build_graph
    from qkattr.graph.edges import Candidates, EdgeParts, edge_totals, kept_parts, source_values
    from qkattr.graph.effects import (
        Effects,
        PlaceEffects,
        effects_at,
        masking_at,
        node_effects,
        target_effects,
    )
    from qkattr.graph.live import logit_gradient, masking, score_gradient
    from qkattr.graph.paths import Route, strongest_routes
    from qkattr.graph.tables import Graph
    from qkattr.graph.targets import direct_targets, logit_covectors, score_covectors

offer(
    globals(),
    backward="DirectTargets Sweep sweep",
    build="build_graph",
    edges="Candidates EdgeParts edge_totals kept_parts source_values",
    effects="Effects PlaceEffects effects_at masking_at node_effects target_effects",
    live="logit_gradient masking score_gradient",
    paths="Route strongest_routes",
    tables="Graph",
    targets="direct_targets logit_covectors score_covectors",
)

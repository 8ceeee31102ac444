"""Edits in batches against one at a time, at asked rows, and on meshes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from editing import (
    MODEL,
    SAME,
    Read,
    full,
    moved,
    random_outputs,
    random_patterns,
    run,
    vector,
    within_largest,
)
from jax.sharding import AxisType
from tiny import within

from qkattr.model.edits import (
    Edits,
    batched_axes,
)
from qkattr.model.transformer import forward, residual_stream
from qkattr.sharding import make_mesh, shard

BATCHED = {
    "reads": {"scale_E", "heads_EN", "vector_ED"},
    "all": {
        "position_E", "scale_E", "heads_EN", "vector_ED", "pattern_NTS", "rows_NT",
        "head_scale_TN", "head_add_TNH", "boundary_E", "delta_ED",
    },
}  # fmt: skip


def some_edits(case, seed: int, *, live: bool = False) -> Edits:
    """A little of everything."""
    rng = np.random.default_rng(seed)
    places = rng.integers(0, [tiny.L, tiny.T, tiny.N], size=(8, 3))
    made = [
        Read(b, t, vector(case, b, seed + i), scale, (n, 1))
        for i, ((b, t, n), scale) in enumerate(zip(places, rng.uniform(-1, 2, 8), strict=True))
    ]
    return full(
        case, query=made[:4], key=made[4:], patterns=random_patterns(case, rng, 0.1),
        head_scale=np.asarray(rng.uniform(size=(tiny.L, len(case.tokens), tiny.N)), np.float32),
        head_add=random_outputs(case, rng),
        residual=[(b, t, vector(case, b, seed + t)) for b, t, _ in places[:2]], live=live,
    )  # fmt: skip


@pytest.mark.parametrize("name,which", [("everything", "reads"), ("olmo2", "all")])
def test_a_batch_equals_one_at_a_time(name, which):
    case, live = tiny.case(name), which == "reads"
    base = some_edits(case, 0, live=live)
    field = lambda path: path[-1].name

    def take(path, leaf, other):
        return other if field(path) in BATCHED[which] else leaf

    one_by_one = [
        jax.tree_util.tree_map_with_path(take, base, some_edits(case, seed, live=live))
        for seed in range(3)
    ]
    batched = jax.tree_util.tree_map_with_path(
        lambda path, *leaves: np.stack(leaves) if field(path) in BATCHED[which] else leaves[0],
        *one_by_one,
    )
    axes = batched_axes(batched)
    for path, _ in jax.tree_util.tree_leaves_with_path(batched):
        axis = axes
        for step in path:
            axis = getattr(axis, step.name)
        assert axis == (0 if field(path) in BATCHED[which] else None)
    go = lambda edits: forward(case.params, case.tokens, cfg=case.cfg, edits=edits)
    logits, trace = jax.device_get(jax.vmap(go, in_axes=(axes,))(batched))
    for i, edits in enumerate(one_by_one):
        expected, expected_trace = run(case, edits)
        within_largest("logits", logits[i], expected)
        for leaf, other in zip(*map(jax.tree.leaves, (trace, expected_trace)), strict=True):
            within_largest("trace", leaf[i], other)
    assert moved(logits[0], logits[1]) and moved(logits[1], logits[2])


def test_rows_that_are_asked_for():
    """The rows of the full capture, in the order asked for."""
    case, queries = tiny.case("everything"), np.array([7, 0, 3, 3])
    edits = some_edits(case, 0)
    _, trace = run(case, edits)
    go = jax.jit(residual_stream, static_argnames="cfg")
    x, some = go(case.params, case.tokens, cfg=case.cfg, edits=edits, queries=queries)
    within_largest("residual stream", x, trace.boundaries[-1])
    within_largest("boundaries", some.boundaries, trace.boundaries)
    within_largest("scores", some.scores, trace.scores[:, :, queries])
    within("patterns", some.patterns, trace.patterns[:, :, queries], SAME)


MESHES = {
    "auto": lambda: make_mesh(2, 2, devices=jax.devices()[:4]),
    "explicit": lambda: jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    ),
}


@pytest.mark.parametrize("mesh,placed", [("auto", True), ("explicit", False), ("explicit", True)])
def test_sharded_equals_unsharded(mesh, placed):
    """placed: the edits lie on the mesh too, their heads sharded."""
    case, made = tiny.case("everything"), MESHES[mesh]()
    edits = some_edits(case, 0)
    expected, expected_trace = run(case, edits)
    with jax.set_mesh(made):
        params = shard(case.params, made)
        edits = shard(edits, made) if placed else edits
        logits, trace = forward(params, case.tokens, cfg=case.cfg, edits=edits)
    within_largest("logits", logits, expected, MODEL)
    for got, other in zip(jax.tree.leaves(trace), jax.tree.leaves(expected_trace), strict=True):
        within_largest("trace", got, other, MODEL)

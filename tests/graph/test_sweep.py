"""The backward sweep and its tables, against a sweep in NumPy; where it starts;
what it compiles.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny
from naive_graph import graph, list_sources
from tiny import within
from tracing import traced_at_most

from qkattr.config import LINEARISATIONS, SweepConfig
from qkattr.graph.backward import sweep
from qkattr.graph.build import build_graph
from qkattr.graph.targets import direct_targets, logit_covectors, score_covectors
from qkattr.kinds import Kind
from qkattr.model.transformer import forward

EDGE = 5e-5  # of the largest |edge| into the same target: a float32 pull through one block
INFLUENCE = 2e-4  # of the boundary's: normalised edges compound over the three blocks
VALUE = 2e-5  # of a target's value: one float32 dot product with the frozen scale
LEAKED = 1e-3  # as INFLUENCE, for sums over nodes, ratios of which are shown
BATCHED = 2e-5  # the same program with other matmul shapes
ALL = 1 + 1e-6  # `keep` just above 1: at 1, rounding of the running sum may drop the last nodes
EVERYTHING = SweepConfig(
    max_rows=160, max_edges=200, keep=ALL
)  # more than T * C sources, and the biases
LOGITS = 3


def targets_of(case, n_scores=2, padded_to=8):
    """The top logits of the last position, and scores read on both sides, as direct targets."""
    position = len(case.tokens) - 1
    logits = np.asarray(case.logits[position])
    top = np.argsort(-logits)[:LOGITS]
    g, constant = logit_covectors(
        case.params, case.trace.boundaries[-1][position], top, np.full(LOGITS, -1), cfg=case.cfg
    )
    places = np.array([(1, 0, position, 3), (2, tiny.N - 1, 5, 4)])[:n_scores]
    probability = np.exp(logits[top]) / np.exp(logits).sum()
    columns = [np.full(LOGITS, tiny.L), np.full(LOGITS, position), g, constant, probability]
    kinds, indices = [int(Kind.LOGIT)] * LOGITS, list(top)
    if n_scores:
        on, const = score_covectors(
            case.params.blocks, case.trace.boundaries, places, cfg=case.cfg.block
        )
        d = on.shape[-1]
        score_columns = [
            np.repeat(places[:, 0], 2), places[:, 2:].ravel(), on.reshape(-1, d), const.ravel(),
            np.full(2 * n_scores, 0.1),
        ]  # fmt: skip
        columns = [np.concatenate(pair) for pair in zip(columns, score_columns, strict=True)]
        kinds += [int(Kind.SCORE)] * 2 * n_scores
        indices += list(range(2 * n_scores))
    columns = [np.asarray(c, np.float32 if i > 1 else np.int32) for i, c in enumerate(columns)]
    return direct_targets(*columns, padded_to=padded_to), np.array(kinds), np.array(indices)


def swept(case, targets, config):
    return sweep(
        case.params.blocks,
        case.trace.boundaries,
        case.components,
        targets,
        cfg=case.cfg.block,
        config=config,
    )


def naive_graph(case, targets, config):
    """The same from NumPy, on the library's boundaries and components."""
    parts = case.components
    vectors = jax.vmap(lambda one: one.vectors())(parts)
    sources = [
        list_sources(b, vectors[b], np.asarray(parts.kind[b]), np.asarray(parts.index[b]))
        for b in range(tiny.L + 1)
    ]
    real = np.asarray(targets.boundary) >= 0
    rows = [
        dict(
            boundary=int(b),
            position=int(t),
            covector=naive.f64(g),
            constant=float(c),
            influence=float(i),
        )
        for b, t, g, c, i in zip(
            *(np.asarray(a)[real] for a in jax.tree.leaves(jax.device_get(targets))), strict=True
        )
    ]
    options = dataclasses.asdict(config)
    del options["precision"]
    blocks = [tiny.block_weights(case.params, b) for b in range(tiny.L)]
    return graph(blocks, naive.f64(case.trace.boundaries), sources, rows, case.cfg.block, **options)


def names(graph):
    """Each node of a table, named as NumPy's graph names it."""
    nodes = graph.nodes
    targets = iter(range(10**6))
    return [
        ("target", next(targets))
        if kind in (Kind.LOGIT, Kind.SCORE)
        else (int(b), int(t), Kind(int(kind)), int(i))
        for b, t, kind, i in zip(
            nodes.boundary, nodes.position, nodes.kind, nodes.index, strict=True
        )
    ]


def check(graph, expected):
    """All nodes, all edges with their parts, all sums and the scores."""
    name, nodes, edges = names(graph), graph.nodes, graph.edges
    assert len(set(name)) == len(name), "a node is listed twice"
    kept = {n: i for i, n in enumerate(name) if n in expected.influence}
    smallest = 1e-5 * max(
        expected.influence.values()
    )  # below this float32 may or may not see a node
    missing = {n: v for n, v in expected.influence.items() if n not in kept and v > smallest}
    assert not missing
    extra = [
        n
        for n in name
        if n[0] != "target" and n[2] not in (Kind.BIAS, Kind.CONST) and n not in kept
    ]
    assert not extra
    arriving = {row["boundary"]: row["surviving"] for row in expected.leak}
    for n, i in kept.items():
        within("influence", nodes.influence[i], expected.influence[n], INFLUENCE, arriving[n[0]])
        within("share", nodes.share[i], expected.share[n], LEAKED)
    within("rows", *_rows(name, nodes, expected), EDGE)
    got = {
        (name[s], name[t]): i
        for i, (s, t) in enumerate(zip(edges.source, edges.target, strict=True))
    }
    assert len(got) == len(edges), "an edge is listed twice"
    size = {t: row["absolute"] + 1e-6 for t, row in expected.rows.items()}
    small = [abs(e.weight) <= EDGE * size[t] for (_, t), e in expected.edges.items()]
    lost = [
        pair
        for pair, zero in zip(expected.edges, small, strict=True)
        if pair not in got and not zero
    ]
    assert not lost
    assert set(got) <= set(expected.edges)
    for pair, i in got.items():
        edge, scale = expected.edges[pair], size[pair[1]]
        within("edge", edges.weight[i], edge.weight, EDGE, scale)
        within("residual", edges.residual[i], edge.residual, EDGE, scale)
        within("mlp", edges.mlp[i], edge.mlp, EDGE, scale)
        within("heads", edges.heads[i], edge.heads, EDGE, scale)
    for row, wanted in zip(graph.leak, expected.leak, strict=True):
        assert row.keys() == wanted.keys()
        assert (row["boundary"], row["overflow"]) == (wanted["boundary"], wanted["overflow"])
        assert abs(row["kept_nodes"] - wanted["kept_nodes"]) <= len(expected.influence) - len(kept)
        for column in row.keys() - {"boundary", "overflow", "kept_nodes"}:
            within(
                f"leak, {column}", row[column], wanted[column], LEAKED, arriving[row["boundary"]]
            )
    within("replacement", graph.replacement, expected.replacement, LEAKED)
    within("completeness", graph.completeness, expected.completeness, LEAKED)


def _rows(name, nodes, expected):
    """Row sums as the table and as NumPy have them, in units of the row's absolute sum."""
    got, wanted = [], []
    for i, n in enumerate(name):
        if n not in expected.rows:
            assert np.isnan(nodes.total[i])
            continue
        row = expected.rows[n]
        size = max(row["absolute"], abs(row["total"]))
        for column in ("total", "absolute", "error", "kept"):
            got.append(getattr(nodes, column)[i] / size)
            wanted.append(row[column] / size)
    return np.array(got), np.array(wanted)


def run_and_check(case, config):
    targets, kinds, indices = targets_of(case)
    check(
        build_graph(swept(case, targets, config), targets, kinds, indices),
        naive_graph(case, targets, config),
    )


def test_whole_graph_equals_numpy(case):
    run_and_check(case, EVERYTHING)


@pytest.mark.parametrize("linearisation", LINEARISATIONS[1:])
@pytest.mark.parametrize("name", ["everything", "mqa_ungated_relu"])
def test_whole_graph_with_other_linearisations(name, linearisation):
    run_and_check(tiny.case(name), dataclasses.replace(EVERYTHING, linearisation=linearisation))


@pytest.mark.parametrize("name", ["llama", "gpt2", "everything"])
@pytest.mark.parametrize("through_errors", [True, False])
@pytest.mark.parametrize(
    "bounds", [dict(keep=0.8), dict(keep=0.95, max_rows=6, max_edges=4)], ids=str
)
def test_bounded_graph_equals_numpy(name, bounds, through_errors):
    config = dataclasses.replace(EVERYTHING, through_errors=through_errors, **bounds)
    run_and_check(tiny.case(name), config)


def test_padding_the_prompt_changes_nothing():
    one = tiny.case("everything")
    padded = np.pad(one.tokens, (0, 3))
    longer = tiny.case_of(one.params, one.cfg, padded, tiny.dictionaries(), n_real=tiny.T)
    targets, kinds, indices = targets_of(one)
    short = build_graph(swept(one, targets, EVERYTHING), targets, kinds, indices)
    wide = dataclasses.replace(EVERYTHING, max_rows=200)
    long = build_graph(swept(longer, targets, wide), targets, kinds, indices)
    assert set(names(short)) == set(names(long))
    within("replacement when padded", long.replacement, short.replacement, BATCHED)
    within("completeness when padded", long.completeness, short.completeness, BATCHED)


# Where it starts ----------------------------------------------------------------------------------


def test_logit_covectors_read_logit_less_mean(case):
    logits, last = np.asarray(case.logits, np.float64), case.trace.boundaries[-1]
    chosen = np.arange(6, dtype=np.int32)
    for position in (1, tiny.T - 1):
        row = logits[position]
        largest = np.abs(row).max()
        covectors = partial(logit_covectors, case.params, last[position], chosen, cfg=case.cfg)
        g, constant = covectors(np.full(6, -1, np.int32))
        within(
            "logit - mean logit",
            g @ last[position] + constant,
            row[:6] - row.mean(),
            VALUE,
            largest,
        )
        g, constant = covectors(np.full(6, 9, np.int32))
        within("logit - logit", g @ last[position] + constant, row[:6] - row[9], VALUE, largest)


def test_score_covectors_read_the_score_on_either_side(case):
    places = np.array(
        [
            (b, n, t, s)
            for b in range(tiny.L)
            for n in range(tiny.N)
            for t, s in ((4, 0), (8, 8), (7, 6))
        ]
    )
    g, constant = score_covectors(
        case.params.blocks, case.trace.boundaries, places, cfg=case.cfg.block
    )
    for (b, n, t, s), (on_q, on_k), (const_q, const_k) in zip(
        places, g, np.asarray(constant), strict=True
    ):
        seen = np.asarray(case.trace.scores[b, n])
        x = case.trace.boundaries[b]
        largest = np.abs(np.tril(seen)).max()
        within("score on the query side", on_q @ x[t] + const_q, seen[t, s], VALUE, largest)
        within("score on the key side", on_k @ x[s] + const_k, seen[t, s], VALUE, largest)


def test_edges_of_a_logit_with_its_constant_sum_to_it(case):
    targets, _, _ = targets_of(case)
    out = swept(case, targets, EVERYTHING)
    row = np.asarray(case.logits[-1], np.float64)
    top = np.argsort(-row)[:LOGITS]
    within(
        "row of a logit",
        out.direct.total[-1, :LOGITS],
        row[top] - row.mean(),
        VALUE,
        np.abs(row).max(),
    )


# What it compiles, and where it runs --------------------------------------------------------------


def test_one_program_for_a_bucket(monkeypatch):
    """Another prompt, of another length in the same bucket, compiles nothing."""
    monkeypatch.setitem(globals(), "sweep", traced_at_most(1, sweep, "cfg", "config"))
    once = traced_at_most(1, forward, "cfg", "capture", "precision")
    monkeypatch.setattr("tiny.forward", once)
    params, cfg = tiny.house("qwen3")
    config = SweepConfig(max_rows=16, max_edges=8)
    saes = (None, *[tiny.dictionary(b, activation="topk") for b in range(1, tiny.L + 1)])
    for n_real, seed in ((9, 0), (11, 1), (12, 2)):
        ids = np.pad(tiny.tokens(n_real, seed), (0, 12 - n_real))
        one = tiny.case_of(params, cfg, ids, saes, n_real=n_real)
        swept(one, targets_of(one, n_scores=0)[0], config)


def test_nothing_goes_to_the_host_inside():
    one = tiny.case("llama")
    targets, _, _ = targets_of(one)
    inputs = jax.device_put((one.params.blocks, one.trace.boundaries, one.components, targets))
    run = partial(sweep, cfg=one.cfg.block, config=EVERYTHING)
    jax.block_until_ready(run(*inputs))  # compiles
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(run(*inputs))


def test_vmap_over_prompts_equals_one_at_a_time():
    params, cfg = tiny.house("gemma2")
    cases = [
        tiny.case_of(params, cfg, tiny.tokens(seed=seed), tiny.dictionaries()) for seed in (0, 1)
    ]
    config = SweepConfig(max_rows=24, max_edges=8)
    targets = [targets_of(one)[0] for one in cases]
    rows = max(
        one.components.rows.shape[1] for one in cases
    )  # directions in use: a bucket, here the same
    assert all(one.components.rows.shape[1] == rows for one in cases)
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *((one.trace.boundaries, one.components, t) for one, t in zip(cases, targets, strict=True)),
    )
    together = jax.vmap(
        lambda x, parts, t: sweep(params.blocks, x, parts, t, cfg=cfg.block, config=config)
    )(*stacked)
    for i, (one, t) in enumerate(zip(cases, targets, strict=True)):
        alone = swept(one, t, config)
        batched = jax.tree.map(lambda a, i=i: a[i], together)
        np.testing.assert_array_equal(batched.kept.valid, alone.kept.valid)
        same = np.asarray(alone.kept.valid)
        np.testing.assert_array_equal(batched.kept.index[same], alone.kept.index[same])
        for field in ("influence", "share"):
            got, expected = (
                np.asarray(getattr(k, field))[same] for k in (batched.kept, alone.kept)
            )
            within(f"vmapped {field}", got, expected, BATCHED)
        chex.assert_trees_all_close(batched.leak, alone.leak, rtol=0, atol=BATCHED)
        size = np.abs(np.asarray(alone.rows.weight)).max()
        within("vmapped weights", batched.rows.weight, alone.rows.weight, BATCHED, size)
        within("vmapped heads", batched.rows.parts.heads, alone.rows.parts.heads, BATCHED, size)

"""Edits of the forward pass: against QK marginals, float64 NumPy, and what they leave alone."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny
from editing import (
    LIVE,
    MODEL,
    MOVED,
    SAME,
    SCORE,
    SIDES,
    Read,
    assert_identical,
    block_of,
    full,
    largest,
    moved,
    of_block,
    random_outputs,
    random_patterns,
    reads,
    reference_block,
    reference_model,
    run,
    vector,
    within_largest,
    within_scores,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import within

from qkattr.kinds import Kind
from qkattr.model.edits import (
    BlockEdits,
    Edits,
    PatternEdits,
    ReadEdits,
)
from qkattr.model.transformer import forward
from qkattr.qk.terms import qk_terms

# Edits that do nothing ----------------------------------------------------------------------------


def at_scale(case, scale: float) -> list[Read]:
    """Three edits in two blocks, two of them at one place."""
    return [
        Read(0, 3, vector(case, 0), scale, (0, tiny.N - 1)),
        Read(2, 4, vector(case, 2, 1), scale, (1,)),
        Read(2, 4, vector(case, 2, 2), scale, tuple(range(tiny.N))),
    ]


@LIVE
def test_scale_1_leaves_every_bit(case, live):
    """The same program, with edits of scale 1 and with none."""
    none = run(case, full(case, live=live))
    ones = at_scale(case, 1.0)
    assert_identical(run(case, full(case, query=ones, key=ones, live=live)), none)
    for side in SIDES:
        assert_identical(run(case, full(case, **{side: ones}, live=live)), none)
        logits, _ = run(case, full(case, **{side: at_scale(case, 0.0)}, live=live))
        assert moved(logits, none[0]), "at scale 0 the same edits must do something"
    within_largest("logits without edits", none[0], case.logits)
    for got, clean in zip(jax.tree.leaves(none[1]), jax.tree.leaves(case.trace), strict=True):
        within_largest("trace without edits", got, clean)


@pytest.mark.parametrize("side,live", [("query", False), ("key", True)])
def test_scale_1_leaves_every_bit_when_only_one_side_is_there(side, live):
    case = tiny.case("everything")

    def go(scale, heads=True):
        made = reads(case.cfg, *at_scale(case, scale))
        made = made if heads else made.replace(heads_EN=np.zeros_like(made.heads_EN))
        return run(case, Edits(blocks=BlockEdits(**{side: made}, live_scales=live)))

    none = run(case, Edits(blocks=BlockEdits(**{side: reads(case.cfg)}, live_scales=live)))
    assert_identical(go(1.0), none)
    assert_identical(go(3.0, heads=False), none)
    within_largest("logits without edits", none[0], case.logits)
    both = run(case, full(case, **{side: at_scale(case, 0.0)}, live=live))
    within_largest("logits of one side", go(0.0)[0], both[0])
    assert moved(go(0.0)[0], none[0])


def test_no_edits_are_no_leaves():
    """So an unedited run is traced as if there were no edits; `live_scales` is compiled in."""
    assert not jax.tree.leaves(Edits())
    assert jax.tree.structure(BlockEdits()) != jax.tree.structure(BlockEdits(live_scales=True))


# Against QK marginals -----------------------------------------------------------------------------


@partial(jax.jit, static_argnames="cfg")
def marginals(weights, x, parts, *, cfg):
    """Every slot's at every pair: `[N, T, S, A]` on the query side, `[N, T, S, C]` on the key's."""

    def one(head, query, key):
        qk = qk_terms(weights, x, parts, head=head, query=query, key=key, cfg=cfg)
        return dict(query=qk.query_marginals, key=qk.key_marginals)

    at, heads = jnp.arange(x.shape[0]), jnp.arange(weights.wq_DNH.shape[1])
    over_keys = jax.vmap(one, (None, None, 0))
    over_queries = jax.vmap(over_keys, (None, 0, None))
    return jax.lax.map(lambda head: over_queries(head, at, at), heads)


def constant_marginals(weights, x, cfg) -> dict[str, np.ndarray]:
    """`[N, T, S]` the part of the bias slot's marginal that is no vector: b_Q or b_K, and the
    norm's bias. An edit leaves it where it is.
    """
    seen, heads = naive.run_block(weights, x, cfg), range(weights.wq_DNH.shape[1])

    def vectors(side, of):
        go = partial(naive.qk_vectors, weights, seen, cfg)
        return np.array([[go(of(t), n, t, side)[0] for t in range(len(x))] for n in heads])

    nothing = {side: vectors(side, lambda t: np.zeros((2, tiny.D))) for side in SIDES}
    whole = {side: vectors(side, lambda t: np.stack([seen.x[t], seen.x[t]])) for side in SIDES}
    return dict(
        query=cfg.scale * nothing["query"] @ whole["key"].swapaxes(1, 2),
        key=cfg.scale * whole["query"] @ nothing["key"].swapaxes(1, 2),
    )


def test_the_score_moves_by_the_marginal(case):
    """Every block, slot, position and head, on both sides: exactly (scale - 1) times it.

    A score depends on the edits of its own query and its own key only, and with all patterns frozen
    no block sees another's edits: one run makes every single edit of a slot at once.
    """
    cfg, clean = case.cfg.block, np.asarray(case.trace.scores)
    frozen = PatternEdits(np.asarray(case.trace.patterns), np.ones(clean.shape[:3], bool))
    changes, vectors = [], []
    for b in range(tiny.L):
        weights, x, parts = block_of(case, b)
        change = jax.device_get(marginals(weights, x, parts, cfg=cfg))
        change = {side: np.moveaxis(change[side], -1, 0).copy() for side in SIDES}
        for side, constant in constant_marginals(weights, x, cfg).items():
            change[side][-2] -= constant
        changes.append(change)
        vectors.append(np.asarray(parts.vectors()))
    shape, everywhere = (tiny.L, tiny.T), np.ones((tiny.L, tiny.T, tiny.N), bool)
    at = np.broadcast_to(np.arange(tiny.T, dtype=np.int32), shape)
    for side, c in itertools.product(SIDES, range(case.components.n_slots)):
        change = np.stack([one[side][c] for one in changes])
        d = np.stack([one[:, c] for one in vectors])
        for scale in (0.0, -1.0, 2.0):
            made = ReadEdits(at, d, np.full(shape, scale, np.float32), everywhere)
            edits = full(case, patterns=frozen)
            edits = edits.replace(blocks=edits.blocks.replace(**{side: made}))
            got = run(case, edits)[1].scores
            within_scores(f"score at scale {scale}", got, clean + (scale - 1) * change, clean)
            assert moved(got, clean) == bool(d.any())


@LIVE
@pytest.mark.parametrize("b", range(tiny.L))
def test_the_score_is_that_of_the_edited_read(case, b, live):
    """Components of all kinds, scaled at several places on both sides at once, in NumPy."""
    weights, x, parts = block_of(case, b)
    kind, scales, made = np.asarray(parts.kind), (0.0, -1.0, 2.0, 0.5), []
    used = np.argwhere(kind != Kind.NONE)
    rng = np.random.default_rng(b)
    for scale, (t, c) in zip(np.tile(scales, 2), rng.permutation(used)[:8], strict=True):
        heads = np.flatnonzero(rng.integers(0, 2, tiny.N))
        d = np.asarray(parts.at(jnp.array([t]), jnp.array([c])))[0]
        made.append(Read(b, int(t), d, scale, tuple(heads)))
    edits = full(case, query=made[:4], key=made[4:], live=live)
    _, trace = run(case, edits)
    _, scores, pattern, _ = reference_block(weights, x, case.cfg.block, of_block(edits.blocks, b))
    within_scores("edited score", trace.scores[b], scores, np.asarray(case.trace.scores)[b])
    within("edited pattern", trace.patterns[b], pattern, MODEL)
    assert moved(trace.scores[b], np.asarray(case.trace.scores)[b])


# What edits leave alone ---------------------------------------------------------------------------


def test_frozen_patterns_stay_whatever_else_is_edited(case):
    clean = np.asarray(case.trace.patterns)
    frozen = PatternEdits(clean, np.ones(clean.shape[:3], bool))
    added = [(0, t, 2 * vector(case, 0, t)) for t in (0, 4)]
    everywhere = at_scale(case, 3.0)
    edits = full(case, patterns=frozen, residual=added, query=everywhere, key=everywhere)
    logits, trace = run(case, edits)
    np.testing.assert_array_equal(trace.patterns, clean)
    difference = np.abs(trace.boundaries[-1] - case.trace.boundaries[-1]).max(1)
    assert (difference > MOVED).all() and moved(logits, case.logits)


@pytest.mark.parametrize("side", SIDES)
def test_other_heads_frozen_the_edited_head_live(case, side):
    b, n, position = 1, 2, 3
    clean = np.asarray(case.trace.patterns)
    rows = np.ones(clean.shape[:3], bool)
    rows[b, n] = False
    made = [Read(b, position, vector(case, b), -2.0, (n,))]
    _, trace = run(case, full(case, patterns=PatternEdits(clean, rows), **{side: made}))
    others = np.delete(np.arange(clean.shape[0] * clean.shape[1]), b * clean.shape[1] + n)
    flat = [p.reshape(-1, *p.shape[2:]) for p in (trace.patterns, clean)]
    np.testing.assert_array_equal(flat[0][others], flat[1][others])
    within("rows before the edit", trace.patterns[b, n, :position], clean[b, n, :position], SAME)
    assert np.abs(trace.patterns[b, n, position] - clean[b, n, position]).max() > MOVED
    assert moved(trace.scores[b + 1], case.trace.scores[b + 1]), "later blocks see the change"


@LIVE
@pytest.mark.parametrize("side", SIDES)
def test_an_edit_touches_one_head_at_one_place(case, side, live):
    """Bit for bit: not its group mates, not its other queries or keys, not the values."""
    b, n, position = 1, 1, 3
    made = {side: [Read(b, position, vector(case, b), -2.0, (n,))]}
    logits, trace = run(case, full(case, **made, live=live))
    clean_logits, clean = run(case, full(case, live=live))
    same = trace.scores[b] == clean.scores[b]
    expected = np.ones_like(same)
    expected[(n, position) if side == "query" else (n, slice(None), position)] = False
    np.testing.assert_array_equal(same, expected)
    heads = np.delete(np.arange(tiny.N), n)
    np.testing.assert_array_equal(trace.patterns[b, heads], clean.patterns[b, heads])
    np.testing.assert_array_equal(trace.boundaries[: b + 1], clean.boundaries[: b + 1])
    np.testing.assert_array_equal(trace.boundaries[:, :position], clean.boundaries[:, :position])
    after = (trace.boundaries[b + 1] != clean.boundaries[b + 1]).any(1)
    reached = trace.patterns[b, n] != clean.patterns[b, n]
    np.testing.assert_array_equal(after, reached.any(1))
    assert after[position] and moved(logits, clean_logits)

    ablated = np.ones((tiny.L, len(case.tokens), tiny.N), np.float32)
    ablated[b, :, n] = 0.0
    logits, trace = run(case, full(case, **made, head_scale=ablated, live=live))
    clean_logits, clean = run(case, full(case, head_scale=ablated, live=live))
    np.testing.assert_array_equal(logits, clean_logits)
    np.testing.assert_array_equal(trace.boundaries, clean.boundaries)


# Edits compose ------------------------------------------------------------------------------------


@LIVE
@pytest.mark.parametrize("side", SIDES)
def test_edits_of_one_place_add_up(case, side, live):
    """Heads 0 and 1 see the first, heads 1 and 2 the second; a third is elsewhere."""
    b, position = 1, 4
    first, second, third = (vector(case, b, seed) for seed in range(3))
    elsewhere = Read(b, 2, third, 0.0, (1,))
    both = [
        Read(b, position, first, 0.0, (0, 1)), elsewhere, Read(b, position, second, 3.0, (1, 2))
    ]  # fmt: skip
    apart = [
        Read(b, position, first, 0.0, (0,)), Read(b, position, 2 * second - first, 2.0, (1,)),
        Read(b, position, second, 3.0, (2,)), elsewhere,
    ]  # fmt: skip
    logits, trace = run(case, full(case, **{side: both}, live=live))
    expected, expected_trace = run(case, full(case, **{side: apart}, live=live))
    within_scores(
        "scores", trace.scores[b], expected_trace.scores[b], np.asarray(case.trace.scores)[b]
    )
    within_largest("logits", logits, expected, MODEL)
    once, _ = run(case, full(case, **{side: apart[:1] + apart[2:]}, live=live))
    assert moved(once, expected)


def test_both_sides_give_the_product_of_the_edited_vectors(case):
    """(q + dq) . (k + dk): what neither side gives alone is dq . dk."""
    b, n, t, s, scales = 1, 3, 5, 3, (-1.0, 3.0)
    vectors = vector(case, b, 0), vector(case, b, 1)
    query, key = (
        [Read(b, at, d, scale, (n,))]
        for at, d, scale in zip((t, s), vectors, scales, strict=True)
    )  # fmt: skip
    got = lambda **made: run(case, full(case, **made))[1].scores[b].astype(np.float64)
    only_query, only_key, both = got(query=query), got(key=key), got(query=query, key=key)
    weights, x, _ = block_of(case, b)
    seen = naive.run_block(weights, x, case.cfg.block)
    go, nothing = partial(naive.qk_vectors, weights, seen, case.cfg.block), np.zeros(tiny.D)
    dq, dk = (
        go(np.stack([(scale - 1) * d, nothing, nothing]), n, at, side)[0]
        for side, at, d, scale in zip(SIDES, (t, s), vectors, scales, strict=True)
    )  # fmt: skip
    expected = only_query + only_key - np.asarray(case.trace.scores)[b]
    cross = case.cfg.block.scale * dq @ dk
    expected[n, t, s] += cross
    size = np.maximum(largest(only_query), largest(only_key))
    within("(q + dq).(k + dk)", both[n], expected[n], SCORE, size[n])
    assert abs(cross) > 100 * SCORE * size[n]


def test_head_scale_0_is_no_output_projection(case):
    b, n = 1, 2
    ablated = np.ones((tiny.L, len(case.tokens), tiny.N), np.float32)
    ablated[b, :, n] = 0.0
    logits, trace = run(case, full(case, head_scale=ablated))
    blocks = case.params.blocks
    params = case.params.replace(blocks=blocks.replace(wo_NHD=blocks.wo_NHD.at[b, n].set(0.0)))
    expected, expected_trace = forward(params, case.tokens, cfg=case.cfg)
    within_largest("logits", logits, expected)
    within("patterns", trace.patterns, expected_trace.patterns, SAME)
    assert moved(logits, case.logits)


def test_head_add_is_a_bias_of_the_output_projection(case):
    """The same at every position, it goes through post-norm and MLP as such a bias does."""
    b, n = 1, 2
    added = np.zeros((tiny.L, len(case.tokens), tiny.N, tiny.H), np.float32)
    added[b, :, n] = np.random.default_rng(0).normal(size=tiny.H)
    logits, trace = run(case, full(case, head_add=added))
    blocks = case.params.blocks
    bias = np.zeros((tiny.L, tiny.D), np.float32) if blocks.bo_D is None else np.array(blocks.bo_D)
    bias[b] += added[b, 0, n] @ np.asarray(blocks.wo_NHD[b, n])
    params = case.params.replace(blocks=blocks.replace(bo_D=bias))
    expected, expected_trace = forward(params, case.tokens, cfg=case.cfg)
    within_largest("logits", logits, expected)
    within("patterns", trace.patterns, expected_trace.patterns, SAME)
    assert moved(logits, case.logits)


@pytest.mark.parametrize("b", range(tiny.L))
def test_patterns_are_put_in(case, b):
    """A block with some rows overridden, by hand from its values."""
    edits = full(case, patterns=random_patterns(case, np.random.default_rng(b), 0.4))
    override = of_block(edits.blocks, b).patterns
    override.rows_NT[0] = False
    for other in set(range(tiny.L)) - {b}:
        edits.blocks.patterns.rows_NT[other] = False
    _, trace = run(case, edits)
    weights, x, _ = block_of(case, b)
    own = np.asarray(case.trace.patterns)[b]
    mixed = np.where(override.rows_NT[..., None], override.pattern_NTS, own)
    within("pattern", trace.patterns[b], mixed, SAME)
    expected = naive.run_block(weights, x, case.cfg.block, pattern=mixed).out
    within_largest("next boundary", trace.boundaries[b + 1], expected, MODEL)
    assert moved(trace.boundaries[b + 1], np.asarray(case.trace.boundaries[b + 1]))


drawn_reads = st.lists(
    st.tuples(
        st.integers(0, tiny.L - 1),
        st.integers(0, tiny.T - 1),
        st.integers(0, 99),
        st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
        st.sets(st.integers(0, tiny.N - 1)).map(tuple),
    ),
    max_size=4,
)


@LIVE
@settings(max_examples=4, deadline=None, derandomize=True)
@given(query=drawn_reads, key=drawn_reads, seed=st.integers(0, 99), share=st.sampled_from([0, 0.2]))
def test_everything_at_once_equals_numpy(case, live, query, key, seed, share):
    """Reads on both sides, residual edits, overridden patterns, heads scaled and added to."""
    rng = np.random.default_rng(seed)
    query, key = (
        [Read(b, t, vector(case, b, d), scale, heads) for b, t, d, scale, heads in side]
        for side in (query, key)
    )
    head_scale = np.ones((tiny.L, len(case.tokens), tiny.N), np.float32)
    head_scale[rng.uniform(size=head_scale.shape) < share] = 0.0
    head_scale[rng.uniform(size=head_scale.shape) < share] = -0.5
    boundaries = rng.integers(-1, tiny.L + 2, 2)
    added = [(b, int(rng.integers(tiny.T)), vector(case, 0, seed)) for b in boundaries]
    edits = full(
        case, query=query, key=key, patterns=random_patterns(case, rng, share),
        head_scale=head_scale, head_add=random_outputs(case, rng),
        residual=added, live=live,
    )  # fmt: skip
    logits, trace = run(case, edits)
    expected, boundaries, scores, patterns = reference_model(case, edits)
    within_largest("logits", logits, expected, MODEL)
    within_largest("boundaries", trace.boundaries, boundaries, MODEL)
    causal = np.tril(np.ones(scores.shape[-2:]))
    within("scores", trace.scores * causal, scores * causal, MODEL, largest(scores))
    within("patterns", trace.patterns, patterns, MODEL)

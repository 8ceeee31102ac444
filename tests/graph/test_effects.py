"""Effects: the account adds up, and every number is autodiff's of a frozen model written apart.

The reference (`frozen`) is in float64: blocks whose patterns and norm scales are those of NumPy's
run, and whose derivatives JAX takes.
"""

# ruff: noqa: F811 (fixtures of another module)
from __future__ import annotations

import dataclasses

import frozen
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny
from effects_tried import (  # noqa: F401
    ACCOUNT,
    EFFECT,
    FINITE,
    SAME,
    Targets,
    largest,
    pulled,
    run,
    seen_of,
    targets_of,
    tried,
)
from tiny import within
from tracing import traced_at_most

from qkattr.config import LINEARISATIONS
from qkattr.graph.effects import ACCOUNT_KINDS, Effects, target_effects
from qkattr.kinds import Kind
from qkattr.model.linear import freeze, pull_stream, push

# The account --------------------------------------------------------------------------------------


def check_account(case, targets: Targets, found: Effects, tolerance: float) -> None:
    x, t = np.asarray(case.trace.boundaries, np.float64), targets
    value = (np.float64(t.covector) * x[t.boundary, t.position]).sum(1) + t.constant
    within("value", found.value, value, tolerance, np.abs(value))
    for b in range(len(x)):
        own = t.boundary >= b
        total = found.account[b].sum(-1)
        within(f"account at {b}", total[own], value[own], tolerance, np.abs(value[own]))
        assert not total[~own].any() and not np.asarray(found.node[b])[~own].any()


def test_the_account_sums_to_the_target_at_every_boundary(tried):
    check_account(tried.case, tried.targets, tried.found, ACCOUNT)


def test_the_account_is_the_node_effects_by_kind(tried):
    node, kind = tried.found.node, np.asarray(tried.case.components.kind)
    for i, name in enumerate(ACCOUNT_KINDS[:-1]):
        expected = np.where(kind[:, None] == name, node, 0.0).sum((2, 3))
        scale = np.abs(node).sum((2, 3))
        within(name.label, tried.found.account[..., i], expected, SAME, scale)
    assert ACCOUNT_KINDS[-1] == Kind.CONST


def test_constants_are_what_blocks_add_to_their_linear_part(tried):
    """Of a `const` node, at every position; and the account holds those of all blocks above."""
    t, total = tried.targets, np.zeros((tiny.L + 1, len(tried.targets.boundary)))
    with jax.enable_x64(True):
        for b in range(tiny.L + 1):
            expected = np.zeros((len(t.boundary), len(tried.case.tokens)))
            if b:
                x = tried.x(b - 1)
                given = np.subtract(*jax.jvp(tried.blocks[b - 1], (x,), (x,)))
                expected = np.einsum("RTD,TD->RT", tried.derivative(b, "x", tried.x(b)), given)
            total[:b] += expected.sum(1)
            own = np.flatnonzero(t.boundary == b)
            expected[own, t.position[own]] += t.constant[own]
            size = np.maximum(largest(expected), np.abs(tried.found.value)[:, None])
            within("const", tried.found.constant[b], expected, EFFECT, size)
    total += np.where(np.arange(tiny.L + 1)[:, None] <= t.boundary, t.constant, 0.0)
    size = np.maximum(np.abs(total), np.abs(tried.found.value))
    within("const of the account", tried.found.account[..., -1], total, ACCOUNT, size)


def test_the_strongest_places_are_those_of_the_dense_arrays(tried):
    """Ranked by the masking that another derivative says."""
    case, weights = tried.case, np.array([1.0, -0.5, 0, 0, 2.0, 0], np.float32)
    shape = (tiny.L, len(case.tokens), tiny.N, tiny.H)
    live = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    how = dict(weights=weights, live=live, strongest=20, heads=False)
    found = jax.device_get(run(case, tried.targets, tried.linearisation, **how)).places
    for b, seen in enumerate(tried.seen):
        at = found.head[b], found.query[b], found.key[b]
        assert len(set(zip(*at, strict=True))) == 20
        for name, got in (("head", found.effect[b]), ("derivative", found.derivative[b])):
            dense = np.einsum("R,RNTS->NTS", weights, getattr(tried.found, name)[b])
            within(name, got, dense[at], SAME, np.abs(dense).max())
        masked = masking_by_loop(case.block(b)[0], seen, live[b])
        size = np.abs(masked).max()
        within("masking", found.masking[b], masked[at], EFFECT, size)
        first = -np.sort(-np.abs(masked).ravel())[:20]
        within("order", np.abs(found.masking[b]), first, EFFECT, size)
        within("probability", found.probability[b], seen.pattern[at], SAME, 1.0)
        allowed = found.probability[b] > 0
        scores = np.where(allowed, seen.scores[at], 0.0)
        got = np.where(allowed, found.score[b], 0.0)
        within("score", got, scores, SAME, np.abs(scores).max())


def masking_by_loop(weights, seen: naive.Seen, g) -> np.ndarray:
    """What `g [T, N, H]` on the heads' outputs loses when one key is masked: the pattern is made
    anew without it. In NumPy, one place after another; what all keys share moves nothing."""
    read = np.stack([norm @ x for norm, x in zip(seen.norm_attn, seen.x, strict=True)])
    shared = np.arange(seen.pattern.shape[0]) // naive.group_of(weights)
    values = np.einsum("SD,DNH->SNH", read, naive.f64(weights.wv_DKH)[:, shared])
    out = np.zeros(seen.pattern.shape)
    for n, t, s in zip(*np.nonzero(seen.pattern), strict=True):
        row = seen.pattern[n, t].astype(float).copy()
        if np.count_nonzero(row) < 2:
            continue
        without = row.copy()
        without[s] = 0
        without /= without.sum()
        out[n, t, s] = (row - without) @ (values[:, n] @ g[t, n])
    return out


# Against autodiff ---------------------------------------------------------------------------------


def test_node_effects_are_the_gradient_times_the_component(tried):
    with jax.enable_x64(True):
        for b in range(tiny.L + 1):
            g = tried.derivative(b, "x", tried.x(b))
            parts = jax.tree.map(lambda a, b=b: a[b], tried.case.components)
            vectors = np.asarray(parts.vectors(), np.float64)
            expected = np.einsum("RTD,TCD->RTC", g, vectors)
            within("node", tried.found.node[b], expected, EFFECT, largest(expected))


def test_head_effects_are_the_derivative_through_one_head_at_one_place(tried):
    with jax.enable_x64(True):
        for b, seen in enumerate(tried.seen):
            expected = tried.derivative(b, "only", jnp.ones(seen.pattern.shape))
            within("head", tried.found.head[b], expected, EFFECT, largest(expected))


def test_head_effects_add_up_to_the_vjp_through_the_head(tried):
    with jax.enable_x64(True):
        for b, seen in enumerate(tried.seen):
            n = b % tiny.N
            g = tried.only(b, frozen.of_head(n, *seen.pattern.shape))
            expected = np.einsum("RSD,SD->RS", g, tried.x(b))
            got = tried.found.head[b][:, n].sum(1)
            within("head, all queries", got, expected, EFFECT, largest(expected))


def test_score_derivatives_are_those_of_the_softmax(tried):
    with jax.enable_x64(True):
        for b, seen in enumerate(tried.seen):
            expected = tried.derivative(b, "scores", jnp.asarray(seen.scores))
            within("derivative", tried.found.derivative[b], expected, EFFECT, largest(expected))


def test_a_score_derivative_is_a_finite_difference(case):
    """In NumPy: one score moved, the pattern's row made anew, and matrices up to the target."""
    name, cfg, step = "frozen-gate", case.cfg.block, 1e-5
    targets, seen = targets_of(case), seen_of(case.cfg.family)
    weights = [case.block(b)[0] for b in range(tiny.L)]
    linear = [naive.linearise(w, s, cfg, name).matrix() for w, s in zip(weights, seen, strict=True)]
    found = run(case, targets, name).derivative
    for b in range(tiny.L):
        n, t, s = b % tiny.N, 5, 4

        def target(moved, b=b, n=n, t=t, s=s):
            scores, pattern = seen[b].scores[n, t].copy(), seen[b].pattern.copy()
            scores[s] += moved
            sees = [i for i in range(t + 1) if t - i < int(weights[b].window)]
            pattern[n, t, sees] = naive.softmax(naive.cap(scores[sees], cfg))
            changed = dataclasses.replace(seen[b], pattern=pattern)
            x = naive.linearise(weights[b], changed, cfg, name).matrix()
            x = np.einsum("tisj,sj->ti", x, seen[b].x)
            for matrix in linear[b + 1 :]:
                x = np.einsum("tisj,sj->ti", matrix, x)
            return np.float64(targets.covector[0]) @ x[targets.position[0]]

        slope = (target(step) - target(-step)) / (2 * step)
        size = np.abs(found[b, 0]).max()
        within("derivative - difference", found[b, 0, n, t, s], slope, EFFECT + FINITE, size)


def test_pull_stream_is_the_transpose_of_push(case):
    weights, x, _ = case.block(1)
    made = freeze(weights, x, cfg=case.cfg.block)
    g = np.random.default_rng(0).normal(size=(2, *x.shape)).astype(np.float32)
    transpose = jax.linear_transpose(lambda v: push(made, v), x)
    expected = np.stack([transpose(jnp.asarray(one))[0] for one in g])
    within("pull_stream", pull_stream(made, g).below, expected, SAME, np.abs(expected).max())


# What it leaves out, what it compiles, and where it runs ------------------------------------------


def test_without_heads_the_account_is_the_same():
    case = tiny.case("gemma2")
    whole, less = (run(case, targets_of(case), heads=heads) for heads in (True, False))
    assert less.head is None and less.derivative is None
    np.testing.assert_allclose(less.account, whole.account, rtol=SAME, atol=SAME)


def test_padding_of_targets_has_no_effects():
    case = tiny.case("llama")
    t = targets_of(case)
    t.boundary[1] = -1
    found = jax.device_get(run(case, t))
    for array in (found.value[None], found.node, found.account, found.head, found.derivative):
        assert np.isfinite(array).all() and not array[:, 1:2].any()


def test_padding_of_a_prompt_changes_nothing():
    case, ids = tiny.case("everything"), tiny.tokens()
    padded = tiny.case_of(
        case.params, case.cfg, np.pad(ids, (0, 3)), tiny.dictionaries(), n_real=len(ids)
    )
    t, n = targets_of(case), len(ids)
    one, other = jax.device_get((run(case, t), run(padded, t)))
    within("node", other.node[:, :, :n], one.node, SAME, np.abs(one.node).max())
    within("head", other.head[..., :n, :n], one.head, SAME, np.abs(one.head).max())
    assert not other.node[:, :, n:].any() and not other.derivative[..., n:].any()


def test_one_program_for_a_bucket(monkeypatch):
    params, cfg = tiny.house("qwen3")
    static = ("cfg", "linearisation", "precision", "heads", "strongest")
    monkeypatch.setattr("effects_tried.target_effects", traced_at_most(1, target_effects, *static))
    for n_real, seed in ((9, 0), (11, 1), (12, 2)):
        ids = np.pad(tiny.tokens(n_real, seed), (0, 12 - n_real))
        saes = (None, *[tiny.dictionary(b, activation="topk") for b in range(1, tiny.L + 1)])
        case = tiny.case_of(params, cfg, ids, saes, n_real=n_real)
        t = targets_of(case)
        t.position[:2] = n_real - 1
        run(case, t)


@pytest.mark.parametrize("house", ["gemma2", "neox"])
def test_vmap_over_prompts_equals_one_at_a_time(house):
    params, cfg = tiny.house(house)
    cases = [tiny.case_of(params, cfg, tiny.tokens(seed=s), tiny.dictionaries()) for s in (0, 1)]
    inputs = [(c.trace.boundaries, c.components, targets_of(c).arguments()) for c in cases]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    together = jax.vmap(
        lambda x, parts, t: target_effects(params.blocks, x, parts, *t, cfg=cfg.block)
    )(*stacked)  # fmt: skip
    for i, case in enumerate(cases):
        alone = run(case, targets_of(case))
        for name in ("node", "account", "head", "derivative"):
            one, many = getattr(alone, name), getattr(together, name)[i]
            within(name, many, one, SAME, np.abs(one).max())


# The real model -----------------------------------------------------------------------------------

REAL_EFFECT = 5e-5  # of the largest: thirty blocks instead of three, sums 50 times longer
BLOCKS = (3, 12, 25)


@pytest.mark.slow
@pytest.mark.parametrize("linearisation", LINEARISATIONS)
def test_real_account(real_case, linearisation):
    targets = targets_of(real_case)
    found = jax.device_get(run(real_case, targets, linearisation))
    check_account(real_case, targets, found, ACCOUNT)


@pytest.mark.slow
def test_real_effects_are_those_of_autodiff(real_case):
    """Block by block from the top, in float64."""
    t, cfg, linearisation = targets_of(real_case), real_case.cfg, "jacobian"
    found = jax.device_get(run(real_case, t, linearisation))
    x = np.asarray(real_case.trace.boundaries, np.float64)
    g = np.zeros((len(t.boundary), *x.shape[1:]))
    for b in range(cfg.n_blocks, -1, -1):
        with jax.enable_x64(True):
            if b < cfg.n_blocks:
                weights, at = real_case.block(b)[0], jnp.asarray(x[b])
                seen = naive.run_block(weights, x[b], cfg.block)
                block = frozen.frozen_block(weights, at, cfg.block, linearisation, seen=seen)
                if b in BLOCKS:
                    check_real_heads(block, at, seen, g, found, b)
                _, vjp = jax.vjp(block, at)
                g = pulled(vjp, g)
        for r in np.flatnonzero(t.boundary == b):
            g[r, t.position[r]] += t.covector[r]
        parts = jax.tree.map(lambda a, b=b: a[b], real_case.components)
        expected = np.einsum("RTD,TCD->RTC", g, np.asarray(parts.vectors(), np.float64))
        within(f"node at {b}", found.node[b], expected, REAL_EFFECT, largest(expected))


def check_real_heads(block, x, seen, g, found: Effects, b: int) -> None:
    arguments = dict(only=jnp.ones(seen.pattern.shape), scores=jnp.asarray(seen.scores))
    for got, (name, at) in zip((found.head, found.derivative), arguments.items(), strict=True):
        _, vjp = jax.vjp(lambda a, name=name: block(x, **{name: a}), at)
        expected = pulled(vjp, g)
        within(f"{name} at {b}", got[b], expected, REAL_EFFECT, largest(expected))

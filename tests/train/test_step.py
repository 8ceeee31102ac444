"""Steps: unit rows, rates, boundaries mapped one by one or at once, on a mesh; planted features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from tiny import within

from qkattr.sharding import make_mesh, shard
from qkattr.train.config import ACTIVATIONS, TrainConfig
from qkattr.train.sae import init_sae
from qkattr.train.step import init_state, optimiser, step_one, train_step

#: A few Adam steps in float32 with sums in another order; Adam divides small numbers by small ones.
SAME = 2e-4
L, B, D, M = 3, 32, 8, 24


def config(**options) -> TrainConfig:
    base = dict(width=M, k=4, tokens=20 * B, batch=B, buffer=4, row=17, lr=1e-2, aux_k=4)
    return TrainConfig(**(base | dict(dead_after=64) | options))


def stacked(cfg):
    keys = jax.random.split(jax.random.key(0), L)
    return init_state(jax.vmap(lambda key: init_sae(key, jnp.zeros(D), cfg=cfg))(keys), cfg=cfg)


def batch(i):
    rng = np.random.default_rng(i)
    x = rng.normal(size=(L, B, D)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.random((L, B)) > 0.1, jnp.float32)


def run(cfg, steps=5, at_once=False, mesh=None):
    state = shard(stacked(cfg), mesh)
    for i in range(steps):
        state, seen = train_step(state, *batch(i), cfg=cfg, at_once=at_once)
    return state, seen


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_one_by_one_at_once_and_on_a_mesh_are_the_same(kind):
    cfg = config(activation=kind)
    expected, _ = run(cfg)
    for other, _ in (run(cfg, at_once=True), run(cfg, at_once=True, mesh=make_mesh(2, 4))):
        for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(other), strict=True):
            within("state", one, two, SAME, max(1.0, float(jnp.abs(one).max())))


def test_boundaries_do_not_touch_each_other():
    cfg = config()
    whole, _ = run(cfg, steps=3)
    alone = jax.tree.map(lambda a: a[1], stacked(cfg))
    for i in range(3):
        x, weight = batch(i)
        alone, _ = jax.jit(step_one, static_argnames="cfg")(alone, x[1], weight[1], cfg=cfg)
    within("w_dec", whole.sae.w_dec_MD[1], alone.sae.w_dec_MD, SAME)


def test_rows_keep_norm_one_and_the_gradient_has_no_part_along_them():
    state, _ = run(config())
    norm = jnp.linalg.norm(state.sae.w_dec_MD, axis=-1)
    within("row norms", norm, 1.0, 1e-6)


def test_positions_of_weight_zero_change_nothing():
    cfg = config()
    x, weight = batch(0)
    one, _ = train_step(stacked(cfg), x, weight, cfg=cfg, at_once=False)
    wild = jnp.where(weight[..., None] > 0, x, 1e3)
    two, _ = train_step(stacked(cfg), wild, weight, cfg=cfg, at_once=False)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_silent_features_are_counted_and_come_back():
    cfg = config()
    state, seen = run(cfg, steps=1)
    kept = np.asarray(batch(0)[1].sum(1), int)
    expected = np.where(np.asarray(seen.fired_M), 0, kept[:, None])
    np.testing.assert_array_equal(state.silent_M, expected)
    for _ in range(9):
        state, _ = train_step(state, *batch(0), cfg=cfg, at_once=False)
    assert int(state.silent_M.max()) <= cfg.dead_after


def test_the_rate_warms_up_stays_and_falls_to_zero():
    cfg = config(tokens=100 * B, warmup=0.1, decay=0.4, clip=1e9)
    transform, w = optimiser(cfg), jnp.ones(1)
    state, sizes = transform.init(w), []
    for _ in range(cfg.steps):
        # A constant gradient: Adam's step is the rate itself.
        update, state = transform.update(jnp.ones(1), state, w)
        sizes.append(-float(update[0]))
    within("first", sizes[0], cfg.lr / 10, 1e-3 * cfg.lr)
    within("level", sizes[15:55], cfg.lr, 1e-3 * cfg.lr)
    assert all(a > b for a, b in zip(sizes[61:], sizes[62:], strict=False))
    assert 0 < sizes[-1] < cfg.lr / 20


def test_bfloat16_products_stay_near_float32():
    exact, _ = run(config(), steps=1)
    rough, _ = run(config(compute="bfloat16"), steps=1)
    assert rough.sae.w_dec_MD.dtype == jnp.float32
    within("bfloat16", rough.sae.w_dec_MD, exact.sae.w_dec_MD, 0.03)


#: What finds it: a wider dictionary has rows to spare where two of them fight over one.
PLANTED = {
    "topk": dict(width=4 * planted.FEATURES, tokens=1500 * planted.BATCH),
    "batchtopk": dict(width=2 * planted.FEATURES, tokens=3000 * planted.BATCH),
    "jumprelu": dict(
        width=4 * planted.FEATURES, tokens=3000 * planted.BATCH, l0_weight=1, bandwidth=1,
        threshold=1,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_dictionary_is_found(kind):
    """At least 95 % of 256 rows in 64 dimensions, 6 active, by cosine 0.95."""
    cfg = TrainConfig(
        activation=kind, k=planted.ACTIVE, batch=planted.BATCH, buffer=64, lr=1e-2, decay=0.4,
        clip=100.0, dead_after=20_000, sparse=False, **PLANTED[kind],
    )  # fmt: skip
    truth = planted.dictionary(jax.random.key(3))
    state, _ = planted.train(cfg, truth)
    assert planted.recovered(truth, state.sae.w_dec_MD[0]) >= 0.95

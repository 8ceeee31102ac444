"""Sparse products against dense ones and autodiff, and the loss against one written plainly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import within

from qkattr.train.config import ACTIVATIONS, TrainConfig
from qkattr.train.sae import SAE, init_sae, loss
from qkattr.train.sparse import densify, largest, write

#: Float32 sums of a few hundred terms in another order.
SAME = 1e-5
B, D, M, K = 24, 12, 40, 5


def arrays(seed=0, b=B, d=D, m=M):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(b, d)), rng.normal(size=(m, d))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def slots(seed, b, a, m):
    rng = np.random.default_rng(seed)
    index = np.stack([rng.choice(m, a, replace=False) for _ in range(b)])
    return jnp.asarray(rng.normal(size=(b, a)), jnp.float32), jnp.asarray(index, jnp.int32)


@settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 7), st.integers(1, 6), st.integers(0, 9), st.integers(0, 99)
)
def test_write_is_the_dense_product(b, d, a, more, seed):
    m = a + more
    (x, w), (v, index) = arrays(seed, b, d, m), slots(seed, b, a, m)
    dense = np.zeros((b, m))
    for i in range(b):
        for j in range(a):
            dense[i, int(index[i, j])] += float(v[i, j])
    np.testing.assert_array_equal(densify(v, index, m), dense.astype(np.float32))
    expected = dense @ np.asarray(w, np.float64)
    for sparse in (True, False):
        within("write", write(v, index, w, sparse=sparse), expected, SAME, np.abs(expected).max())

    def probe(v, w, of):
        return (of(v, w) * x).sum()

    plain = jax.grad(probe, (0, 1))(v, w, lambda v, w: densify(v, index, m) @ w)
    for sparse in (True, False):
        mine = jax.grad(probe, (0, 1))(v, w, lambda v, w, s=sparse: write(v, index, w, sparse=s))
        for name, one, other in zip(("v", "w"), mine, plain, strict=True):
            scale = max(float(jnp.abs(other).max()), 1.0)
            within(f"gradient of {name}", one, other, SAME, scale)


@pytest.mark.parametrize("sparse", [True, False])
def test_largest_and_its_gradient_are_autodiffs(sparse):
    (x, w), b = arrays(1), jnp.asarray(np.random.default_rng(2).normal(size=M), jnp.float32)
    c = jnp.asarray(np.random.default_rng(3).normal(size=(B, K)), jnp.float32)

    def plain(x, w, b):
        return (jax.lax.top_k(x @ w.T + b, K)[0] * c).sum()

    def mine(x, w, b):
        return (largest(x, w, b, slots=K, sparse=sparse)[0] * c).sum()

    np.testing.assert_array_equal(
        largest(x, w, b, slots=K, sparse=sparse)[1], np.argsort(-(x @ w.T + b), 1)[:, :K]
    )
    for one, other in zip(
        jax.grad(mine, (0, 1, 2))(x, w, b), jax.grad(plain, (0, 1, 2))(x, w, b), strict=True
    ):
        within("gradient of largest", one, other, SAME, float(jnp.abs(other).max()))


def config(kind: str, sparse: bool, **more) -> TrainConfig:
    options = dict(width=M, k=K, activation=kind, slots=M, batch=B, buffer=2, row=32, aux_k=0)
    return TrainConfig(**(options | dict(sparse=sparse, bandwidth=0.4, l0_weight=0.7) | more))


def start(cfg: TrainConfig) -> SAE:
    rng = np.random.default_rng(4)
    sae = init_sae(jax.random.key(0), jnp.asarray(rng.normal(size=D), jnp.float32), cfg=cfg)
    shaken = [leaf + 0.1 * rng.normal(size=leaf.shape) for leaf in jax.tree.leaves(sae)]
    return jax.tree.unflatten(
        jax.tree.structure(sae), [jnp.asarray(leaf, jnp.float32) for leaf in shaken]
    )


def plain_loss(sae: SAE, x, weight, kind: str):
    """Dense, with masks that autodiff sees as constants; jumprelu without its threshold's part."""
    pre = (x - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M
    fixed = jax.lax.stop_gradient(pre)
    if kind == "topk":
        least = jnp.sort(fixed, axis=1)[:, -K][:, None]
        mask = (fixed >= least) & (fixed > 0)
    elif kind == "batchtopk":
        kept = jnp.sort(jnp.where(weight[:, None] > 0, jnp.maximum(fixed, 0), 0).ravel())[::-1]
        mask = (fixed >= kept[int(weight.sum()) * K - 1]) & (fixed > 0)
    else:
        mask = fixed > jnp.exp(jax.lax.stop_gradient(sae.log_threshold_M))
    rebuilt = (pre * mask) @ sae.w_dec_MD + sae.b_dec_D
    return (weight[:, None] * jnp.square(x - rebuilt)).sum() / (weight.sum() * D)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_losss_gradient_is_autodiff_of_the_dense_one(kind, sparse):
    cfg = config(kind, sparse, l0_weight=0.0, slots=M)
    x, weight = arrays(5)[0], jnp.asarray(np.arange(B) % 7 > 0, jnp.float32)
    sae, dead = start(cfg), jnp.zeros(M, bool)
    (value, seen), mine = jax.value_and_grad(loss, has_aux=True)(sae, x, weight, dead, cfg=cfg)
    expected, plain = jax.value_and_grad(plain_loss)(sae, x, weight, kind)
    within("loss", value, expected, SAME, abs(float(expected)))
    for name in ("w_enc_MD", "w_dec_MD", "b_enc_M", "b_dec_D"):
        one, other = getattr(mine, name), getattr(plain, name)
        assert float(jnp.abs(other).max()) > 0
        within(name, one, other, SAME, float(jnp.abs(other).max()))
    assert np.asarray(seen.fired_M).any()


def test_jumprelus_threshold_gradient_is_the_straight_through_one():
    """d loss / d log theta by a loop over positions and features: the rectangle of width eps."""
    cfg = config("jumprelu", True)
    x, weight = arrays(5)[0], jnp.asarray(np.arange(B) % 7 > 0, jnp.float32)
    sae = start(cfg)
    mine = jax.grad(lambda s: loss(s, x, weight, jnp.zeros(M, bool), cfg=cfg)[0])(sae)
    w_enc, w_dec, b_enc, b_dec, log_theta = (
        np.asarray(leaf, np.float64)
        for leaf in (sae.w_enc_MD, sae.w_dec_MD, sae.b_enc_M, sae.b_dec_D, sae.log_threshold_M)
    )
    theta, eps, keep = np.exp(log_theta), cfg.bandwidth, np.asarray(weight)
    pre = (np.asarray(x, np.float64) - b_dec) @ w_enc.T + b_enc
    a = pre * (pre > theta)
    left = np.asarray(x, np.float64) - a @ w_dec - b_dec
    n = keep.sum()
    l0 = (keep[:, None] * (pre > theta)).sum() / n
    expected = np.zeros(M)
    for i in range(B):
        for f in range(M):
            near = (abs(pre[i, f] - theta[f]) < eps / 2) / eps
            of_a = -2 * left[i] @ w_dec[f] / (n * D)
            of_l0 = cfg.l0_weight * 2 * (l0 / K - 1) / K / n
            expected[f] += keep[i] * near * (-theta[f] * of_a - of_l0) * theta[f]
    assert np.abs(expected).max() > 0
    within("log threshold", mine.log_threshold_M, expected, SAME, np.abs(expected).max())


def test_only_dead_features_serve_the_auxiliary_loss():
    """By a dense loop over the first eighth of the positions."""
    cfg = config("topk", True, aux_k=3, aux_weight=0.5, slots=K)
    x, weight = arrays(6)[0], jnp.ones(B)
    sae, dead = start(cfg), jnp.arange(M) % 6 == 0
    with_aux = loss(sae, x, weight, dead, cfg=cfg)[0]
    without = loss(sae, x, weight, jnp.zeros(M, bool), cfg=cfg)[0]
    pre = np.asarray((x - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M)
    miss = total = 0.0
    for i in range(B // 8):
        top = np.argsort(-pre[i])[:K]
        of_top = sum(max(pre[i, f], 0) * np.asarray(sae.w_dec_MD[f]) for f in top)
        left = np.asarray(x[i] - sae.b_dec_D) - of_top
        there = [f for f in np.argsort(-pre[i]) if dead[f]][:3]
        told = sum(max(pre[i, f], 0) * np.asarray(sae.w_dec_MD[f]) for f in there)
        miss, total = miss + np.square(left - told).sum(), total + np.square(left).sum()
    within("auxiliary loss", with_aux - without, 0.5 * miss / total, 1e-4)
    gradient = jax.grad(lambda s: loss(s, x, weight, dead, cfg=cfg)[0])(sae)
    none = jax.grad(lambda s: loss(s, x, weight, jnp.zeros(M, bool), cfg=cfg)[0])(sae)
    changed = np.abs(gradient.w_enc_MD - none.w_enc_MD).max(1) > 1e-7
    assert changed.any() and not changed[~np.asarray(dead)].any()

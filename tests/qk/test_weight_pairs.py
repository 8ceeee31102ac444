"""Pairs of the weights alone: those of a NumPy loop over features, on one device and on several."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import within

from qkattr.qk.weights import HeadScales, weight_pairs
from qkattr.sharding import shard

M, HEAD, DISTANCE, TOP = 44, 3, 2, 20
SCALES = HeadScales(0.7, 1.3, 0.9)
#: Of the largest |value|: float32 against float64.
VALUE = 2e-6


def features():
    return np.random.default_rng(0).normal(size=(M, tiny.D)).astype(np.float32)


def turned(x, at, inv_freq):
    """Half-split rotary embedding, pair by pair."""
    out, pairs = x.copy(), len(inv_freq)
    for i, frequency in enumerate(inv_freq):
        c, s = np.cos(at * frequency), np.sin(at * frequency)
        out[i], out[i + pairs] = x[i] * c - x[i + pairs] * s, x[i + pairs] * c + x[i] * s
    return out


def by_hand(weights, cfg):
    """`[M, M]` in float64."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
    kv = HEAD // (w.wq_DNH.shape[1] // w.wk_DKH.shape[1])
    gain = lambda norm, head: 1.0 if norm is None else norm if norm.ndim == 1 else norm[head]
    sides = []
    for feature in features().astype(np.float64):
        read = feature if cfg.norm != "layer" else feature - feature.mean()
        read = feature if w.norm_attn is None else read * w.norm_attn.weight
        q = read * SCALES.attn @ w.wq_DNH[:, HEAD] * gain(w.norm_q, HEAD)
        k = read * SCALES.attn @ w.wk_DKH[:, kv] * gain(w.norm_k, kv)
        q, k = (q * SCALES.q, k * SCALES.k) if w.norm_q is not None else (q, k)
        sides.append((turned(q, DISTANCE, w.inv_freq), k))
    return cfg.scale * np.array([[q @ k for _, k in sides] for q, _ in sides])


@pytest.mark.parametrize("house", ["llama", "gpt2", "qwen3", "olmo2", "everything"])
def test_equals_a_loop(house):
    case = tiny.case(house)
    weights, _, _ = case.block(1)
    how = dict(head=HEAD, distance=DISTANCE, scales=SCALES, top=TOP, cfg=case.cfg.block)
    found = jax.device_get(weight_pairs(weights, features(), **how))
    expected = by_hand(weights, case.cfg.block)
    scale = np.abs(expected).max()
    for i, sign in enumerate((1, -1)):
        best = np.sort(sign * expected.ravel())[::-1][:TOP]
        within(f"{house}: best", sign * found.value[i], best, VALUE, scale)
        at = expected[found.row[i], found.column[i]]
        within(f"{house}: where", at, found.value[i], VALUE, scale)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("inside", [True, False], ids=["set_mesh", "no context"])
def test_sharded_over_the_dictionary(types, inside):
    """Two-stage top-k over 4 devices, with features that they do not divide... and that they do."""
    case = tiny.case("llama")
    weights, _, _ = case.block(1)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(types,) * 2)
    how = dict(head=HEAD, distance=DISTANCE, scales=SCALES, top=TOP, cfg=case.cfg.block)
    for n in (M, M - 3):
        expected = weight_pairs(weights, features()[:n], **how)
        spec = PartitionSpec("model") if n % 4 == 0 else PartitionSpec()
        placed = jax.device_put(features()[:n], NamedSharding(mesh, spec))
        if inside:
            with jax.set_mesh(mesh):
                found = weight_pairs(shard(weights, mesh), placed, **how, mesh=mesh)
        else:
            found = weight_pairs(shard(weights, mesh), placed, **how, mesh=mesh)
        within("values", found.value, expected.value, VALUE, np.abs(expected.value).max())
        np.testing.assert_array_equal(found.row, expected.row)
        np.testing.assert_array_equal(found.column, expected.column)

"""The stream of activations against the forward pass, position by position."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from tiny import within
from training import ROW, SETTINGS

from qkattr.model.transformer import forward
from qkattr.sharding import make_mesh, shard
from qkattr.train.config import TrainConfig
from qkattr.train.stream import Stream

#: Batched in another way.
SAME = 2e-5


def stream_of(small, rows, mesh=None, **changes):
    cfg = TrainConfig(**{**SETTINGS, **changes})
    stream = Stream(shard(small.params, mesh), rows, small.config, cfg, mesh)
    stream.measure()
    return stream


def every_position(small, rows):
    """`[rows, T - 1, L, D]`: all activations but the first of each row."""
    kept = []
    for row in rows:
        _, trace = forward(small.params, jnp.asarray(row, jnp.int32), cfg=small.config)
        kept.append(np.asarray(trace.boundaries)[1:, 1:].swapaxes(0, 1))
    return np.stack(kept)


def found(sought, among) -> np.ndarray:
    """For each row of `sought` the index of the nearest row of `among`, which must be it."""
    distance = np.abs(sought[:, None] - among[None]).max(-1)
    at = distance.argmin(1)
    assert distance[np.arange(len(sought)), at].max() < 1e-3
    return at


def test_a_pass_shows_every_position_once_and_scaled(small, rows):
    few = rows[:8]
    stream = stream_of(small, few, buffer=4)
    every = every_position(small, few).reshape(-1, small.config.n_blocks, small.config.d_model)
    scale = np.asarray(stream.scale)
    seen = []
    for step in range(2 * stream.cfg.batches):
        x, _ = stream.batch(step)
        at = found(np.asarray(x[0]) / scale[0], every[:, 0])
        for b in range(small.config.n_blocks):
            within("activations", x[b], every[at, b] * scale[b], SAME, np.abs(x[b]).max())
        seen.extend(at)
    assert sorted(seen) == list(range(8 * (ROW - 1)))
    assert seen != sorted(seen)


def test_the_scale_brings_the_mean_norm_to_sqrt_d(small, rows):
    stream = stream_of(small, rows)
    x, weight = stream._buffer.x_LBD * stream.scale[:, None, None], stream._buffer.weight_LB
    norm = (jnp.linalg.norm(x, axis=-1) * weight).sum(1) / weight.sum(1)
    within("mean norm", norm, small.config.d_model**0.5, 1e-5, small.config.d_model**0.5)


def test_any_step_can_be_made_again(small, rows):
    one = stream_of(small, rows)
    batches = [one.batch(step) for step in range(7)]
    two = stream_of(small, rows)
    for step in (6, 1, 3):
        np.testing.assert_array_equal(two.batch(step)[0], batches[step][0])
    other = stream_of(small, rows, seed=4)
    assert np.abs(np.asarray(other.batch(0)[0] - batches[0][0])).max() > 0.1


def test_massive_positions_are_left_out_where_they_are_massive(small, rows):
    """By a loop: norm over 10 times the lower median of the row's positions after the first."""
    params = small.params
    embed = np.array(params.embed_VD)
    embed[7] *= 1000.0  # a token whose residual dwarfs the others
    loud = dataclasses.replace(params, embed_VD=jnp.asarray(embed))
    few = np.array(rows[:4])
    few[1, 5] = few[2, 9] = 7
    stream = Stream(loud, few, small.config, TrainConfig(**SETTINGS))
    stream.measure()
    buffer, order = stream._buffer, stream._rows(0)
    expected = np.ones((small.config.n_blocks, 4, ROW - 1))
    for i, row in enumerate(order):
        _, trace = forward(loud, jnp.asarray(row, jnp.int32), cfg=small.config)
        norm = np.linalg.norm(np.asarray(trace.boundaries)[1:, 1:], axis=-1)
        median = np.sort(norm, axis=1)[:, (ROW - 2) // 2]
        expected[:, i] = norm <= 10 * median[:, None]
    np.testing.assert_array_equal(buffer.weight_LB, expected.reshape(len(expected), -1))
    assert 0 < (expected == 0).sum() < 20


def test_on_a_mesh_the_batches_are_the_same(small, rows):
    alone, shared = stream_of(small, rows), stream_of(small, rows, make_mesh(4, 2))
    for step in (0, 3):
        for one, two in zip(alone.batch(step), shared.batch(step), strict=True):
            within("batch", one, two, SAME, float(jnp.abs(one).max()))

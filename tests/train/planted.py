"""Data made from a known sparse dictionary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qkattr.train.config import TrainConfig
from qkattr.train.sae import init_sae
from qkattr.train.step import init_state, train_step

FEATURES, DIMS, ACTIVE, BATCH = 256, 64, 6, 256


def dictionary(key):
    """Unit rows `[FEATURES, DIMS]`."""
    rows = jax.random.normal(key, (FEATURES, DIMS))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def sample(key, truth):
    """`[BATCH, DIMS]` positions of ACTIVE features each, with norm sqrt(DIMS) on average."""
    which, size = jax.random.split(key)
    scores = jax.random.uniform(which, (BATCH, FEATURES))
    index = jax.lax.top_k(scores, ACTIVE)[1]
    value = 1 + jax.random.uniform(size, (BATCH, ACTIVE))
    x = jnp.einsum("BA,BAD->BD", value, truth[index])
    return x * jnp.sqrt(DIMS) / jnp.linalg.norm(x, axis=1).mean()


def recovered(truth, found) -> float:
    """The share of true rows that some found row matches with cosine 0.95."""
    found = found / jnp.linalg.norm(found, axis=1, keepdims=True)
    return float(((truth @ found.T).max(1) >= 0.95).mean())


def train(cfg: TrainConfig, truth, seed: int = 0):
    """The rows that a run over planted data finds."""
    sae = init_sae(jax.random.key(seed), jnp.zeros(DIMS), cfg=cfg)
    state = init_state(jax.tree.map(lambda a: a[None], sae), cfg=cfg)
    draw = jax.jit(lambda i: sample(jax.random.fold_in(jax.random.key(7), i), truth))
    for i in range(cfg.steps):
        state, seen = train_step(state, draw(i)[None], jnp.ones((1, BATCH)), cfg=cfg, at_once=False)
    return state, seen

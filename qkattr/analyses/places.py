"""What is computed at chosen places (block, head, query, key) of a subject, in one call each.

Everything comes back on the host. The number of places is padded to a bucket, so that other numbers
meet compiled code. Axes: P places, L block, N heads, S key position, A and C components.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from qkattr.graph import effects as graph_effects
from qkattr.kinds import Place
from qkattr.model.transformer import block
from qkattr.qk.effects import pair_effects
from qkattr.qk.table import Moved
from qkattr.qk.terms import QKTerms, qk_terms_many
from qkattr.sharding import bucket
from qkattr.subject import MainTarget, Subject


def terms_at(subject: Subject, places: Sequence[Place] | np.ndarray) -> QKTerms:
    """The terms of P places, with a leading axis P."""
    terms = qk_terms_many(
        subject.bundle.params.blocks,
        subject.boundaries,
        subject.components,
        _padded(places),
        cfg=subject.bundle.config.block,
        precision=subject.precision,
    )
    return jax.tree.map(lambda a: a[: len(places)], jax.device_get(terms))


def attention_at(subject: Subject, query: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Every head's score and attention at one (query, key): two arrays `[L, N]`."""
    score, probability = _scores_at(
        subject.bundle.params.blocks,
        subject.boundaries,
        query,
        key,
        cfg=subject.bundle.config.block,
    )
    return np.asarray(score), np.asarray(probability)


@partial(jax.jit, static_argnames=("cfg",))
def _scores_at(blocks, boundaries, query, key, *, cfg):
    def one(inputs):
        weights, x = inputs
        _, seen = block(weights, x, cfg=cfg)
        return seen.scores_NTS[:, query, key], seen.pattern_NTS[:, query, key]

    return jax.lax.map(one, (blocks, boundaries[:-1]))


def effects_at(
    subject: Subject, target: MainTarget, places: Sequence[Place]
) -> graph_effects.PlaceEffects:
    """Effects on a target, and its derivatives; padding is still there."""
    return jax.device_get(
        graph_effects.effects_at(
            subject.bundle.params.blocks,
            subject.boundaries,
            subject.components,
            target.covector[:, None],
            _padded(places),
            cfg=subject.bundle.config.block,
            linearisation=target.linearisation,
            precision=subject.precision,
        )
    )


def masking_at(subject: Subject, target: MainTarget, query: int, key: int) -> np.ndarray:
    """What masking each head at one (query, key) takes from a target, `[L, N]`."""
    return np.asarray(
        graph_effects.masking_at(
            subject.bundle.params.blocks,
            subject.boundaries,
            target.live,
            np.int32(query),
            np.int32(key),
            cfg=subject.bundle.config.block,
            precision=subject.precision,
        )
    )


def moved_at(subject: Subject, places: Sequence[Place]) -> list[Moved | None]:
    """What P places do to the target of the trace; None where nothing was traced."""
    target = subject.target
    if target is None:
        return [None] * len(places)
    at = effects_at(subject, target, places)
    pairs = pair_effects(
        subject.bundle.params.blocks,
        subject.boundaries,
        subject.components,
        _padded(places),
        at.derivative,
        cfg=subject.bundle.config.block,
        precision=subject.precision,
    )
    head, derivative = at.head[:, 0].sum(-1), at.derivative[:, 0]
    over_keys = np.asarray(pairs.over_keys)[:, 0]
    return [
        Moved(target.name, float(head[i]), float(derivative[i, key]), over_keys[i])
        for i, (_, _, _, key) in enumerate(places)
    ]


def _padded(places: Sequence[Place] | np.ndarray) -> np.ndarray:
    return np.resize(np.asarray(places, np.int32), (bucket(len(places), smallest=1), 4))

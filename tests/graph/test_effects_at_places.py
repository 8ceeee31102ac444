"""Effects at chosen places: by source component, and of pairs of components in a head's score."""

# ruff: noqa: F811 (fixtures of another module)
from __future__ import annotations

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny
from effects_tried import (  # noqa: F401
    EFFECT,
    PAIR,
    SAME,
    Tried,
    largest,
    run,
    seen_of,
    targets_of,
    tried,
)
from qk_places import FOUR
from tiny import within

from qkattr.graph.effects import effects_at
from qkattr.qk.effects import pair_effects
from qkattr.qk.terms import qk_terms

PLACES = np.array([[0, 0, 5, 3], [1, 2, 8, 8], [2, 3, 4, 3], [2, 1, 8, 7]])


def at_places(tried: Tried):
    return jax.device_get(effects_at(
        tried.case.params.blocks, tried.case.trace.boundaries, tried.case.components,
        tried.found.covector, PLACES, cfg=tried.case.cfg.block, linearisation=tried.linearisation,
    ))  # fmt: skip


def test_places_split_a_head_effect_by_source(tried):
    at = at_places(tried)
    with jax.enable_x64(True):
        for i, (b, n, t, s) in enumerate(PLACES):
            head = tried.found.head[b, :, n, t, s]
            size = largest(tried.found.head[b])[:, 0, 0, 0]
            within("sum over components", at.head[i].sum(-1), head, SAME, size)
            mask = jnp.zeros(tried.seen[b].pattern.shape).at[n, t, s].set(1.0)
            parts = jax.tree.map(lambda a, b=b: a[b], tried.case.components)
            vectors = np.asarray(parts.vectors()[s], np.float64)
            expected = np.einsum("RD,CD->RC", tried.only(b, mask)[:, s], vectors)
            within("by component", at.head[i], expected, EFFECT, np.maximum(
                size[:, None], np.abs(expected).max(1, keepdims=True)
            ))  # fmt: skip
            expected = tried.found.derivative[b, :, n, t]
            size = largest(tried.found.derivative[b])[:, :, 0, 0]
            within("derivative", at.derivative[i], expected, SAME, size)


def same_slots(parts, s: int, c: int, other: int) -> list[int]:
    """The slots of another position that hold the same component."""
    kind, index = np.asarray(parts.kind), np.asarray(parts.index)
    here = (kind[s, c], index[s, c])
    return [i for i in range(kind.shape[1]) if (kind[other, i], index[other, i]) == here]


@pytest.mark.parametrize("house", [*FOUR, "olmo2"])
def test_pair_effects_are_terms_times_autodiffs_derivative(house):
    """With every term of NumPy's, at this key and over all keys that the head sees."""
    case = tiny.case(house)
    targets, seen = targets_of(case), seen_of(house)
    tried = Tried(case, targets, "half", run(case, targets, "half"), seen)
    at = at_places(tried)
    inputs = case.params.blocks, case.trace.boundaries, case.components, PLACES, at.derivative
    found = jax.device_get(pair_effects(*inputs, cfg=case.cfg.block))
    for i, (b, n, t, s) in enumerate(PLACES):
        weights, _, parts = case.block(b)
        with jax.enable_x64(True):
            slope = tried.derivative(b, "scores", jnp.asarray(seen[b].scores))[:, n, t]
        vectors = np.asarray(parts.vectors())
        how = weights, seen[b], case.cfg.block
        q = naive.qk_vectors(*how, vectors[t], n, t, "query")
        over = np.zeros((len(slope), len(q), len(q)))
        for key in range(t + 1):
            k = naive.qk_vectors(*how, vectors[key], n, key, "key")
            terms = case.cfg.block.scale * q @ k.T
            if key == s:
                here = slope[:, s, None, None] * terms
                total = slope[:, s] * seen[b].scores[n, t, s]
            for c in range(len(q)):
                matched = terms[:, same_slots(parts, s, c, key)].sum(1)
                over[:, :, c] += slope[:, key, None] * matched
        size = np.maximum(largest(here), largest(over))
        within("here", found.here[i], here, PAIR, size)
        within("over keys", found.over_keys[i], over, PAIR, size)
        within("sum", found.here[i].sum((1, 2)), total, PAIR, size[:, 0, 0])
        library = qk_terms(*case.block(b), head=n, query=t, key=s, cfg=case.cfg.block).terms
        within(
            "terms", found.here[i], at.derivative[i][:, s, None, None] * library[None], SAME, size
        )


def test_a_match_that_is_equal_at_all_keys_moves_nothing():
    """The constants of W_Q with those of W_K in a model without rotary embedding: at a boundary
    without a dictionary the bias slots hold nothing else."""
    case, (b, n, t, s) = tiny.case("gpt2"), (2, 0, 8, 7)
    derivative = run(case, targets_of(case)).derivative[b, :, n, t]
    inputs = case.params.blocks, case.trace.boundaries, case.components
    found = pair_effects(*inputs, np.array([[b, n, t, s]]), derivative[None], cfg=case.cfg.block)
    bias = case.components.n_slots - 2
    here = np.asarray(found.here[0, :, bias, bias])
    assert (here[:2] != 0).all()
    size = np.abs(derivative).max() * np.abs(here[0] / derivative[0, s])
    within("over all keys", found.over_keys[0, :, bias, bias], 0.0, SAME, size)

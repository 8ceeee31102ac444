"""All marginals: those of the terms of every place, and nothing where a head does not see."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from qk_places import FOUR
from tiny import within

from qkattr.kinds import Kind
from qkattr.qk.marginals import block_marginals, largest
from qkattr.qk.terms import qk_terms

#: Of the head's largest score: sums of the same terms, in another order.
SUM = 2e-5


@pytest.mark.parametrize("n_strips", [1, 4])
@pytest.mark.parametrize("house", FOUR)
def test_marginals_are_those_of_the_terms(house, n_strips):
    case = tiny.case(house)
    for b in range(tiny.L):
        weights, x, parts = case.block(b)
        found = jax.device_get(
            block_marginals(weights, x, parts, n_strips=n_strips, cfg=case.cfg.block)
        )
        scale, head = np.abs(found.score).max(), b % tiny.N
        for t in range(len(x)):
            for s in range(len(x)):
                sides = (
                    (found.query_value, found.query_slot), (found.key_value, found.key_slot)
                )  # fmt: skip
                sides = [(value[head, :, t, s], slot[head, :, t, s]) for value, slot in sides]
                if s > t or t - s >= int(weights.window):
                    assert all((v == 0).all() and (i == -1).all() for v, i in sides)
                    continue
                qk = qk_terms(weights, x, parts, head=head, query=t, key=s, cfg=case.cfg.block)
                for every, (value, slot) in zip(
                    (qk.query_marginals, qk.key_marginals), sides, strict=True
                ):
                    every = np.asarray(every)
                    best = np.sort(np.abs(every))[::-1][: len(value)]
                    within(f"{house}: largest", np.abs(value), best, SUM, scale)
                    at = np.where(slot >= 0, every[slot], 0.0)
                    within(f"{house}: where", at, value, SUM, scale)
        np.testing.assert_allclose(found.pattern, case.trace.patterns[b], atol=1e-6)


def test_all_of_them_sum_to_the_score():
    case = tiny.case("gpt2")
    weights, x, parts = case.block(1)
    every = parts.n_slots
    found = jax.device_get(block_marginals(weights, x, parts, top=every, cfg=case.cfg.block))
    seen = np.tril(np.ones((len(x), len(x)), bool))
    scale = np.abs(found.score).max()
    for value in (found.query_value, found.key_value):
        within("sum", value.sum(1)[:, seen], found.score[:, seen], SUM, scale)


@pytest.mark.parametrize("planes", [1, 3, 34, 70, 130])
def test_largest_is_a_sort_by_magnitude(planes):
    values = np.random.default_rng(planes).normal(size=(planes, 3, 5)).astype(np.float32)
    value, plane = jax.jit(largest, static_argnums=1)(values, 5)
    order = np.argsort(-np.abs(values), axis=0, kind="stable")[:5]
    n = len(order)
    np.testing.assert_array_equal(plane[:n], order)
    np.testing.assert_array_equal(value[:n], np.take_along_axis(values, order, 0))
    assert (np.asarray(value[n:]) == 0).all()


def test_padding_of_a_prompt_has_none():
    case = tiny.case("everything")
    ids = tiny.tokens()
    padded = tiny.case_of(
        case.params, case.cfg, np.pad(ids, (0, 3)), tiny.dictionaries(), n_real=len(ids)
    )
    weights, x, parts = padded.block(1)
    found = jax.device_get(block_marginals(weights, x, parts, cfg=case.cfg.block))
    assert (np.asarray(parts.kind[len(ids) :]) == Kind.NONE).all()
    assert (found.query_slot[:, :, len(ids) :] == -1).all()
    assert (found.key_slot[:, :, len(ids) :] == -1).all()

"""The strongest pairs: those of the dense tensor, values and places, ties included."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from qk_places import FOUR
from tiny import within
from tracing import traced_at_most

from qkattr.kinds import Kind
from qkattr.qk.pairs import search_slots, strongest, top_pairs
from qkattr.qk.terms import qk_terms

#: Of the largest |term| of a head: products of the same vectors in tiles and one place at a time.
TERM = 2e-6
TOP = 30


def dense(rows, columns, row_at, column_at, window, sign):
    """`(value, row, column)` of the strongest by a stable sort of everything, in NumPy."""
    values = rows.astype(np.float64) @ columns.astype(np.float64).T
    back = row_at[:, None] - column_at[None]
    values = np.where((back >= 0) & (back < window), values, 0.0)
    order = np.argsort(-sign * values.ravel(), kind="stable")[:TOP]
    order = order[sign * values.ravel()[order] > 0]
    return values.ravel()[order], *np.unravel_index(order, values.shape)


@functools.cache
def jitted(tile):
    return jax.jit(functools.partial(strongest, top=TOP, tile=tile))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.sampled_from([(5, 3), (40, 70), (97, 33)]),
    tile=st.sampled_from([4, 32, None]),
    window=st.sampled_from([1, 4, 10**6]),
    alike=st.booleans(),
)
def test_equals_the_dense_tensor(seed, sizes, tile, window, alike):
    """With small integers most values are tied, and all sums are exact."""
    rng = np.random.default_rng(seed)
    draw = (lambda n: rng.integers(-2, 3, (n, 3))) if alike else (lambda n: rng.normal(size=(n, 3)))
    rows, columns = (draw(n).astype(np.float32) for n in sizes)
    row_at, column_at = (np.sort(rng.integers(0, 8, n)).astype(np.int32) for n in sizes)
    where = dict(row_position=row_at, column_position=column_at, window=window)
    found = jitted(tile)(rows, columns, **where)
    for i, sign in enumerate((1, -1)):
        value, row, column = dense(rows, columns, row_at, column_at, window, sign)
        n = len(value)
        within("values", found.value[i][:n], value, TERM, max(1.0, np.abs(value).max(initial=0)))
        assert (np.asarray(found.value[i][n:]) == 0).all()
        np.testing.assert_array_equal(found.row[i][:n], row)
        np.testing.assert_array_equal(found.column[i][:n], column)


def every_term(case, b, head):
    """All terms of a head from `qk_terms`, place by place: where, `(t, a, s, c)`, and values."""
    weights, x, parts = case.block(b)
    at, values = [], []
    for t in range(len(x)):
        for s in range(max(0, t - int(weights.window) + 1), t + 1):
            qk = qk_terms(weights, x, parts, head=head, query=t, key=s, cfg=case.cfg.block)
            terms = np.asarray(qk.terms)
            a, c = np.nonzero(terms)
            at += [(t, i, s, j) for i, j in zip(a.tolist(), c.tolist(), strict=True)]
            values.append(terms[a, c])
    return at, np.concatenate(values)


@pytest.mark.parametrize("house", FOUR)
def test_top_pairs_are_those_of_all_places(house):
    case = tiny.case(house)
    slots = search_slots(case.params.blocks, case.components)
    for b in range(tiny.L):
        found = jax.device_get(top_pairs(*case.block(b), slots[b], top=12, cfg=case.cfg.block))
        head = b % tiny.N
        at, values = every_term(case, b, head)
        known, scale = dict(zip(at, values, strict=True)), np.abs(values).max()
        for i, sign in enumerate((1, -1)):
            best = np.sort(sign * values)[::-1][:12]
            within(f"{house}: best", sign * found.value[head, i], best, TERM, scale)
            names = ("query", "query_slot", "key", "key_slot")
            places = list(zip(*(getattr(found, n)[head, i].tolist() for n in names), strict=True))
            there = [known[place] for place in places]
            within(f"{house}: where", there, found.value[head, i], TERM, scale)
            t, s = found.query[head, i], found.key[head, i]
            trace = case.trace
            within("score", found.score[head, i], trace.scores[b, head, t, s], 1e-6, scale)
            within("attention", found.probability[head, i], trace.patterns[b, head, t, s], 1e-6)


def test_only_the_kinds_asked_for_are_searched():
    case = tiny.case("llama")
    slots = search_slots(case.params.blocks, case.components, (Kind.FEATURE,))
    weights, x, parts = case.block(1)
    found = jax.device_get(top_pairs(weights, x, parts, slots[1], top=8, cfg=case.cfg.block))
    kind, some = np.asarray(parts.kind), found.value != 0
    assert some.any()
    assert (kind[found.query, found.query_slot][some] == Kind.FEATURE).all()
    assert (kind[found.key, found.key_slot][some] == Kind.FEATURE).all()
    every = np.asarray(case.components.kind[:-1])
    assert (slots >= 0).sum() == (every == Kind.FEATURE).sum()


def test_one_program_for_prompts_of_one_size():
    case = tiny.case("llama")
    slots = search_slots(case.params.blocks, case.components)
    once = traced_at_most(1, top_pairs, "top", "cfg", "precision")
    for b in (0, 2):
        once(*case.block(b), slots[b], top=3, cfg=case.cfg.block)

"""The QK analyses on the real model: everything at once is what its places are one by one."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import real
from tiny import within

from qkattr.qk.distance import distance_profile
from qkattr.qk.marginals import block_marginals
from qkattr.qk.mechanisms import decompose_terms
from qkattr.qk.pairs import search_slots, top_pairs
from qkattr.qk.terms import qk_terms_many

BLOCK, HEAD, TOP = 23, 2, 30
#: Of the head's largest |score|: float32 sums of the same products, in another order.
SUM = 2e-5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def case(bundle):
    return real.case(bundle, "sally")


@pytest.fixture(scope="module")
def terms(case):
    """Of one head at every place, `[T, S, A, C]`, zeros where it does not see."""
    n = len(case.tokens)
    at = [(t, s) for t in range(n) for s in range(t + 1)]
    places = np.array([(BLOCK, HEAD, t, s) for t, s in at], np.int32)
    blocks, boundaries = case.params.blocks, case.trace.boundaries
    found = qk_terms_many(blocks, boundaries, case.components, places, cfg=case.cfg.block)
    slots = case.components.n_slots
    terms = np.zeros((n, n, slots, slots))
    terms[tuple(np.array(at).T)] = found.terms
    return terms


def test_marginals(case, terms):
    found = jax.device_get(block_marginals(*case.block(BLOCK), cfg=case.cfg.block))
    scale = np.abs(found.score[HEAD]).max()
    sides = ((terms.sum(3), found.query_value, found.query_slot),
             (terms.sum(2), found.key_value, found.key_slot))  # fmt: skip
    for every, value, slot in sides:
        value, slot = (np.moveaxis(a[HEAD], 0, -1) for a in (value, slot))
        best = -np.sort(-np.abs(every), axis=-1)[..., : value.shape[-1]]
        within("real: largest marginals", np.abs(value), best, SUM, scale)
        where = np.where(slot >= 0, np.take_along_axis(every, np.maximum(slot, 0), -1), 0.0)
        within("real: where", where, value, SUM, scale)


def test_top_pairs(case, terms):
    slots = search_slots(case.params.blocks, case.components)[BLOCK]
    found = jax.device_get(top_pairs(*case.block(BLOCK), slots, top=TOP, cfg=case.cfg.block))
    scale = np.abs(terms).max()
    names = ("query", "key", "query_slot", "key_slot")
    for i, sign in enumerate((1, -1)):
        best = np.sort((sign * terms).ravel())[::-1][:TOP]
        within("real: top pairs", sign * found.value[HEAD, i], best, 2e-6, scale)
        at = tuple(getattr(found, name)[HEAD, i] for name in names)
        within("real: where they are", terms[at], found.value[HEAD, i], 2e-6, scale)


def test_mechanisms_and_distances(case, terms):
    query, key = 14, 6
    here, scores = terms[query, key], case.trace.scores
    found = decompose_terms(here)
    parts = sum(found.part(i) for i in range(len(found.sigma_I)))
    within("real: parts", parts, here, 1e-12, np.abs(here).max())
    carried, score = found.carried_I.sum(), scores[BLOCK, HEAD, query, key]
    within("real: carried", carried, score, SUM, np.abs(here).sum())
    pairs = np.argwhere(np.abs(here) >= np.sort(np.abs(here).ravel())[-8])
    profile = distance_profile(
        *case.block(BLOCK), pairs, head=HEAD, query=query, key=key, distances=16,
        cfg=case.cfg.block,
    )  # fmt: skip
    true = here[tuple(pairs.T)]
    within("real: distance", profile.values_DP[query - key], true, SUM, np.abs(here).max())

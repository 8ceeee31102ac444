"""Mechanisms, distance profiles and group tables: parts sum to what they are parts of."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from qk_places import FOUR, places
from tiny import within

from qkattr.errors import InputError
from qkattr.kinds import Kind
from qkattr.model.transformer import block
from qkattr.qk.distance import distance_profile
from qkattr.qk.groups import group_name, group_of_features, group_table
from qkattr.qk.mechanisms import decompose_terms
from qkattr.qk.terms import qk_terms

#: float64 SVD of float32 terms, against their sum.
PARTS = 1e-12
#: Of the largest |term|: one float32 dot product, rotated another way.
TERM = 2e-5


@pytest.fixture(scope="module", params=FOUR)
def case(request):
    return tiny.case(request.param)


@pytest.fixture(scope="module", params=range(tiny.L), ids=lambda b: f"block{b}")
def opened(request, case):
    weights, x, parts = case.block(request.param)
    return weights, x, parts, case.cfg.block


def test_mechanisms_sum_to_the_matrix_and_the_score(opened):
    weights, x, parts, cfg = opened
    for head, query, key in places(weights, len(x))[:4]:
        qk = qk_terms(weights, x, parts, head=head, query=query, key=key, cfg=cfg)
        terms = np.asarray(qk.terms, np.float64)
        found = decompose_terms(terms)
        size = np.abs(terms).sum()
        whole = sum(found.part(i) for i in range(len(found.sigma_I)))
        within("parts", whole, terms, PARTS, size)
        within("carried", found.carried_I.sum(), terms.sum(), PARTS, size)
        assert 1 <= found.rank <= min(terms.shape) and 0 <= found.cross <= 1
        assert (np.diff(found.sigma_I) <= 0).all()


def test_two_planted_mechanisms_are_two():
    """Two blocks that do not mix: rank 2, nothing across, each component where it was put."""
    terms = np.zeros((6, 5))
    terms[:3, :2] = np.outer([1, 2, -1], [2, 1])
    terms[3:, 2:] = np.outer([2, 1, 1], [1, -2, 1])
    found = decompose_terms(terms)
    assert 1.9 < found.rank < 2.0 and found.cross == 0
    assert len(set(found.of_query_A[:3])) == 1 and len(set(found.of_query_A[3:])) == 1
    assert found.of_query_A[0] != found.of_query_A[3]
    assert (found.of_key_C[:2] == found.of_query_A[0]).all()
    within("alone", decompose_terms(np.outer([1, 2], [3, -1, 0])).rank, 1.0, 1e-9)


def test_nothing_is_one_mechanism_of_nothing():
    found = decompose_terms(np.zeros((3, 4)))
    assert found.cross == 0 and not found.carried_I.any() and np.isfinite(found.rank)


def test_a_profile_holds_the_true_term_and_score(opened):
    weights, x, parts, cfg = opened
    for head, query, key in places(weights, len(x)):
        qk = qk_terms(weights, x, parts, head=head, query=query, key=key, cfg=cfg)
        slots = np.argwhere(np.abs(qk.terms) >= np.sort(np.abs(qk.terms).ravel())[-6])[:6]
        profile = distance_profile(
            weights, x, parts, slots, head=head, query=query, key=key, distances=len(x), cfg=cfg
        )
        largest = float(np.abs(qk.terms).max())
        here = query - key
        true = np.asarray(qk.terms)[tuple(slots.T)]
        within("true distance", profile.values_DP[here], true, TERM, largest)
        within("score", profile.score_D[here], qk.score, TERM, float(np.abs(qk.terms).sum()))


def test_a_profile_is_the_term_with_the_key_moved(case):
    """Moving query and key together changes nothing; further apart, by NumPy's rotation."""
    weights, x, parts = case.block(1)
    cfg, pairs = case.cfg.block, np.array([[0, 0], [1, 2]])
    head, query, key = 1, 5, 4
    found = distance_profile(
        weights, x, parts, pairs, head=head, query=query, key=key, distances=12, cfg=cfg
    )
    if weights.inv_freq.shape[-1] == 0:
        spread = np.ptp(np.asarray(found.values_DP), axis=0)
        within("flat without rotary", spread, 0.0, 1e-6)
        return
    moved = jax.tree.map(lambda a: a, weights).replace(
        inv_freq=weights.inv_freq * 3.0  # distance 1 turns as distance 3 does
    )
    turned = distance_profile(
        moved, x, parts, pairs, head=head, query=query, key=key, distances=4, cfg=cfg
    )
    scale = float(np.abs(found.values_DP).max())
    within("three at once", turned.values_DP, np.asarray(found.values_DP)[::3][:4], 1e-4, scale)


def test_group_tables_sum_to_the_score(opened):
    weights, x, parts, cfg = opened
    head, query, key = places(weights, len(x))[-1]
    qk = jax.device_get(qk_terms(weights, x, parts, head=head, query=query, key=key, cfg=cfg))
    features = qk.query_index[qk.query_kind == Kind.FEATURE].tolist()
    groups = group_of_features({"first": {7: features[:2]}, "rest": {7: features[2:4]}}, 7)
    names = lambda kind, index: [
        group_name(Kind(k).label, int(i), groups) for k, i in zip(kind, index, strict=True)
    ]
    query_names, key_names = names(qk.query_kind, qk.query_index), names(qk.key_kind, qk.key_index)
    sides = [(q, k) for q in query_names for k in key_names]
    rows, columns, table = group_table(
        qk.terms.ravel(), [q for q, _ in sides], [k for _, k in sides]
    )
    within("table", table.sum(), qk.score, 2e-5, float(np.abs(qk.terms).sum()))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            direct = sum(
                qk.terms[a, c]
                for a, q in enumerate(query_names)
                for c, k in enumerate(key_names)
                if (q, k) == (row, column)
            )
            within("cell", table[i, j], direct, 1e-5, max(1.0, np.abs(qk.terms).sum()))
    if features:
        assert "first" in rows


def test_a_feature_in_two_groups_is_refused():
    with pytest.raises(InputError, match=r"feature 3:5 is in the groups 'a' and 'b'"):
        group_of_features({"a": {3: [5]}, "b": {3: [5, 6]}}, 3)


def test_places_cover_windows(case):
    """The fixture's block 1 may have a window: its places stay inside."""
    weights, x, _ = case.block(1)
    _, seen = block(weights, x, cfg=case.cfg.block)
    for head, query, key in places(weights, len(x)):
        assert float(seen.pattern_NTS[head, query, key]) > 0

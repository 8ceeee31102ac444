"""Competition: rows sum to the log-odds that the model's own pattern has, and are its terms."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import real
import tiny
from qk_places import FOUR, log_sum_exp, places
from tiny import within

from qkattr.model.transformer import block
from qkattr.qk.terms import qk_terms
from qkattr.qk.why import FORMS, competition

#: Absolute, as asked: sums of some 1e4 float32 rows.
IDENTITY = 1e-4
#: Of the largest |row|: the weights against NumPy's.
ROW = 2e-5


def identities(parts):
    """A number for each component, the same for the same kind and index."""
    names = np.stack([np.asarray(parts.kind).ravel(), np.asarray(parts.index).ravel()], axis=1)
    found = np.unique(names, axis=0, return_inverse=True)[1]
    return found.reshape(parts.kind.shape).astype(np.int32)


def capped(raw, cfg):
    raw = np.asarray(raw, np.float64)
    return raw if cfg.softcap is None else cfg.softcap * np.tanh(raw / cfg.softcap)


def left_side(raw, weights, cfg, query, key, other, form):
    """`(value, entropy)` in float64, from the scores alone."""
    at = np.arange(len(raw))
    seen = (at <= query) & (query - at < int(weights.window))
    c = capped(raw, cfg)
    if form == "difference":
        return c[key] - c[other], 0.0
    rest = seen & (at != key) if form == "odds" else seen
    if not rest.any():
        return None
    p = np.exp(c[rest] - log_sum_exp(c[rest]))
    return c[key] - log_sum_exp(c[rest]), float(-(p * np.log(np.maximum(p, 1e-300))).sum())


@pytest.fixture(scope="module", params=FOUR)
def case(request):
    return tiny.case(request.param)


@pytest.fixture(scope="module", params=range(tiny.L), ids=lambda b: f"block{b}")
def opened(request, case):
    weights, x, parts = case.block(request.param)
    _, seen = block(weights, x, cfg=case.cfg.block)
    return weights, x, parts, case.cfg.block, np.asarray(seen.scores_NTS)


@pytest.mark.parametrize("form", FORMS)
def test_rows_sum_to_the_left_side_and_the_entropy(opened, form):
    weights, x, parts, cfg, scores = opened
    for head, query, key in places(weights, len(x)):
        other = min(key + 1, query)
        found = competition(
            weights,
            x,
            parts,
            identities(parts),
            head=head,
            query=query,
            key=key,
            other=other,
            form=form,
            cfg=cfg,
        )
        expected = left_side(scores[head, query], weights, cfg, query, key, other, form)
        if expected is None:  # a query that sees one key has no other to compete with
            assert form == "odds" and not np.isfinite(found.value)
            continue
        value, entropy = expected
        scale = max(1.0, float(np.abs(found.by_component_SC).sum()))
        within(f"{form}: sum - entropy", found.total - found.entropy, value, IDENTITY, scale)
        within(f"{form}: entropy", found.entropy, entropy, IDENTITY)
        within(f"{form}: value", found.value, value, IDENTITY, scale)


def test_rows_are_weighted_terms(opened):
    """Against `qk_terms` at every key, with NumPy's weights: order, sums, kinds."""
    weights, x, parts, cfg, scores = opened
    head, query = weights.wq_DNH.shape[1] - 1, len(x) - 1
    key = query - min(1, int(weights.window) - 1)
    identity = identities(parts)
    found = jax.device_get(
        competition(weights, x, parts, identity, head=head, query=query, key=key, top=40, cfg=cfg)
    )
    terms = np.stack(
        [
            np.asarray(qk_terms(weights, x, parts, head=head, query=query, key=s, cfg=cfg).terms)
            for s in range(len(x))
        ],
        axis=1,
    )
    raw = scores[head, query].astype(np.float64)
    at = np.arange(len(x))
    others = (at != key) & (query - at < int(weights.window))
    c = capped(raw, cfg)
    weight = np.where(others, -np.exp(c - log_sum_exp(c[others])), 0.0)
    weight[key] = 1.0
    rows = terms * (weight * c / raw)[:, None]
    largest = np.abs(rows).max()
    within("by key", found.by_key_S, rows.sum((0, 2)), ROW, np.abs(rows).sum((0, 2)).max())
    within("by query", found.by_query_A, rows.sum((1, 2)), ROW, np.abs(rows).sum())
    within("by component", found.by_component_SC, rows.sum(0), ROW, np.abs(rows).sum(0).max())
    for sign, listed in ((1, found.pushes), (-1, found.pulls)):
        ranked = np.sort((sign * rows).ravel())[::-1][:40]
        within("values", sign * listed.value, ranked, ROW, largest)
        theirs = rows[listed.query_slot, listed.key, listed.key_slot]
        within("where", listed.value, theirs, ROW, largest)
    net = np.zeros((rows.shape[0], identity.size))
    for s in range(rows.shape[1]):
        for c in range(rows.shape[2]):
            net[:, identity[s, c]] += rows[:, s, c]
    for sign, listed in ((1, found.net_pushes), (-1, found.net_pulls)):
        ranked = np.sort((sign * net).ravel())[::-1][:40]
        within("net values", sign * listed.value, ranked, ROW, np.abs(rows).sum((1, 2)).max())
    total = np.abs(found.by_kind_absolute).sum()
    within("kinds", found.by_kind.sum(), found.total, ROW, total)
    within("absolute", total, np.abs(rows).sum(), ROW, total)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sally", "mary"])
def test_on_the_real_model(bundle, name):
    case = real.case(bundle, name)
    for b, head in ((3, 1), (14, 5), (22, 8)):
        weights, x, parts = case.block(b)
        _, seen = block(weights, x, cfg=case.cfg.block)
        scores = np.asarray(seen.scores_NTS)
        for query in (len(x) - 1, len(x) - 3):
            for key in (0, query // 2, query):
                found = competition(
                    weights,
                    x,
                    parts,
                    identities(parts),
                    head=head,
                    query=query,
                    key=key,
                    cfg=case.cfg.block,
                )
                value, entropy = left_side(
                    scores[head, query], weights, case.cfg.block, query, key, 0, "odds"
                )
                within("real sum - entropy", found.total - found.entropy, value, IDENTITY)
                within("real entropy", found.entropy, entropy, IDENTITY)

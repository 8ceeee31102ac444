"""QK attributions: terms sum to the model's own score, for every head and every pair;
contrasts, marginals, edits.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import real
import tiny
import torch
from tiny import within
from tracing import traced_at_most
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qkattr.kinds import Kind
from qkattr.qk.terms import qk_terms, qk_terms_many
from qkattr.sources.components import decompose

SCORE = 2e-5  # of a head's largest |score|: float32 sums of some 1e3 terms, each 1e-7 of itself
TERM = 2e-5  # of the largest |term|: one float32 dot product, and the frozen scales
MANY = 1e-6  # the same program, mapped instead of called


@partial(jax.jit, static_argnames=("cfg", "sums"))
def every_pair(weights, x, parts, *, cfg, sums=False):
    """`qk_terms` at every (head, query, key), stacked `[N, T, T]`;
    with `sums`, only (sum of terms, score).
    """

    def one(head, query, key):
        qk = qk_terms(weights, x, parts, head=head, query=query, key=key, cfg=cfg)
        return (qk.terms.sum(), qk.score) if sums else qk

    at = jnp.arange(x.shape[0])
    keys = lambda head, query: jax.vmap(lambda key: one(head, query, key))(at)
    queries = lambda head: jax.vmap(lambda query: keys(head, query))(at)
    return jax.lax.map(queries, jnp.arange(weights.wq_DNH.shape[1]))


@pytest.fixture(scope="module", params=range(tiny.L), ids=lambda b: f"block{b}")
def expanded(request, case):
    """A block of a house: what it is, all of its terms, and the same block in NumPy."""
    weights, x, parts = case.block(request.param)
    cfg = case.cfg.block
    qk = jax.device_get(every_pair(weights, x, parts, cfg=cfg))
    return weights, parts, cfg, qk, naive.run_block(weights, x, cfg)


def visible_pairs(weights, n):
    return [(t, s) for t in range(n) for s in range(t + 1) if t - s < int(weights.window)]


def test_terms_sum_to_every_score(expanded):
    _, _, _, qk, seen = expanded
    causal = np.tril(np.ones(seen.scores.shape[1:]))
    largest = np.abs(seen.scores * causal).max((1, 2), keepdims=True)
    sums = qk.terms.sum((-1, -2))
    within("sum of terms - NumPy's score", sums * causal, seen.scores * causal, SCORE, largest)
    within("sum of terms - own score", sums * causal, qk.score * causal, SCORE, largest)


def test_marginals_are_row_and_column_sums(expanded):
    _, _, _, qk, _ = expanded
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), qk)
    rows, columns = jax.vmap(lambda one: (one.query_marginals, one.key_marginals))(flat)
    terms = np.asarray(flat.terms)
    within("query marginals", rows, terms.sum(2), MANY, np.abs(terms).sum((1, 2))[:, None])
    within("key marginals", columns, terms.sum(1), MANY, np.abs(terms).sum((1, 2))[:, None])


def naive_terms(weights, parts, seen, cfg, head):
    """`[T, S, A, C]` all terms of a head."""
    vectors = np.asarray(parts.vectors())
    at = range(len(vectors))
    q = np.stack([naive.qk_vectors(weights, seen, cfg, vectors[t], head, t, "query") for t in at])
    k = np.stack([naive.qk_vectors(weights, seen, cfg, vectors[s], head, s, "key") for s in at])
    return cfg.scale * np.einsum("tah,sch->tsac", q, k)


def others(seen, weights, cfg, head, t, s):
    """The pattern over the visible keys other than s."""
    keys = [j for j in range(t + 1) if t - j < int(weights.window) and j != s]
    return keys, naive.softmax(naive.cap(seen.scores[head, t, keys], cfg)) if keys else []


def test_terms_and_contrasts_equal_a_loop(expanded):
    weights, parts, cfg, qk, seen = expanded
    kind, index = np.asarray(parts.kind), np.asarray(parts.index)
    n_heads, n = seen.scores.shape[:2]
    for head in range(n_heads):
        terms = naive_terms(weights, parts, seen, cfg, head)
        marginals = terms.sum(3)
        contrast, query_contrast = np.zeros_like(terms), np.zeros_like(marginals)
        for t, s in visible_pairs(weights, n):
            keys, pattern = others(seen, weights, cfg, head, t, s)
            if not keys:
                continue
            contrast[t, s] = terms[t, s]
            query_contrast[t, s] = marginals[t, s]
            for j, p in zip(keys, pattern, strict=True):
                query_contrast[t, s] -= p * marginals[t, j]
                same = (kind[s][:, None] == kind[j]) & (index[s][:, None] == index[j])
                contrast[t, s] -= p * terms[t, j] @ (same & (kind[s] != Kind.NONE)[:, None]).T
        largest, at = np.abs(terms).max(), tuple(np.transpose(visible_pairs(weights, n)))
        within("terms", qk.terms[head][at], terms[at], TERM, largest)
        within("contrast", qk.contrast[head][at], contrast[at], TERM, largest)
        within(
            "query contrast",
            qk.query_contrast[head][at],
            query_contrast[at],
            TERM,
            np.abs(marginals).max(),
        )


def test_score_is_before_the_softcap(expanded):
    weights, _, cfg, qk, seen = expanded
    at = (slice(None), *np.transpose(visible_pairs(weights, seen.x.shape[0])))
    score = seen.scores[at]
    largest = np.maximum(np.abs(score).max(1, keepdims=True), 1)
    slope = np.ones_like(score) if cfg.softcap is None else 1 - np.tanh(score / cfg.softcap) ** 2
    within("score", qk.score[at], score, SCORE, largest)
    within("capped", qk.capped[at], naive.cap(score, cfg), SCORE, largest)
    within("slope", qk.slope[at], slope, SCORE, largest)
    within("probability", qk.probability[at], seen.pattern[at], SCORE, largest)


def test_bias_slot_is_left_out_where_it_holds_nothing(expanded):
    weights, parts, _, qk, _ = expanded
    constants = weights.norm_attn is not None and weights.norm_attn.bias is not None
    kind, bias = np.asarray(parts.kind), np.asarray(parts.bias)
    for t in range(len(kind)):
        used = np.r_[
            kind[t, :-2] != Kind.NONE, bias[t].any() or constants, kind[t, -1] != Kind.NONE
        ]
        expected_q, expected_k = used.copy(), used.copy()
        expected_q[-2] |= weights.bq_NH is not None
        expected_k[-2] |= weights.bk_KH is not None
        np.testing.assert_array_equal(qk.query_used[0, t, 0], expected_q)
        np.testing.assert_array_equal(qk.key_used[0, -1, t], expected_k)
        unused = np.asarray(qk.terms)[:, t][:, :, ~expected_q]
        assert not unused.any(), "a slot that is left out has terms"


def test_zeroing_one_feature_moves_the_score_by_its_key_marginal(case):
    """The feature leaves the residual read by W_K of one head; all scales stay:
    the score loses its marginal.
    """
    b, head = 1, tiny.N - 1
    weights, x, parts = case.block(b)
    cfg = case.cfg.block
    seen = naive.run_block(weights, x, cfg)
    kv, t = head // naive.group_of(weights), tiny.T - 1
    gain_k = naive.gain_of(weights.norm_k, kv)
    qk = jax.device_get(every_pair(weights, x, parts, cfg=cfg))
    vectors = np.asarray(parts.vectors(), np.float64)
    largest = np.abs(seen.scores[head, t]).max()
    moved = 0
    for s, c in np.argwhere(np.asarray(parts.kind) == Kind.FEATURE):
        raw = naive.f64(weights.wk_DKH[:, kv]).T @ seen.norm_attn[s] @ (seen.x[s] - vectors[s, c])
        raw += naive.f64(weights.wk_DKH[:, kv]).T @ naive.norm_constant(weights.norm_attn, tiny.D)
        raw += 0 if weights.bk_KH is None else naive.f64(weights.bk_KH[kv])
        size = len(raw)
        key = naive._head_matrix(gain_k, seen.head_k[head, s], s, weights.inv_freq, size) @ raw
        query = naive.qk_vectors(weights, seen, cfg, vectors[t], head, t, "query").sum(0)
        change = seen.scores[head, t, s] - cfg.scale * query @ key
        within(
            "score moves by the key marginal",
            qk.terms[head, t, s].sum(0)[c],
            change,
            SCORE,
            largest,
        )
        moved += 1
    assert moved > tiny.T


def test_a_term_that_is_equal_at_all_keys_has_no_contrast():
    """Without rotary, norm and sinks, b_dec gives every key the same bias component."""
    params, cfg = tiny.house("llama")
    weights = tiny.block_weights(params, 0).replace(norm_attn=None, inv_freq=jnp.zeros(0))
    x = np.random.default_rng(0).normal(size=(tiny.T, tiny.D)).astype(np.float32)
    parts = decompose(tiny.dictionary(0, activation="topk"), x, slots=8, sinks=False)
    qk = every_pair(weights, x, parts, cfg=cfg.block)
    at = np.tril_indices(tiny.T)
    bias = np.asarray(qk.terms)[..., -2][:, at[0], at[1]]
    assert np.abs(bias).max() > 0.01
    contrast = np.asarray(qk.contrast)[..., -2][:, at[0], at[1]]
    within("contrast of an equal term", contrast, 0.0, TERM, np.abs(bias).max())


def test_many_places_equal_one_at_a_time(case):
    places = np.array([(0, 0, 5, 2), (1, tiny.N - 1, 8, 4), (2, 1, 0, 0)])
    cfg = case.cfg.block
    many = qk_terms_many(
        case.params.blocks, case.trace.boundaries, case.components, places, cfg=cfg
    )
    many = jax.device_get(many)
    for i, (b, head, query, key) in enumerate(places):
        one = jax.device_get(qk_terms(*case.block(b), head=head, query=query, key=key, cfg=cfg))
        for got, expected in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
            scale = max(1.0, np.abs(np.asarray(expected, np.float64)).max())
            within("many places", got[i], expected, TERM, scale)


def test_places_are_traced_not_compiled():
    one = tiny.case("llama")
    weights, x, parts = one.block(1)
    once = traced_at_most(1, qk_terms, "cfg", "precision")
    for head, query, key in ((0, 3, 1), (3, 8, 8), (1, 5, 0)):
        once(weights, x, parts, head=head, query=query, key=key, cfg=one.cfg.block)


# The real model -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_terms_sum_to_every_score(real_case):
    """Every block, head, query and key of the prompt."""
    causal = np.tril(np.ones((1, *(len(real_case.tokens),) * 2)))
    for b in range(real_case.cfg.n_blocks):
        sums, scores = every_pair(*real_case.block(b), cfg=real_case.cfg.block, sums=True)
        captured = np.asarray(real_case.trace.scores[b]) * causal
        largest = np.abs(captured).max((1, 2), keepdims=True)
        within("real: sum of terms - captured score", sums * causal, captured, SCORE, largest)
        within("real: score - captured score", scores * causal, captured, SCORE, largest)


@pytest.mark.slow
@pytest.mark.parametrize("b", [0, 17, 29])
def test_real_terms_sum_to_the_scores_of_transformers(real_case, b):
    """Queries and keys from the modules of `transformers`,
    on the residual stream that the block read.
    """
    weights, x, parts = real_case.block(b)
    model = real.transformers_model()
    layer, n = model.model.layers[b], x.shape[0]
    with torch.no_grad():
        y = layer.input_layernorm(torch.tensor(np.asarray(x))[None])
        q = layer.self_attn.q_proj(y).view(1, n, 9, 64).transpose(1, 2)
        k = layer.self_attn.k_proj(y).view(1, n, 3, 64).transpose(1, 2)
        cos, sin = model.model.rotary_emb(y, torch.arange(n)[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k = k.repeat_interleave(3, dim=1)
        scores = (q @ k.transpose(2, 3))[0].numpy() * layer.self_attn.scaling
    causal = np.tril(np.ones((1, n, n)))
    sums, _ = every_pair(weights, x, parts, cfg=real_case.cfg.block, sums=True)
    largest = np.abs(scores * causal).max((1, 2), keepdims=True)
    within("real: sum of terms - transformers' q.k", sums * causal, scores * causal, SCORE, largest)

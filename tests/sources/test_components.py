"""Components: they sum to the residual stream,
and sinks, slots and embeddings are what they should be.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import within

from qkattr.kinds import Kind
from qkattr.sharding import bucket
from qkattr.sources import prompt
from qkattr.sources.components import decompose, find_slots, sink_positions
from qkattr.sources.dictionary import activations, encode
from qkattr.sources.prompt import decompose_prompt

SUM = 1e-5  # of the position's norm: one float32 subtraction and a sum over the slots


def summed(components):
    """`[L+1, T, D]` the slots, added up in float64."""
    vectors = jax.vmap(lambda one: one.vectors())(components)
    return np.asarray(vectors, np.float64).sum(2)


def check_sum(components, boundaries, n_real=None):
    n_real = boundaries.shape[1] if n_real is None else n_real
    norm = np.linalg.norm(boundaries, axis=-1, keepdims=True)[:, :n_real]
    within("slots", summed(components)[:, :n_real], boundaries[:, :n_real], SUM, norm)


def test_slots_sum_to_the_residual_stream(case):
    check_sum(case.components, case.trace.boundaries)


@pytest.mark.slow
def test_real_slots_sum_to_the_residual_stream(real_case):
    check_sum(real_case.components, real_case.trace.boundaries)


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 9),
    n_real=st.integers(1, 9),
    kind=st.sampled_from(["topk", "jumprelu", "relu"]),
    normalize=st.sampled_from(["none", "constant_norm_rescale", "layer_norm"]),
    subtract=st.booleans(),
    slots=st.sampled_from([2, 8, 64]),
)
def test_any_dictionary_sums(n, n_real, kind, normalize, subtract, slots):
    n_real = min(n, n_real)
    rng = np.random.default_rng(n)
    x = jnp.asarray(rng.normal(size=(2, n, tiny.D)), jnp.float32)
    params, _ = tiny.house("llama")
    options = dict(activation=kind, normalize=normalize, subtract_b_dec=subtract)
    saes = (tiny.dictionary(0, **options), tiny.dictionary(1, **options))
    ids = tiny.tokens(max(n, 2))[:n]
    parts = decompose_prompt(params, saes, x, ids, n_real=n_real, max_slots=slots)
    check_sum(parts, x, n_real)
    assert (np.asarray(parts.kind)[:, n_real:] == Kind.NONE).all()
    assert (summed(parts)[:, n_real:] == 0).all()


def restated_sinks(norms):
    """The rule in words: position 0; and norms over 10 times the lower middle
    of the sorted norms from 1 on.
    """
    rest = sorted(norms[1:])
    median = rest[(len(rest) - 1) // 2] if rest else np.inf
    return [i == 0 or v > 10 * median for i, v in enumerate(norms)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.1, 1.0, 1.1, 9.0, 10.5, 11.5, 150.0]), min_size=1, max_size=9))
def test_sinks_follow_the_rule_and_ignore_padding(norms):
    x = np.zeros((len(norms) + 3, 4), np.float32)
    x[: len(norms), 0] = norms
    x[len(norms) :, 0] = 1e6
    got = np.asarray(sink_positions(jnp.asarray(x), len(norms)))
    assert got[: len(norms)].tolist() == restated_sinks(norms)
    assert not got[len(norms) :].any()


def test_a_sink_is_one_component(case):
    parts = jax.tree.map(lambda a: a[1], case.components)
    vectors = np.asarray(parts.vectors())
    assert (np.asarray(parts.kind[0])[[-2, -1]] == [Kind.BIAS, Kind.SINK]).all()
    np.testing.assert_array_equal(vectors[0, -1], case.trace.boundaries[1, 0])
    assert (vectors[0, :-1] == 0).all()


def test_no_sinks_when_they_are_off(case):
    ids = case.tokens
    parts = decompose_prompt(
        case.params, tiny.dictionaries(), case.trace.boundaries, ids, n_real=len(ids), sinks=False
    )
    assert (np.asarray(parts.kind) != Kind.SINK).all()
    check_sum(parts, case.trace.boundaries)


def test_boundary_0_is_tokens_and_positions(case):
    parts = jax.tree.map(lambda a: a[0], case.components)
    vectors, kind = np.asarray(parts.vectors()), np.asarray(parts.kind)
    np.testing.assert_array_equal(vectors[:, 0], case.params.embed_VD[case.tokens])
    assert (kind[:, 0] == Kind.TOKEN).all() and (np.asarray(parts.index)[:, 0] == case.tokens).all()
    assert (vectors[:, -1] == 0).all() and (kind[:, -1] == Kind.NONE).all()
    if case.params.position_PD is not None:
        np.testing.assert_array_equal(vectors[:, 1], case.params.position_PD[: len(case.tokens)])
        assert (kind[:, 1] == Kind.POSITION).all()


def test_a_boundary_without_a_dictionary_is_one_error(case):
    parts = jax.tree.map(lambda a: a[2], case.components)
    vectors = np.asarray(parts.vectors())
    np.testing.assert_array_equal(vectors[:, -1], case.trace.boundaries[2])
    assert (np.asarray(parts.kind)[1:, -1] == Kind.ERROR).all()
    assert (vectors[:, :-1] == 0).all()


def test_components_are_found_by_kind_and_index(case):
    for b in (0, 1):
        kind, index = (np.asarray(a[b]) for a in (case.components.kind, case.components.index))
        position, slot = np.nonzero(kind != Kind.NONE)
        named = kind[position, slot], index[position, slot]
        np.testing.assert_array_equal(find_slots(case.components, b, position, *named), slot)
        first = np.where((kind == kind[1, 0]).any(1), (kind == kind[1, 0]).argmax(1), -1)
        every = np.arange(len(kind))
        got = find_slots(case.components, b, every, kind[1, 0])
        np.testing.assert_array_equal(got, first)
        assert (find_slots(case.components, b, every, Kind.FEATURE, 10**6) == -1).all()


def test_more_features_than_slots_leave_the_smallest_to_the_error():
    dictionary = tiny.dictionary(0, activation="relu")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, tiny.D)), jnp.float32)
    wide = decompose(dictionary, x, slots=dictionary.width, sinks=False)
    narrow = decompose(dictionary, x, slots=4, sinks=False)
    largest = np.sort(np.asarray(wide.activation), axis=1)[:, ::-1]
    np.testing.assert_allclose(narrow.activation, largest[:, :4], rtol=1e-6)
    left_out = 1 - largest[:, :4].sum(1) / largest.sum(1)
    np.testing.assert_allclose(narrow.left_out, left_out, atol=1e-6)
    assert (left_out > 0).all() and (np.asarray(wide.left_out) == 0).all()
    for parts in (wide, narrow):
        within(
            "slots", np.asarray(parts.vectors()).sum(1), x, SUM, np.linalg.norm(x, axis=1)[:, None]
        )


def test_decompose_equals_decompose_prompt(case):
    """The function for other people's programs and the one for prompts agree on a boundary."""
    one = decompose(tiny.dictionaries()[1], case.trace.boundaries[1], slots=5)
    whole = jax.tree.map(lambda a: a[1], case.components)
    np.testing.assert_allclose(one.error, whole.error, atol=1e-5)
    active = np.asarray(one.activation) > 0
    got = np.asarray(whole.activation)[:, : active.shape[1]]
    np.testing.assert_allclose(
        np.where(active, one.activation, 0), np.where(active, got, 0), rtol=1e-5
    )


def test_encoder_reading_gives_what_the_encoder_reads():
    """g . x + constant is the pre-activation: differences of x are read as the
    encoder reads them.
    """
    dictionary = tiny.dictionary(0, activation="relu", normalize="constant_norm_rescale")
    params, _ = tiny.house("llama")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, tiny.D)), jnp.float32)
    parts = decompose_prompt(
        params, (None, dictionary), x, tiny.tokens(4), n_real=4, read="encoder"
    )
    one = jax.tree.map(lambda a: a[1], parts)
    t, slot = 2, 0
    g = np.asarray(one.covectors(jnp.array([t]), jnp.array([slot])))[0]
    gain = np.sqrt(tiny.D) / np.linalg.norm(x[1, t])
    feature = int(one.index[t, slot])
    np.testing.assert_allclose(g, gain * dictionary.w_enc_DM[:, feature], rtol=1e-5)


def test_slots_are_those_that_positions_other_than_sinks_need(monkeypatch):
    """A later position of massive norm fires everything, and is one component all the same; every
    dictionary encodes once."""
    rng = np.random.default_rng(0)
    params, cfg = tiny.house("llama")
    x = rng.normal(size=(cfg.n_blocks + 1, 16, tiny.D)).astype(np.float32)
    x[1:, [0, 5]] *= 1000
    saes = tuple(
        None if b == 0 else tiny.dictionary(b, activation="jumprelu", width=400)
        for b in range(cfg.n_blocks + 1)
    )
    active = np.stack([(np.asarray(activations(d, x[1 + i])) > 0).sum(-1) for i, d in
                       enumerate(saes[1:])])  # fmt: skip
    usual = np.delete(active, [0, 5], axis=1).max()
    assert active[:, 5].min() > bucket(int(usual))
    calls = []
    monkeypatch.setattr(prompt, "encode", lambda *a, **k: calls.append(a) or encode(*a, **k))
    parts = prompt.decompose_prompt(params, saes, jnp.asarray(x), np.arange(16), n_real=16)
    assert len(calls) == cfg.n_blocks
    assert parts.row.shape[-1] == bucket(int(usual))
    assert (np.asarray(parts.kind[1:, 5]) == Kind.SINK).any(-1).all()
    check_sum(parts, x)

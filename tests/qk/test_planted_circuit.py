"""A circuit built by hand: a head that looks at a key for two known pairs of features, and is held
back by a third. The analyses find these, in this order, and nothing else.

Block 0 does nothing. At boundary 1 every dimension is a feature; block 1's one head reads, on the
query side, features 0, 1, 2 and, on the key side, 3, 4, 5 into three dimensions: 0 meets 3, 1 meets
4, and 2 meets 5 with a negative sign.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_why import identities

from qkattr.config import BlockConfig, ModelConfig, Rotary
from qkattr.kinds import NO_WINDOW, Kind
from qkattr.qk.mechanisms import decompose_terms
from qkattr.qk.pairs import search_slots, top_pairs
from qkattr.qk.terms import qk_terms
from qkattr.qk.weights import HeadScales, weight_pairs
from qkattr.qk.why import competition
from qkattr.sources.dictionary import Dictionary, DictionaryConfig
from qkattr.types import BlockWeights, Params

D, H = 10, 4
DRIVERS, INHIBITOR = [(0, 3), (1, 4)], (2, 5)
#: Token: its features. The last token is the query, token 1 the key, the others are filler.
TOKENS = [(8,), (3, 4, 5), (9,), (8, 9), (0, 1, 2)]
IDS = np.array([0, 2, 1, 3, 2, 4], np.int32)
QUERY, KEY = 5, 2


@pytest.fixture(scope="module")
def circuit() -> tiny.Case:
    embed = np.zeros((len(TOKENS), D), np.float32)
    for token, features in enumerate(TOKENS):
        embed[token, list(features)] = 1.0
    wq, wk = np.zeros((2, D, 1, H), np.float32), np.zeros((2, D, 1, H), np.float32)
    for i, (q, k) in enumerate([*DRIVERS, INHIBITOR]):
        wq[1, q, 0, i] = 2.0
        wk[1, k, 0, i] = (2.0, 1.9, -0.6)[i]
    zeros = lambda *shape: jnp.zeros((2, *shape))
    blocks = BlockWeights(
        wq_DNH=jnp.asarray(wq), wk_DKH=jnp.asarray(wk), wv_DKH=zeros(D, 1, H),
        wo_NHD=zeros(1, H, D), w_up_DF=zeros(D, 3), w_down_FD=zeros(3, D), inv_freq=zeros(0),
        window=jnp.full(2, NO_WINDOW),
    )  # fmt: skip
    params = Params(embed_VD=jnp.asarray(embed), blocks=blocks)
    config = ModelConfig(
        family="planted", n_blocks=2, d_model=D, n_heads=1, n_kv_heads=1, head_dim=H, d_mlp=3,
        vocab=len(TOKENS), context=16, block=BlockConfig(scale=1.0),
        rotary=Rotary(base=1e4, dims=0), windows=(NO_WINDOW,) * 2, tied=True,
    )  # fmt: skip
    identity = Dictionary(
        w_enc_DM=np.eye(D, dtype=np.float32), w_dec_MD=np.eye(D, dtype=np.float32),
        b_enc_M=np.zeros(D, np.float32), b_dec_D=np.zeros(D, np.float32),
        config=DictionaryConfig(activation="relu"),
    )  # fmt: skip
    return tiny.case_of(params, config, IDS, (None, identity, None), sinks=False)


def named(kind, index, slot) -> int:
    assert kind[slot] == Kind.FEATURE
    return int(index[slot])


def test_mechanisms_are_the_two_pairs(circuit):
    weights, x, parts = circuit.block(1)
    qk = jax.device_get(
        qk_terms(weights, x, parts, head=0, query=QUERY, key=KEY, cfg=circuit.cfg.block)
    )
    found = decompose_terms(qk.terms)
    assert round(found.rank) == 2 and found.cross < 0.1
    for i, (q, k) in enumerate(DRIVERS):
        top_q, top_k = np.abs(found.query_IA[i]).argmax(), np.abs(found.key_IC[i]).argmax()
        assert named(qk.query_kind, qk.query_index, top_q) == q
        assert named(qk.key_kind, qk.key_index, top_k) == k


def test_competition_finds_the_pairs_and_the_inhibitor_first(circuit):
    weights, x, parts = circuit.block(1)
    found = jax.device_get(
        competition(
            weights, x, parts, identities(parts), head=0, query=QUERY, key=KEY, top=4,
            cfg=circuit.cfg.block,
        )
    )  # fmt: skip
    kind, index = np.asarray(parts.kind), np.asarray(parts.index)

    def pairs(rows):
        return [
            (named(kind[QUERY], index[QUERY], a), named(kind[s], index[s], c), int(s))
            for a, s, c, v in zip(rows.query_slot, rows.key, rows.key_slot, rows.value, strict=True)
            if abs(v) > 1e-6
        ]

    assert pairs(found.pushes) == [(q, k, KEY) for q, k in DRIVERS]
    assert pairs(found.pulls) == [(*INHIBITOR, KEY)]
    np.testing.assert_allclose(found.pushes.value[:2], [4.0, 3.8], rtol=1e-6)
    np.testing.assert_allclose(found.pulls.value[0], -1.2, rtol=1e-6)


def test_pairs_over_everything_are_the_three_pairs(circuit):
    """At every place where they meet, which is one."""
    weights, x, parts = circuit.block(1)
    slots = search_slots(circuit.params.blocks, circuit.components)[1]
    found = jax.device_get(top_pairs(weights, x, parts, slots, top=4, cfg=circuit.cfg.block))
    kind, index = np.asarray(parts.kind), np.asarray(parts.index)
    listed = [
        (named(kind[t], index[t], a), named(kind[s], index[s], c), int(t), int(s))
        for sign in (0, 1)
        for t, a, s, c, v in zip(
            *(getattr(found, name)[0, sign] for name in ("query", "query_slot", "key", "key_slot")),
            found.value[0, sign],
            strict=True,
        )
        if v != 0
    ]
    assert listed == [(*pair, QUERY, KEY) for pair in (*DRIVERS, INHIBITOR)]


def test_pairs_of_the_weights_alone_are_the_three_pairs(circuit):
    weights, _, _ = circuit.block(1)
    eye = np.eye(D, dtype=np.float32)
    how = dict(head=0, distance=3, scales=HeadScales(), top=4, cfg=circuit.cfg.block)
    found = jax.device_get(weight_pairs(weights, eye, **how))
    named_ = [
        (int(r), int(c))
        for sign in (0, 1)
        for r, c, v in zip(found.row[sign], found.column[sign], found.value[sign], strict=True)
        if v != 0
    ]
    assert named_ == [*DRIVERS, INHIBITOR]
    np.testing.assert_allclose(found.value[0, :2], [4.0, 3.8], rtol=1e-6)
    np.testing.assert_allclose(found.value[1, 0], -1.2, rtol=1e-6)

"""Arrays that an embedding program gets wrong: each call is refused by one sentence that names the
argument, what is expected, what it has, and what to do; and right calls pay nothing for it."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qkattr.config import ModelConfig
from qkattr.errors import InputError
from qkattr.graph.backward import SweepConfig, sweep
from qkattr.graph.edges import edge_totals, source_values
from qkattr.graph.effects import target_effects
from qkattr.graph.targets import direct_targets, score_covectors
from qkattr.model.linear import freeze, pull, push
from qkattr.model.transformer import block, forward
from qkattr.qk.marginals import block_marginals
from qkattr.qk.mechanisms import decompose_terms
from qkattr.qk.terms import qk_terms, qk_terms_many
from qkattr.qk.weights import HeadScales, weight_pairs
from qkattr.qk.why import competition
from qkattr.shapes import checked
from qkattr.sharding import make_mesh
from qkattr.sources.components import decompose
from qkattr.sources.dictionary import encode
from qkattr.types import BlockStack

CASE = tiny.case("llama")
CFG = CASE.cfg.block
WEIGHTS, X, PARTS = CASE.block(1)
STACK = CASE.params.blocks, CASE.trace.boundaries, CASE.components
PLACES = jnp.array([[0, 0, 5, 3], [1, 2, 8, 8]])
SAE = tiny.dictionary(1, activation="topk")
C = PARTS.n_slots


def refused(call, *arguments, **options) -> str:
    """The sentence that a call gets."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    said = str(caught.value)
    assert "\n" not in said and said.isprintable()
    return said


def terms(weights=WEIGHTS, x=X, parts=PARTS, **options):
    return qk_terms(weights, x, parts, **dict(head=0, query=5, key=2, cfg=CFG) | options)


def other(**arrays):
    """The block's weights with others in their place."""
    return dataclasses.replace(WEIGHTS, **arrays)


def out_in(w) -> jax.Array:
    """As PyTorch keeps it: `[N, H, D]`."""
    return jnp.transpose(w, (1, 2, 0))


# The ten ------------------------------------------------------------------------------------------


def test_transposed_weights():
    assert refused(terms, other(wq_DNH=out_in(WEIGHTS.wq_DNH))) == (
        "weights.wq_DNH has shape [4, 6, 20], expected [D=20, N=4, H=6]; its axes are in another "
        "order, give jnp.transpose(weights.wq_DNH, (2, 0, 1))"
    )


def test_all_weights_transposed():
    """They outnumber the right ones in N and H, and are wrong in D."""
    names = ("wq_DNH", "wk_DKH", "wv_DKH")
    wrong = other(**{name: out_in(getattr(WEIGHTS, name)) for name in names})
    for call in (terms, lambda w: block(w, X, cfg=CFG), lambda w: freeze(w, X, cfg=CFG)):
        assert refused(call, wrong).startswith(
            "weights.wq_DNH has shape [4, 6, 20], expected [D=20"
        )


def test_heads_that_are_not_cut_apart():
    assert refused(terms, other(wq_DNH=WEIGHTS.wq_DNH.reshape(20, 24))).endswith(
        "has shape [20, 24], expected [D=20, N=4, H=6]; give weights.wq_DNH.reshape(20, 4, 6)"
    )
    assert refused(terms, other(wq_DNH=WEIGHTS.wq_DNH.reshape(20, 24).T)).endswith(
        "has shape [24, 20], expected [D=20, N=4, H=6]; give weights.wq_DNH.T.reshape(20, 4, 6)"
    )


def test_one_block_where_a_stack_is_wanted():
    assert refused(qk_terms_many, WEIGHTS, *STACK[1:], PLACES, cfg=CFG) == (
        "blocks.wq_DNH has shape [20, 4, 6], expected [L=3, D=20, N, H]; stack a list of them: "
        "jax.tree.map(lambda *a: jnp.stack(a), *blocks)"
    )
    assert refused(qk_terms_many, [WEIGHTS] * 3, *STACK[1:], PLACES, cfg=CFG) == (
        "blocks is a list, expected a BlockWeights stacked on a leading axis L; stack a list of "
        "them: jax.tree.map(lambda *a: jnp.stack(a), *blocks)"
    )


def test_boundaries_without_positions():
    assert refused(score_covectors, STACK[0], STACK[1][:, 3], PLACES, cfg=CFG) == (
        "boundaries has shape [4, 20], expected [L+1=4, T, D=20]; the axis T is missing"
    )


def test_another_model_size():
    assert refused(terms, x=X[:, :18]) == (
        "x has shape [9, 18], expected [T=9, D=20]; D is 20 in weights.wq_DNH"
    )


def test_float64():
    """JAX makes float32 of NumPy's float64 unless it is told not to; then it is refused."""
    wide = np.asarray(X, np.float64)
    chex.assert_trees_all_equal(terms(x=wide), terms())
    with jax.enable_x64(True):
        assert refused(terms, x=jnp.asarray(wide)) == (
            "x is float64, expected float32; attribution is computed in float32 (jax_enable_x64 is "
            "on); give x.astype('float32')"
        )


def test_integer_activations():
    assert refused(terms, x=X.astype(int)) == (
        "x is int32, expected float32; give x.astype('float32')"
    )


def test_number_of_slots():
    """Without the bias and error slots, in the table of what the slots are."""
    without = dataclasses.replace(PARTS, kind=PARTS.kind[:, :-2])
    assert refused(terms, parts=without) == (
        f"components.kind has shape [9, {C - 2}], expected [T=9, C={C}]; C is {C} in components.row"
    )
    identity = jnp.zeros((len(X), C - 2), int)
    how = dict(head=0, query=5, key=2, cfg=CFG)
    assert refused(competition, WEIGHTS, X, PARTS, identity, **how).startswith(
        f"identity has shape [9, {C - 2}], expected [S=9, C={C}]"
    )


def test_number_of_positions():
    assert refused(terms, x=X[:-1]) == (
        "x has shape [8, 20], expected [T=9, D=20]; T is 9 in components.row"
    )


def test_transposed_dictionary():
    wrong = dataclasses.replace(SAE, w_dec_MD=SAE.w_dec_MD.T)
    for call in (decompose, encode):
        assert refused(call, wrong, X, slots=5) == (
            "dictionary.w_dec_MD has shape [20, 40], expected [M=40, D=20]; its axes are in "
            "another order, give jnp.transpose(dictionary.w_dec_MD, (1, 0))"
        )


def test_number_of_heads():
    three = jnp.zeros((20, 3, 6))
    assert refused(terms, other(wk_DKH=three, wv_DKH=three)) == (
        "weights.wk_DKH has K=3 key heads, which do not divide the N=4 query heads of "
        "weights.wq_DNH; query head n reads key head n // (N // K)"
    )
    assert refused(terms, other(wq_DNH=WEIGHTS.wq_DNH.reshape(20, 3, 8))) == (
        "weights.wq_DNH has shape [20, 3, 8], expected [D=20, N=4, H=6]; N is 4 in weights.wo_NHD"
    )


def test_tokens_that_are_no_ids():
    assert refused(forward, CASE.params, jnp.ones(9), cfg=CASE.cfg) == (
        "tokens is float32, expected integer; give tokens.astype('int32')"
    )
    assert refused(forward, CASE.params, jnp.ones((2, 9), int), cfg=CASE.cfg) == (
        "tokens has shape [2, 9], expected [T]; take one of its first axis, or map over it with "
        "jax.vmap"
    )


def test_places_without_their_block():
    assert refused(qk_terms_many, *STACK, PLACES[:, 1:], cfg=CFG) == (
        "places has shape [2, 3], expected [P, 4] (block, head, query, key)"
    )


# Their neighbours ---------------------------------------------------------------------------------


def test_fields_of_structs_in_structs():
    norm = dataclasses.replace(WEIGHTS.norm_attn, weight=jnp.ones(18))
    assert refused(terms, other(norm_attn=norm)) == (
        "weights.norm_attn.weight has shape [18], expected [D=20]; D is 20 in weights.wq_DNH"
    )
    params = dataclasses.replace(CASE.params, blocks=WEIGHTS)
    assert refused(forward, params, CASE.tokens, cfg=CASE.cfg).startswith(
        "params.blocks.wq_DNH has shape [20, 4, 6], expected [L, D=20, N, H]"
    )
    assert refused(terms, other(wo_NHD=None)) == (
        "weights.wo_NHD is None, expected an array [N, H, D]"
    )


def test_what_is_no_struct():
    assert refused(terms, vars(WEIGHTS)) == "weights is a dict, expected a BlockWeights"
    assert refused(terms, cfg=CASE.cfg) == "cfg is a ModelConfig, expected a BlockConfig"
    assert isinstance(CASE.cfg, ModelConfig)
    listed = [CASE.block(b)[2] for b in range(3)]
    assert "components is a list, expected a Components stacked on a leading axis L+1; stack" in (
        refused(qk_terms_many, *STACK[:2], listed, PLACES, cfg=CFG)
    )


def test_a_boundary_too_few():
    assert refused(block_marginals, WEIGHTS, X[None], PARTS, cfg=CFG).endswith(
        "take one of its first axis, or map over it with jax.vmap"
    )
    targets = direct_targets([3], [8], np.ones((1, 20)), [0.0], [1.0], padded_to=8)
    how = dict(cfg=CFG, config=SweepConfig())
    assert refused(sweep, STACK[0], STACK[1][:-1], STACK[2], targets, **how) == (
        "boundaries has shape [3, 9, 20], expected [L+1=4, T=9, D=20]; L is 3 in blocks.wq_DNH"
    )


def test_covectors_and_their_positions():
    frozen = freeze(WEIGHTS, X, cfg=CFG)
    assert refused(push, frozen, X[:, :4]).startswith("x has shape [9, 4], expected [T=9, D=20]")
    assert refused(pull, frozen, jnp.ones((3, 20)), jnp.ones(3)) == (
        "position is float32, expected integer; give position.astype('int32')"
    )
    pulled = pull(frozen, jnp.ones((3, 20)), jnp.arange(3))
    values = source_values(frozen, PARTS)
    assert refused(edge_totals, frozen, pulled, PARTS, values.swapaxes(0, 1)).endswith(
        "give jnp.transpose(v_SCKH, (1, 0, 2, 3))"
    )
    one = jnp.array([3])
    given = one, one, jnp.ones((1, 20)), jnp.zeros(2)
    assert refused(target_effects, *STACK, *given, cfg=CFG) == (
        "constant has shape [2], expected [R=1]; R is 1 in target_boundary"
    )


def test_weights_and_matrices_without_a_prompt():
    how = dict(head=0, distance=1, scales=HeadScales(), top=3, cfg=CFG)
    assert refused(weight_pairs, WEIGHTS, SAE.w_enc_DM, **how) == (
        "features_MD has shape [20, 40], expected [M, D=20]; D is 20 in weights.wq_DNH"
    )
    assert refused(decompose_terms, np.ones(4)) == "terms has shape [4], expected [A, C]"
    assert refused(decompose_terms, [[1.0]]) == "terms is a list, expected an array [A, C]"


def test_half_precision_activations():
    """Weights may be of any floating-point type; what is computed from may not."""
    assert refused(terms, x=X.astype(jnp.bfloat16)) == (
        "x is bfloat16, expected float32; attribution is computed in float32; "
        "give x.astype('float32')"
    )
    terms(other(wq_DNH=WEIGHTS.wq_DNH.astype(jnp.bfloat16)))
    assert "weights.wq_DNH is int32, expected floating-point" in (
        refused(terms, other(wq_DNH=WEIGHTS.wq_DNH.astype(int)))
    )


# What right calls pay -----------------------------------------------------------------------------


def test_transformations_pass():
    each = jax.vmap(lambda x: terms(x=x).score)(jnp.stack([X, X]))
    chex.assert_trees_all_equal(each[0], each[1])
    chex.assert_shape(jax.eval_shape(lambda x: terms(x=x), X).terms, (C, C))
    _, scores = jax.lax.scan(lambda n, x: (n, terms(x=x).score), 0, jnp.stack([X, X]))
    chex.assert_shape(scores, (2,))
    chex.assert_shape(jax.grad(lambda x: terms(x=x).score)(X), X.shape)
    split = NamedSharding(make_mesh(1, 4), PartitionSpec(None, "model"))
    chex.assert_trees_all_close(terms(x=jax.device_put(X, split)).score, terms().score, rtol=1e-5)


def test_nothing_is_checked_in_a_compiled_call():
    seen = []

    def f(blocks: BlockStack, x: Float[Array, "T D"], at: Int[Array, ""] | int = 0):
        seen.append(at)
        return x[at] * blocks.window.sum()

    run = jax.jit(chex.assert_max_traces(checked(f), n=1))
    for at in range(3):
        run(STACK[0], X, at)
    assert len(seen) == 1
    assert "x has shape [20]" in refused(jax.jit(checked(f)), STACK[0], X[0])


def test_it_can_be_turned_off():
    chex.disable_asserts()
    try:
        block(
            other(norm_attn=dataclasses.replace(WEIGHTS.norm_attn, weight=jnp.ones(1))), X, cfg=CFG
        )
    finally:
        chex.enable_asserts()


# The reading of annotations -----------------------------------------------------------------------


@checked
def whatever(
    w: Float[Array, "D N H"],
    o: Float[Array, "N H D"],
    x: Float[Array, "... D"],
    gain: Float[Array, "H"] | Float[Array, "N H"] | None = None,
    scale: Float[Array, ""] | float = 1.0,
    below: Float[Array, "L+1 D"] | None = None,
    blocks: Int[Array, "L"] | None = None,
):
    return x


def test_annotations_are_read():
    w, o = jnp.ones((6, 2, 3)), jnp.ones((2, 3, 6))
    whatever(w, o, jnp.ones(6), jnp.ones(3), 2.0)
    whatever(w, o, jnp.ones((4, 5, 6)), jnp.ones((2, 3)), np.float32(2))
    whatever(w, o, x=jnp.ones(6), below=jnp.ones((4, 6)), blocks=jnp.arange(3))
    assert refused(whatever, w, o, jnp.ones((4, 5))) == (
        "x has shape [4, 5], expected [..., D=6]; D is 6 in w"
    )
    assert refused(whatever, w, o, jnp.ones(())) == "x has shape [], expected [..., D=6]"
    assert refused(whatever, w, o, jnp.ones(6), jnp.ones((3, 2))) == (
        "gain has shape [3, 2], expected [N=2, H=3]; its axes are in another order, "
        "give jnp.transpose(gain, (1, 0))"
    )
    assert refused(whatever, w, o, jnp.ones(6), scale=jnp.ones(2)).startswith(
        "scale has shape [2], expected []; take one"
    )
    assert refused(whatever, w, o, jnp.ones(6), below=jnp.ones((3, 6)), blocks=jnp.arange(3)) == (
        "blocks has shape [3], expected [L=2]; L is 2 in below"
    )


def test_a_square_matrix_may_be_either():
    assert refused(whatever, jnp.ones((6, 6)), jnp.ones((2, 3, 6)), jnp.ones(6)) == (
        "w has shape [6, 6], expected [D=6, N=2, H=3]; give w.reshape(6, 2, 3) or, of [out, in], "
        "w.T.reshape(6, 2, 3)"
    )

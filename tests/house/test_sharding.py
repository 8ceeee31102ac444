"""Every public jitted function under no mesh, an Auto mesh and an Explicit mesh:
the same numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import within

from qkattr.config import SweepConfig
from qkattr.graph.backward import DirectTargets, sweep
from qkattr.graph.effects import effects_at, target_effects
from qkattr.graph.targets import logit_covectors, score_covectors
from qkattr.model.transformer import forward
from qkattr.qk.effects import pair_effects
from qkattr.qk.marginals import block_marginals
from qkattr.qk.pairs import search_slots, top_pairs
from qkattr.qk.terms import qk_terms, qk_terms_many
from qkattr.sharding import bucket, make_mesh, shard, spec_of
from qkattr.sources.components import decompose
from qkattr.sources.dictionary import encode

SAME = 2e-5  # of the largest: sharded contractions add up in another order


def explicit_mesh():
    return jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )


MESHES = {"auto": lambda: make_mesh(2, 2, devices=jax.devices()[:4]), "explicit": explicit_mesh}


def targets(case):
    tokens, against = jnp.array([3, 5]), jnp.array([-1, 4])
    g, constant = logit_covectors(
        case.params, case.trace.boundaries[-1, -1], tokens, against, cfg=case.cfg
    )
    last = len(case.tokens) - 1
    return DirectTargets(
        jnp.full(2, tiny.L), jnp.full(2, last), g, constant, jnp.array([0.7, 0.3], jnp.float32)
    )


def calls(case, dictionary):
    """What is public, each as a function of weights that may be sharded."""
    cfg, x, parts = case.cfg, case.trace.boundaries, case.components
    one = jax.tree.map(lambda a: a[1], parts)
    places = jnp.array([[1, 0, 5, 3], [2, 1, 7, 7]])
    blocks = lambda p, b: jax.tree.map(lambda a: a[b], p.blocks)
    config = SweepConfig(max_rows=12, max_edges=8)
    slots = search_slots(case.params.blocks, parts)
    t = targets(case)
    entries = t.boundary, t.position, t.covector, t.constant
    slope = jnp.ones((2, 2, len(case.tokens)))
    return {
        "forward": lambda p, d: forward(p, jnp.asarray(case.tokens), cfg=cfg)[0],
        "encode": lambda p, d: encode(d, x[1], slots=5).activation,
        "decompose": lambda p, d: decompose(d, x[1], slots=5).error,
        "qk_terms": lambda p, d: (
            qk_terms(blocks(p, 1), x[1], one, head=1, query=6, key=2, cfg=cfg.block).contrast
        ),
        "qk_terms_many": lambda p, d: (
            qk_terms_many(p.blocks, x, parts, places, cfg=cfg.block).terms
        ),
        "top_pairs": lambda p, d: (
            top_pairs(blocks(p, 1), x[1], one, slots[1], top=6, cfg=cfg.block).value
        ),
        "block_marginals": lambda p, d: (
            block_marginals(blocks(p, 1), x[1], one, cfg=cfg.block).key_value
        ),
        "logit_covectors": lambda p, d: logit_covectors(
            p, x[-1, 3], jnp.array([1]), jnp.array([-1]), cfg=cfg
        )[0],
        "score_covectors": lambda p, d: score_covectors(p.blocks, x, places, cfg=cfg.block)[0],
        "sweep": lambda p, d: (
            sweep(p.blocks, x, parts, t, cfg=cfg.block, config=config).kept.influence
        ),
        "target_effects": lambda p, d: (
            target_effects(p.blocks, x, parts, *entries, cfg=cfg.block).derivative
        ),
        "effects_at": lambda p, d: (
            effects_at(
                p.blocks, x, parts, jnp.ones((tiny.L + 1, 2, *x.shape[1:])), places, cfg=cfg.block
            ).head
        ),
        "pair_effects": lambda p, d: (
            pair_effects(p.blocks, x, parts, places, slope, cfg=cfg.block).over_keys
        ),
    }


NAMES = list(calls(tiny.case("llama"), None))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_sharded_equals_unsharded(name, mesh):
    case, dictionary = tiny.case("llama"), tiny.dictionaries()[1]
    expected = np.asarray(calls(case, dictionary)[name](case.params, dictionary))
    made = MESHES[mesh]()
    with jax.set_mesh(made):
        params, sharded = shard((case.params, dictionary), made)
        got = calls(case, dictionary)[name](params, sharded)
    within(name, got, expected, SAME, np.abs(expected).max())


def test_weights_are_really_sharded():
    params, _ = tiny.house("llama")
    made = MESHES["auto"]()
    placed = shard(params, made)
    assert placed.blocks.wo_NHD.sharding.spec == PartitionSpec(None, "model", None, None)
    assert placed.blocks.w_up_DF.sharding.spec == PartitionSpec(None, None, "model")
    assert placed.blocks.norm_attn.weight.sharding.is_fully_replicated


def test_axes_that_do_not_fit_are_replicated():
    made = MESHES["auto"]()
    assert spec_of("wk_DKH", (3, 24, 1, 8), made) == PartitionSpec(None, None, None, None)
    assert spec_of("w_enc_DM", (24, 40), made) == PartitionSpec(None, "model")
    assert spec_of("weight", (24,), made) == PartitionSpec()


def test_prompts_shard_over_data():
    """The forward pass, `vmap`ped over prompts that lie on the data axis."""
    params, cfg = tiny.house("llama")
    made = MESHES["auto"]()
    batch = np.stack([tiny.tokens(8, seed) for seed in range(4)])
    run = jax.jit(jax.vmap(lambda ids: forward(params, ids, cfg=cfg, capture=())[0]))
    placed = jax.device_put(batch, NamedSharding(made, PartitionSpec("data")))
    expected = np.asarray(run(batch))
    got = run(placed)
    within("logits", got, expected, SAME, np.abs(expected).max())


@pytest.mark.parametrize(
    "n,size", [(1, 8), (8, 8), (9, 12), (13, 16), (17, 24), (33, 48), (256, 256), (257, 384)]
)
def test_buckets(n, size):
    assert bucket(n) == size

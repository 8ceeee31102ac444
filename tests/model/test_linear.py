"""The frozen block: what it adds up to, its transpose, its heads,
and the edges that are read off it.

Every identity is held to a block written a second time: in NumPy (`naive`), and here in JAX for
`jax.vjp`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny
from frozen import frozen_block, of_head
from tiny import within

from qkattr.config import LINEARISATIONS
from qkattr.graph.edges import Candidates, edge_totals, kept_parts, source_values
from qkattr.model.linear import constant, freeze, push, values
from qkattr.model.linear import pull as pull_back

BLOCK = 2e-5  # of the largest entry of the result: a block is four float32 matmuls deep
LOADING = 1e-4  # of the row's largest loading: as the method's own check asks
REAL_BLOCK = 1e-4  # d_model 576 and MLP 1536 instead of 20 and 28: the sums are 50 times longer


@pytest.fixture(scope="module", params=LINEARISATIONS)
def linearisation(request):
    return request.param


@pytest.fixture(scope="module", params=[0, 1, 2], ids=lambda b: f"block{b}")
def frozen(request, case, linearisation):
    weights, x, parts = case.block(request.param)
    made = freeze(weights, x, cfg=case.cfg.block, linearisation=linearisation)
    return (
        case.cfg.block,
        linearisation,
        weights,
        x,
        parts,
        made,
        case.trace.boundaries[request.param + 1],
    )


def rows(n_rows, n_positions, d, seed=0):
    """Covectors, and where they read: all positions, some twice."""
    g = np.random.default_rng(seed).normal(size=(n_rows, d)).astype(np.float32)
    return jnp.asarray(g), jnp.arange(n_rows) * 5 % n_positions


def test_push_and_constant_make_the_next_boundary(frozen):
    _, _, _, x, _, made, after = frozen
    within("push + constant", push(made, x) + constant(made), after, BLOCK, np.abs(after).max())


def test_push_is_the_naive_matrix(frozen):
    cfg, linearisation, weights, x, _, made, _ = frozen
    seen = naive.run_block(weights, x, cfg)
    matrix = naive.linearise(weights, seen, cfg, linearisation).matrix()
    v = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    expected = np.einsum("tisj,sj->ti", matrix, v)
    within("push - naive matrix", push(made, v), expected, BLOCK, np.abs(expected).max())
    rest = seen.out - np.einsum("tisj,sj->ti", matrix, seen.x)
    within("constant - naive", constant(made), rest, BLOCK, np.abs(seen.out).max())


def pulled_to_all(made, pulled):
    """`[R, S, D]` the covector that each row leaves at every position:
    the edges' definition, as vectors.
    """
    weights, seen, n_positions = made.weights, made.seen, made.seen.pattern_NTS.shape[1]
    n_heads, group = weights.wo_NHD.shape[0], weights.wo_NHD.shape[0] // weights.wk_DKH.shape[1]
    basis = values(made, jnp.eye(weights.wo_NHD.shape[2]))  # [D, K, H]
    out = np.zeros((pulled.heads.shape[0], n_positions, weights.wo_NHD.shape[2]))
    for n in range(n_heads):
        on_x = np.asarray(pulled.heads[:, n] @ basis[:, n // group].T)
        pattern = np.asarray(seen.pattern_NTS[n][pulled.position] * seen.scale_attn_T[None])
        out += pattern[:, :, None] * on_x[:, None]
    out[np.arange(len(out)), pulled.position] += np.asarray(pulled.residual + pulled.mlp)
    return out


def vjp_rows(block, x, g, position, only=None):
    """`[R, S, D]` each row's covector, pulled back by JAX."""
    _, vjp = jax.vjp(lambda y: block(y, only), x)
    cotangent = jnp.zeros((len(g), *x.shape)).at[jnp.arange(len(g)), position].set(g)
    return np.asarray(jax.vmap(lambda c: vjp(c)[0])(cotangent))


def check_pull(made, weights, x, cfg, linearisation, tolerance):
    g, position = rows(12, *x.shape)
    expected = vjp_rows(frozen_block(weights, x, cfg, linearisation), x, g, position)
    got = pulled_to_all(made, pull_back(made, g, position))
    within(
        f"pull - vjp, {linearisation}",
        got,
        expected,
        tolerance,
        np.abs(expected).max((1, 2), keepdims=True),
    )


def test_pull_is_the_vjp(frozen):
    cfg, linearisation, weights, x, _, made, after = frozen
    block = frozen_block(weights, x, cfg, linearisation)
    within("the test's own block", block(x), after, BLOCK, np.abs(after).max())
    check_pull(made, weights, x, cfg, linearisation, BLOCK)


def all_parts(made, parts, pulled):
    """`EdgeParts` of every component `[R, T * C]`, and its position."""
    n_positions, n_slots = parts.kind.shape
    position, slot = (jnp.asarray(i.ravel()) for i in np.indices((n_positions, n_slots)))
    v = source_values(made, parts)
    candidates = Candidates(
        position=position, vectors=parts.at(position, slot), values=v[position, slot]
    )
    chosen = jnp.broadcast_to(jnp.arange(len(position)), (len(pulled.position), len(position)))
    return kept_parts(made, pulled, candidates, chosen, precision="highest"), np.asarray(position)


def check_parts(made, weights, x, parts, cfg, linearisation, heads):
    """Each head's loading, and the MLP's part, against a vjp in which nothing
    else carries the derivative.
    """
    block = frozen_block(weights, x, cfg, linearisation)
    g, position = rows(12, *x.shape)
    split, source = all_parts(made, parts, pull_back(made, g, position))
    vectors = np.asarray(parts.vectors()).reshape(len(source), -1)
    largest = np.abs(split.heads).max((1, 2))[:, None]
    for n in heads:
        expected = np.einsum(
            "RQD,QD->RQ",
            vjp_rows(block, x, g, position, of_head(n, *made.seen.pattern_NTS.shape))[:, source],
            vectors,
        )
        within(
            f"head loading - vjp, {linearisation}", split.heads[:, :, n], expected, LOADING, largest
        )
    own = np.einsum("RQD,QD->RQ", vjp_rows(block, x, g, position, "own")[:, source], vectors)
    # Of the two parts, not of their sum: at position 0 a row has one source, and there they may
    # cancel.
    largest = (np.abs(split.residual) + np.abs(split.mlp)).max(1)[:, None]
    within(
        f"residual + mlp - vjp, {linearisation}", split.residual + split.mlp, own, LOADING, largest
    )
    here = (source == np.asarray(position)[:, None]) * (np.asarray(g) @ vectors.T)
    within("residual - g . x_c", split.residual, here, LOADING, largest)


def test_head_loadings_are_the_vjp_through_one_head(frozen):
    cfg, linearisation, weights, x, parts, made, _ = frozen
    check_parts(made, weights, x, parts, cfg, linearisation, range(weights.wq_DNH.shape[1]))


def check_totals(made, x, parts, after, tolerance):
    """A row's edges with const are what the row reads, and every edge is the sum of its parts."""
    g, position = rows(12, *x.shape)
    pulled = pull_back(made, g, position)
    total = np.asarray(edge_totals(made, pulled, parts, source_values(made, parts)))
    total = total.reshape(-1, len(g)).T
    size = np.abs(total).max(1)
    value = np.einsum("RD,RD->R", g, after[position])
    within(
        "row sum - g . x", total.sum(1) + pulled.constant, value, tolerance, np.abs(total).sum(1)
    )
    split, _ = all_parts(made, parts, pulled)
    summed = split.residual + split.mlp + split.heads.sum(-1)
    within("edge - sum of its parts", total, summed, tolerance, size[:, None])


def test_rows_sum_to_what_they_read(frozen):
    _, _, _, x, parts, made, after = frozen
    check_totals(made, x, parts, after, BLOCK)


def rerun(weights, seen, cfg, x):
    """NumPy: the block on another x, with patterns, norm scales and act(gate)
    those of the prompt.
    """
    beta = naive.norm_constant(weights.norm_attn, x.shape[1])
    y = np.stack([m @ v for m, v in zip(seen.norm_attn, x, strict=True)]) + beta
    out = np.zeros_like(x) + naive._or_zero(weights.bo_D, x.shape[1])
    for n, pattern in enumerate(seen.pattern):
        kv = n // naive.group_of(weights)
        v = y @ naive.f64(weights.wv_DKH[:, kv]) + (
            0 if weights.bv_KH is None else naive.f64(weights.bv_KH[kv])
        )
        out += pattern @ v @ naive.f64(weights.wo_NHD[n])
    middle = x + np.stack([m @ v for m, v in zip(seen.post_attn, out, strict=True)])
    middle += naive.norm_constant(weights.norm_attn_post, x.shape[1])
    read = x if cfg.parallel else middle
    y = np.stack([m @ v for m, v in zip(seen.norm_mlp, read, strict=True)])
    y += naive.norm_constant(weights.norm_mlp, x.shape[1])
    act, up = naive.ACTIVATIONS[cfg.activation], y @ naive.f64(weights.w_up_DF)
    up += naive._or_zero(weights.b_up_F, up.shape[1])
    z = act(seen.up) / seen.up * up if seen.gate is None else act(seen.gate) * up
    out = z @ naive.f64(weights.w_down_FD) + naive._or_zero(weights.b_down_D, x.shape[1])
    out = np.stack([m @ v for m, v in zip(seen.post_mlp, out, strict=True)])
    return middle + out + naive.norm_constant(weights.norm_mlp_post, x.shape[1])


def check_removal(weights, x, parts, cfg, chosen):
    """Take a component away with everything frozen: what a row reads falls by
    exactly the edge under frozen-gate.
    """
    made = freeze(weights, x, cfg=cfg, linearisation="frozen-gate")
    seen = naive.run_block(weights, x, cfg)
    g, position = rows(12, *x.shape)
    pulled = pull_back(made, g, position)
    total = np.asarray(edge_totals(made, pulled, parts, source_values(made, parts)))
    before = rerun(weights, seen, cfg, seen.x)
    vectors = np.asarray(parts.vectors(), np.float64)
    for s, c in chosen:
        x_without = seen.x.copy()
        x_without[s] -= vectors[s, c]
        lost = (before - rerun(weights, seen, cfg, x_without))[position]
        change = np.einsum("RD,RD->R", np.asarray(g, np.float64), lost)
        within("removal - edge", total[s, c], change, LOADING, np.abs(total).max((0, 1)))


def test_removing_a_source_moves_a_row_by_its_edge(case):
    for b in range(tiny.L):
        weights, x, parts = case.block(b)
        chosen = np.argwhere(np.abs(np.asarray(parts.vectors())).max(-1) > 0)
        check_removal(weights, x, parts, case.cfg.block, chosen[::3])


# The real model -----------------------------------------------------------------------------------


#: Every second block with the default, every sixth one with the others.
REAL = [(b, how) for how in LINEARISATIONS for b in range(1, 30, 2 if how == "jacobian" else 6)]


@pytest.mark.slow
@pytest.mark.parametrize("b, linearisation", REAL)
def test_real_block(real_case, b, linearisation):
    weights, x, parts = real_case.block(b)
    cfg, after = real_case.cfg.block, real_case.trace.boundaries[b + 1]
    made = freeze(weights, x, cfg=cfg, linearisation=linearisation)
    size = np.abs(after).max(1, keepdims=True)
    within("real: push + constant", push(made, x) + constant(made), after, REAL_BLOCK, size)
    check_pull(made, weights, x, cfg, linearisation, REAL_BLOCK)
    check_parts(made, weights, x, parts, cfg, linearisation, (0, 4, 8))
    check_totals(made, x, parts, after, REAL_BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("b", [1, 13])
def test_real_removal(real_case, b):
    weights, x, parts = real_case.block(b)
    check_removal(
        weights, x, parts, real_case.cfg.block, [(0, parts.n_slots - 1), (5, 0), (9, 2), (9, 32)]
    )

"""Edits for tests, and the reference for them: the edited model in float64 NumPy, from the formulas
in the docstring of `qkattr.model.edits`.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import naive
import numpy as np
import pytest
import tiny
from tiny import within

from qkattr.model.edits import (
    BlockEdits,
    Edits,
    PatternEdits,
    ReadEdits,
    ResidualEdits,
)
from qkattr.model.transformer import forward

SCORE = 2e-5  # of a head's largest |score|, edited or not: float32 sums, each 1e-7 of its terms
SAME = 1e-5  # the same float32 arithmetic in another program, of the largest
MODEL = 1e-5  # float32 against float64 through three blocks, of the largest
LOGITS = 1e-4  # float32 against float32 in `transformers`, logits of order 10
PATTERN = 1e-5  # of probabilities
REAL_LOGITS = 1e-3  # thirty blocks, logits of order 20
MOVED = 1e-3  # of the largest: an edit that moves less is no test of anything

ROWS = tiny.T  # edits a block has room for; the unused ones are padding
SIDES = ("query", "key")
LIVE = pytest.mark.parametrize("live", [False, True], ids=["frozen", "live"])


# Making edits -------------------------------------------------------------------------------------


class Read(NamedTuple):
    """One read edit, of some heads of one block."""

    block: int
    position: int
    vector: np.ndarray
    scale: float
    heads: tuple[int, ...]


def reads(cfg, *made: Read) -> ReadEdits:
    """Stacked over blocks, and padded."""
    rows = cfg.n_blocks, ROWS
    edits = ReadEdits(
        position_E=np.zeros(rows, np.int32),
        vector_ED=np.zeros((*rows, cfg.d_model), np.float32),
        scale_E=np.ones(rows, np.float32),
        heads_EN=np.zeros((*rows, cfg.n_heads), bool),
    )
    used = [0] * cfg.n_blocks
    for one in made:
        at = one.block, used[one.block]
        used[one.block] += 1
        edits.position_E[at], edits.vector_ED[at] = one.position, one.vector
        edits.scale_E[at] = one.scale
        edits.heads_EN[at][list(one.heads)] = True
    return edits


def full(
    case,
    *,
    query=(),
    key=(),
    patterns=None,
    head_scale=None,
    head_add=None,
    residual=(),
    live=False,
) -> Edits:
    """Edits with every part there, so that one compiled program serves all tests of a house;
    what is not asked for does nothing. residual: (boundary, position, delta), two at most.
    """
    cfg, n = case.cfg, len(case.tokens)
    added = ResidualEdits(
        np.full(2, -1, np.int32), np.zeros(2, np.int32), np.zeros((2, cfg.d_model), np.float32)
    )
    for i, (b, position, delta) in enumerate(residual):
        added.boundary_E[i], added.position_E[i], added.delta_ED[i] = b, position, delta
    lead = cfg.n_blocks, cfg.n_heads, n
    return Edits(
        added,
        BlockEdits(
            query=reads(cfg, *query),
            key=reads(cfg, *key),
            patterns=patterns
            or PatternEdits(np.zeros((*lead, n), np.float32), np.zeros(lead, bool)),
            head_scale_TN=np.ones((cfg.n_blocks, n, cfg.n_heads), np.float32)
            if head_scale is None
            else head_scale,
            head_add_TNH=np.zeros((cfg.n_blocks, n, cfg.n_heads, cfg.head_dim), np.float32)
            if head_add is None
            else head_add,
            live_scales=live,
        ),
    )


def run(case, edits: Edits):
    """Logits and trace, on the host."""
    return jax.device_get(forward(case.params, case.tokens, cfg=case.cfg, edits=edits))


def of_block(stacked, b: int):
    """One block of anything stacked, on the host: slicing in JAX compiles every slice."""
    return jax.tree.map(lambda a: a[b], jax.device_get(stacked))


def block_of(case, b: int):
    """Weights, residual stream and components of a block, on the host."""
    return tuple(
        of_block(one, b) for one in (case.params.blocks, case.trace.boundaries, case.components)
    )


def vector(case, b: int, seed: int = 0) -> np.ndarray:
    """A random vector as large as the residual stream of boundary b."""
    d = np.random.default_rng(seed).normal(size=case.cfg.d_model)
    return np.asarray(d * np.std(np.asarray(case.trace.boundaries)[b]), np.float32)


def random_patterns(case, rng, share: float) -> PatternEdits:
    """Random causal patterns, in a share of the rows."""
    shape = case.trace.patterns.shape
    pattern = np.tril(rng.uniform(size=shape))
    pattern /= pattern.sum(-1, keepdims=True)
    return PatternEdits(np.asarray(pattern, np.float32), rng.uniform(size=shape[:3]) < share)


def random_outputs(case, rng) -> np.ndarray:
    """Something to add to every head's output."""
    shape = case.cfg.n_blocks, len(case.tokens), case.cfg.n_heads, case.cfg.head_dim
    return np.asarray(0.3 * rng.normal(size=shape), np.float32)


def largest(*scores) -> np.ndarray:
    """The largest |score| of every head `[..., N, 1, 1]` among pairs with s <= t."""
    causal = np.tril(np.ones(np.shape(scores[0])[-2:]))
    return np.max([np.abs(s * causal).max((-2, -1), keepdims=True) for s in scores], axis=0)


def within_scores(what, actual, expected, clean) -> None:
    causal = np.tril(np.ones(np.shape(clean)[-2:]))
    within(what, actual * causal, expected * causal, SCORE, largest(clean, expected))


def within_largest(what, actual, expected, tolerance=SAME) -> None:
    within(what, actual, expected, tolerance, np.abs(expected).max())


def moved(actual, clean) -> bool:
    return np.abs(actual - clean).max() > MOVED * np.abs(clean).max()


def assert_identical(actual, expected) -> None:
    """Two pytrees, bit for bit."""
    chex.assert_trees_all_equal(actual, expected)


# The reference: float64 NumPy, from the formulas in the module's docstring ------------------------


def reference_block(w, x, cfg, edits: BlockEdits = BlockEdits(), held: dict | None = None):  # noqa: B008
    """The next boundary, scores, patterns and norm scales of one block under its edits. held:
    scales of another run, in the place of its own.
    """
    x = naive.f64(x)
    (n_positions, d), (n_heads, size) = x.shape, w.wq_DNH.shape[1:]
    scales = {}

    def scale(name, function):
        scales[name] = function() if held is None else held[name]
        return scales[name]

    def normed(norm, read, at):
        return naive.norm_matrix(norm, at, d, cfg) @ read + naive.norm_constant(norm, d)

    def norm(name, norm, read):
        own = scale(name, lambda: [naive.inverse_norm(norm, one, cfg) for one in read])
        return np.stack([normed(norm, *pair) for pair in zip(read, own, strict=True)])

    def or_zero(bias, *pick):
        return 0.0 if bias is None else naive.f64(bias)[pick]

    def head_vector(side, n, t):
        """What meets in the score: of the edited read where there is an edit of this head."""
        if side == "query":
            head, weight, bias, gain, made = n, w.wq_DNH, w.bq_NH, w.norm_q, edits.query
        else:
            head = n // naive.group_of(w)
            weight, bias, gain, made = w.wk_DKH, w.bk_KH, w.norm_k, edits.key

        def raw(read, at):
            return normed(w.norm_attn, read, at) @ naive.f64(weight[:, head]) + or_zero(bias, head)

        def rms(read, at):
            y = normed(w.norm_attn, read, at)
            return naive.qk_scale(gain, y, weight, bias, head, cfg)

        norm_scale = scales["attn"][t]
        head_scale = scale((side, n, t), lambda: rms(x[t], norm_scale))
        read, edited = x[t], False
        for e in range(0 if made is None else len(made.scale_E)):
            if made.position_E[e] == t and made.heads_EN[e, n] and made.scale_E[e] != 1:
                delta = (naive.f64(made.scale_E[e]) - 1) * naive.f64(made.vector_ED[e])
                read, edited = read + delta, True
        if edited and edits.live_scales:
            norm_scale = naive.inverse_norm(w.norm_attn, read, cfg)
            head_scale = rms(read, norm_scale)
        projected = raw(read, norm_scale)
        if gain is not None:
            projected = projected * naive.f64(naive.gain_of(gain, head)) * head_scale
        return naive.rotation(t, w.inv_freq, size) @ projected

    y = norm("attn", w.norm_attn, x)
    scores, pattern = np.zeros((2, n_heads, n_positions, n_positions))
    attn = np.zeros_like(x) + or_zero(w.bo_D)
    for n in range(n_heads):
        q, k = (np.stack([head_vector(side, n, t) for t in range(n_positions)]) for side in SIDES)
        kv = n // naive.group_of(w)
        values = y @ naive.f64(w.wv_DKH[:, kv]) + or_zero(w.bv_KH, kv)
        scores[n] = cfg.scale * q @ k.T
        for t in range(n_positions):
            keys = [s for s in range(t + 1) if t - s < int(w.window)]
            pattern[n, t, keys] = naive.softmax(naive.cap(scores[n, t, keys], cfg))
            if edits.patterns is not None and edits.patterns.rows_NT[n, t]:
                pattern[n, t] = edits.patterns.pattern_NTS[n, t]
            factor = 1.0 if edits.head_scale_TN is None else edits.head_scale_TN[t, n]
            output = factor * pattern[n, t] @ values
            if edits.head_add_TNH is not None:
                output = output + edits.head_add_TNH[t, n]
            attn[t] += output @ naive.f64(w.wo_NHD[n])
    middle = x + norm("attn_post", w.norm_attn_post, attn)
    y = norm("mlp", w.norm_mlp, x if cfg.parallel else middle)
    act = naive.ACTIVATIONS[cfg.activation]
    hidden = y @ naive.f64(w.w_up_DF) + or_zero(w.b_up_F)
    if w.w_gate_DF is None:
        hidden = act(hidden)
    else:
        hidden = act(y @ naive.f64(w.w_gate_DF) + or_zero(w.b_gate_F)) * hidden
    out = hidden @ naive.f64(w.w_down_FD) + or_zero(w.b_down_D)
    return middle + norm("mlp_post", w.norm_mlp_post, out), scores, pattern, scales


def reference_model(case, edits: Edits):
    """Logits, boundaries, scores and patterns under `edits`."""
    params, cfg = case.params, case.cfg.block
    x = naive.f64(params.embed_VD)[case.tokens]
    x = x if params.position_PD is None else x + naive.f64(params.position_PD)[: len(x)]
    boundaries, scores, patterns = [], [], []
    for b in range(case.cfg.n_blocks + 1):
        for boundary, t, delta in zip(*jax.tree.leaves(edits.residual), strict=True):
            x[t] += delta * (boundary == b)
        boundaries.append(x)
        if b < case.cfg.n_blocks:
            weights = of_block(params.blocks, b)
            x, *seen, _ = reference_block(weights, x, cfg, of_block(edits.blocks, b))
            scores.append(seen[0])
            patterns.append(seen[1])
    norm, d = params.norm_final, case.cfg.d_model
    y = [naive.norm_matrix(norm, naive.inverse_norm(norm, one, cfg), d, cfg) @ one for one in x]
    y = np.stack(y) + naive.norm_constant(norm, d)
    tied = params.unembed_DV is None
    logits = y @ (naive.f64(params.embed_VD).T if tied else naive.f64(params.unembed_DV))
    bias = params.unembed_bias_V
    logits = logits if bias is None else logits + naive.f64(bias)
    return logits, *map(np.stack, (boundaries, scores, patterns))
